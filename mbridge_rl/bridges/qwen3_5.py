"""Qwen3.5, dense and with experts: gated delta nets and gated attention, all norms but the delta nets' own zero-centred."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, decoder, gated_mlp
from mbridge_rl.bridges.blocks.gated_delta_net import gated_attention, gated_delta_net, projections_apart
from mbridge_rl.bridges.qwen3_next import PREDICTION_LAYERS, experts_beside_gated
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.stacked_experts import with_stacked_experts


def qwen3_5(hf: ConfigReader) -> ModelSpec:
    return _qwen3_5(hf, gated_mlp(hf))


def qwen3_5_moe(hf: ConfigReader) -> ModelSpec:
    """The spec of Qwen3.5 with experts. Checkpoints on the hub stack a layer's experts, those that Transformers saves do
    not."""
    spec = _qwen3_5(hf, *experts_beside_gated(hf, tuple(range(hf.num_hidden_layers)), normalized=True))
    return replace(with_stacked_experts(spec), alternatives=(spec,))


def _qwen3_5(hf: ConfigReader, *blocks: Block) -> ModelSpec:
    spec = decoder(hf, gated_delta_net(hf, projections_apart(hf)), gated_attention(hf), *blocks, partial_rotation=True)
    return replace(spec, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, *PREDICTION_LAYERS))
