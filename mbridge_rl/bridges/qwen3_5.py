"""Qwen3.5, dense: gated delta nets and gated attention, all norms but the delta nets' own zero-centred."""

from __future__ import annotations

from typing import Any

from mbridge_rl.bridges.blocks import decoder, gated_mlp
from mbridge_rl.bridges.gated_delta_net import gated_attention, gated_delta_net, projections_apart
from mbridge_rl.core.model import ModelSpec


def qwen3_5(hf: Any) -> ModelSpec:
    return decoder(hf, gated_delta_net(hf, projections_apart(hf)), gated_attention(hf), gated_mlp(hf))
