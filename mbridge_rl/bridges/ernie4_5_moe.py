"""ERNIE 4.5 MoE (text): interleaved rotary positions; softmax-routed experts, chosen with a bias and renormalised, beside
shared ones, in a range of layers."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import ExpertNames, gated_experts, shared_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec

_NAMES = ExpertNames(bias="moe_statics.e_score_correction_bias")


def ernie4_5_moe(hf: ConfigReader) -> ModelSpec:
    hf.require("use_bias", False)
    sparse = tuple(
        layer
        for layer in range(hf.moe_layer_start_index, min(hf.moe_layer_end_index + 1, hf.num_hidden_layers))
        if (layer + 1) % hf.moe_layer_interval == 0
    )
    dense = tuple(layer for layer in range(hf.num_hidden_layers) if layer not in sparse)
    experts, ffn = hf.moe_num_experts, hf.moe_intermediate_size
    routing = Routing(minimum=hf.moe_norm_min)
    routed = gated_experts(
        hf, sparse, routing, experts=experts, ffn=ffn, names=_NAMES, bias_shape=(1, experts), fp32_router=True
    )
    shared = [shared_experts(hf, sparse, ffn * hf.moe_num_shared_experts)] if hf.moe_num_shared_experts else []
    neighbours = Block({"rotary_interleaved": True})
    spec = decoder(hf, attention(hf), neighbours, gated_mlp(hf).only_in(dense), routed, *shared)
    return replace(spec, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, "model.mtp_"))
