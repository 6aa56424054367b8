"""Qwen3-MoE: Qwen3 attention; experts in every `decoder_sparse_step`-th layer but `mlp_only_layers`."""

from typing import Any

from mbridge_rl.bridges.blocks import attention, decoder, gated_mlp
from mbridge_rl.bridges.experts import mixture_of_experts
from mbridge_rl.core.model import ModelSpec


def qwen3_moe(hf: Any) -> ModelSpec:
    layers = range(hf.num_hidden_layers)
    sparse = tuple(layer for layer in layers if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0)
    dense = tuple(layer for layer in layers if layer not in sparse)
    return decoder(hf, attention(hf, qk_norm=True), gated_mlp(hf).only_in(dense), mixture_of_experts(hf, sparse))
