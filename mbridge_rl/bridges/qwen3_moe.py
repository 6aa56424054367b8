"""Qwen3-MoE: Qwen3 attention; experts in every `decoder_sparse_step`-th layer except `mlp_only_layers`."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import gated_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def qwen3_moe(hf: ConfigReader) -> ModelSpec:
    sparse, dense = layers_with_experts(hf)
    experts = gated_experts(
        hf, sparse, Routing(normalized=hf.norm_topk_prob), experts=hf.num_experts, ffn=hf.moe_intermediate_size
    )
    return decoder(hf, attention(hf, qk_norm=True), gated_mlp(hf).only_in(dense), experts)


def layers_with_experts(hf: ConfigReader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers of experts, and the dense ones."""
    layers = range(hf.num_hidden_layers)
    sparse = tuple(layer for layer in layers if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0)
    return sparse, tuple(layer for layer in layers if layer not in sparse)
