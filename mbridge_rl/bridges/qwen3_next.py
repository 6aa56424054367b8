"""Qwen3-Next: gated delta nets and gated attention; experts, and a shared expert with a gate, in every `decoder_sparse_step`-th
layer except `mlp_only_layers`."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import ExpertNames, gated_experts, shared_experts
from mbridge_rl.bridges.blocks.gated_delta_net import gated_attention, gated_delta_net, projections_by_head
from mbridge_rl.bridges.qwen3_moe import layers_with_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec

PREDICTION_LAYERS = ("mtp.",)


def qwen3_next(hf: ConfigReader) -> ModelSpec:
    sparse, dense = layers_with_experts(hf)
    experts = experts_beside_gated(hf, sparse, normalized=hf.norm_topk_prob)
    blocks = (gated_delta_net(hf, projections_by_head(hf)), gated_attention(hf), gated_mlp(hf).only_in(dense), *experts)
    spec = decoder(hf, *blocks, partial_rotation=True)
    return replace(spec, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, *PREDICTION_LAYERS))


def experts_beside_gated(hf: ConfigReader, layers: tuple[int, ...], *, normalized: bool) -> tuple[Block, Block]:
    """Experts, and a shared expert that processes every token and has a gate."""
    names = ExpertNames(shared="shared_expert")
    return (
        gated_experts(hf, layers, Routing(normalized=normalized), experts=hf.num_experts, ffn=hf.moe_intermediate_size),
        shared_experts(hf, layers, hf.shared_expert_intermediate_size, names=names, gate="shared_expert_gate"),
    )
