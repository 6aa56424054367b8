"""Mixtures of experts: how tokens choose (Megatron's config) and where the experts' weights are (rules)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mbridge_rl.bridges.blocks import HF_LAYER, MEGATRON_LAYER, Block, require
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.rules import column_parallel, replicated, row_parallel


def mixture_of_experts(hf: Any, layers: tuple[int, ...]) -> Block:
    """Softmax top-k routing over gated experts in `layers`; other layers are dense."""
    h, f = hf.hidden_size, hf.moe_intermediate_size
    experts = getattr(hf, "num_experts", None) or hf.n_routed_experts
    ours, theirs = f"{MEGATRON_LAYER}.mlp", f"{HF_LAYER}.mlp"
    one = f"{theirs}.experts.{{expert}}"
    gate_up = {f"{one}.gate_proj.weight": f, f"{one}.up_proj.weight": f}
    rules = (
        replicated(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", f"{HF_LAYER}.post_attention_layernorm.weight", (h,)),
        replicated(f"{ours}.router.weight", f"{theirs}.gate.weight", (experts, h)),
        column_parallel(f"{ours}.experts.linear_fc1.weight{{expert}}", gate_up, (h,), axis="etp"),
        row_parallel(f"{ours}.experts.linear_fc2.weight{{expert}}", f"{one}.down_proj.weight", (h, f), axis="etp"),
    )
    config = {
        "num_moe_experts": experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": f,
        "moe_layer_freq": [int(layer in layers) for layer in range(hf.num_hidden_layers)],
        # Softmax over the chosen logits equals choosing from the softmax and renormalising; without renormalisation the
        # softmax has to come first.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    return Block(config, rules, num_experts=experts).only_in(layers)


def sigmoid_mixture_of_experts(hf: Any, layers: tuple[int, ...]) -> Block:
    """Experts chosen by sigmoid scores plus a bias that only choosing sees (arXiv 2408.15664), normalised and scaled, beside
    shared experts that see every token."""
    require(hf, "scoring_func", "sigmoid")
    require(hf, "topk_method", "noaux_tc")
    require(hf, "norm_topk_prob", True)
    h, shared = hf.hidden_size, hf.moe_intermediate_size * (hf.n_shared_experts or 0)
    ours, theirs = f"{MEGATRON_LAYER}.mlp", f"{HF_LAYER}.mlp"
    if not shared or hf.num_experts_per_tok < 2:
        raise UnsupportedModelError(
            f"{hf.architectures[0]} needs n_shared_experts of at least 1 and num_experts_per_tok of at least 2 (Megatron does "
            f"not normalise a single score), found {hf.n_shared_experts} and {hf.num_experts_per_tok}"
        )
    gate_up = {f"{theirs}.shared_experts.gate_proj.weight": shared, f"{theirs}.shared_experts.up_proj.weight": shared}
    rules = (
        replicated(
            f"{ours}.router.expert_bias", f"{theirs}.gate.e_score_correction_bias", (hf.n_routed_experts,), dtype=torch.float32
        ),
        column_parallel(f"{ours}.shared_experts.linear_fc1.weight", gate_up, (h,)),
        row_parallel(f"{ours}.shared_experts.linear_fc2.weight", f"{theirs}.shared_experts.down_proj.weight", (h, shared)),
    )
    routed = mixture_of_experts(hf, layers)
    config = {
        **routed.config,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        # Balancing is for pretraining: here the bias moves only if it is asked to (an override of build_model).
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": shared,
        **_groups(hf),
    }
    return replace(routed, config=config, rules=(*routed.rules, *(replace(rule, layers=layers) for rule in rules)))


def _groups(hf: Any) -> dict[str, int]:
    """Routing limited to the best `topk_group` of `n_group` groups of experts; nothing where that is all of them."""
    groups, chosen = hf.n_group or 1, hf.topk_group or 1
    if chosen >= groups:
        return {}
    if hf.num_experts_per_tok // chosen != 2:
        raise UnsupportedModelError(
            f"{hf.architectures[0]} ranks a group by its two best experts, Megatron by its num_experts_per_tok // topk_group = "
            f"{hf.num_experts_per_tok} // {chosen} best; only configs where that is 2 are supported"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
