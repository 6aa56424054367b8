"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then softmax-routed experts, never renormalised, beside shared
ones."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import dense_then_sparse, gated_experts, shared_experts
from mbridge_rl.bridges.blocks.latent_attention import latent_attention
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def deepseek_v2(hf: ConfigReader) -> ModelSpec:
    hf.require("scoring_func", "softmax")
    hf.require("norm_topk_prob", False)
    hf.require("moe_layer_freq", 1)
    hf.require("mlp_bias", False)
    dense, sparse = dense_then_sparse(hf)
    experts, ffn = hf.n_routed_experts, hf.moe_intermediate_size
    return decoder(
        hf,
        latent_attention(hf),
        gated_mlp(hf).only_in(dense),
        gated_experts(hf, sparse, _routing(hf), experts=experts, ffn=ffn, fp32_router=True),
        shared_experts(hf, sparse, ffn * hf.n_shared_experts),
    )


def _routing(hf: ConfigReader) -> Routing:
    plain = Routing(normalized=False, scaling_factor=hf.routed_scaling_factor)
    match hf.topk_method:
        case "greedy":
            hf.ignore("n_group", "topk_group")
            return plain
        case "group_limited_greedy":
            return replace(plain, groups=hf.n_group or 1, chosen_groups=hf.topk_group or 1, group_experts=1)
    raise hf.refuse("topk_method", f"{hf.topk_method!r} is not supported; supported: greedy, group_limited_greedy")
