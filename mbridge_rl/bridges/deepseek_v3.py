"""DeepSeek-V3, R1, Moonlight, Kimi-K2: latent attention, a few dense layers, then sigmoid-routed experts beside shared ones."""

from __future__ import annotations

from typing import Any

from mbridge_rl.bridges.blocks import decoder, gated_mlp
from mbridge_rl.bridges.experts import dense_then_sparse, sigmoid_experts
from mbridge_rl.bridges.latent_attention import latent_attention
from mbridge_rl.bridges.prediction import without_prediction
from mbridge_rl.core.model import ModelSpec


def deepseek_v3(hf: Any) -> ModelSpec:
    dense, sparse = dense_then_sparse(hf)
    spec = decoder(hf, latent_attention(hf), gated_mlp(hf).only_in(dense), *sigmoid_experts(hf, sparse))
    return without_prediction(hf, spec)
