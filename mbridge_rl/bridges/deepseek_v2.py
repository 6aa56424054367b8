"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then softmax-routed experts, never renormalised, beside shared
ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mbridge_rl.bridges.blocks import decoder, gated_mlp, require
from mbridge_rl.bridges.experts import dense_then_sparse, gated_experts, shared_experts
from mbridge_rl.bridges.latent_attention import latent_attention
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def deepseek_v2(hf: Any) -> ModelSpec:
    require(hf, "scoring_func", "softmax")
    require(hf, "norm_topk_prob", False)
    dense, sparse = dense_then_sparse(hf)
    experts, ffn = hf.n_routed_experts, hf.moe_intermediate_size
    return decoder(
        hf,
        latent_attention(hf),
        gated_mlp(hf).only_in(dense),
        gated_experts(hf, sparse, _routing(hf), experts=experts, ffn=ffn, fp32_router=True),
        shared_experts(hf, sparse, ffn * hf.n_shared_experts),
    )


def _routing(hf: Any) -> Routing:
    plain = Routing(normalized=False, scaling_factor=hf.routed_scaling_factor)
    match hf.topk_method:
        case "greedy":
            return plain
        case "group_limited_greedy":
            return replace(plain, groups=hf.n_group, chosen_groups=hf.topk_group, group_experts=1)
    raise UnsupportedModelError(
        f"{hf.architectures[0]}: topk_method={hf.topk_method!r} is not supported; supported: greedy, group_limited_greedy"
    )
