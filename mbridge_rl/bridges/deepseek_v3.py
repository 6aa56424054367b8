"""DeepSeek-V3, R1 and Kimi-K2: latent attention, a few dense layers, then sigmoid-routed experts with a shared one.

Multi-token-prediction layers (`model.layers.{num_layers}` and on) are not built: RL trains the next-token head, and none of the
reference implementations loads them. A checkpoint may hold them; they are left where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mbridge_rl.bridges.blocks import HF_LAYER, MEGATRON_LAYER, Block, decoder, gated_mlp, mixture_of_experts, require
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Axis, Part, Rule, column_parallel, replicated, row_parallel

# What a prediction layer holds besides an ordinary layer.
_PREDICTION_TENSORS = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")


def deepseek_v3(hf: Any) -> ModelSpec:
    dense = tuple(range(min(hf.first_k_dense_replace, hf.num_hidden_layers)))
    sparse = tuple(range(len(dense), hf.num_hidden_layers))
    attention, experts = latent_attention(hf), sigmoid_mixture_of_experts(hf, sparse)
    spec = decoder(hf, attention, gated_mlp(hf).only_in(dense), experts)
    ignored = _prediction_layer_names(hf, (*attention.rules, *experts.rules))
    return replace(spec, ignored_hf_names=(*spec.ignored_hf_names, *ignored))


def latent_attention(hf: Any) -> Block:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values, and with `q_lora_rank` queries too, pass
    through low-rank projections whose norms are fused into the up-projections. Only these are cut, by whole heads."""
    require(hf, "attention_bias", False)
    require(hf, "rope_interleave", True)
    h, heads, rope, lora = hf.hidden_size, hf.num_attention_heads, hf.qk_rope_head_dim, hf.kv_lora_rank
    key, value = hf.qk_nope_head_dim, hf.v_head_dim
    ours, theirs = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    rules = [
        replicated(f"{MEGATRON_LAYER}.input_layernorm.weight", f"{HF_LAYER}.input_layernorm.weight", (h,)),
        *_queries(hf, ours, theirs),
        replicated(f"{ours}.linear_kv_down_proj.weight", f"{theirs}.kv_a_proj_with_mqa.weight", (lora + rope, h)),
        replicated(f"{ours}.linear_kv_up_proj.layer_norm_weight", f"{theirs}.kv_a_layernorm.weight", (lora,)),
        _by_head(f"{ours}.linear_kv_up_proj.weight", f"{theirs}.kv_b_proj.weight", heads, key + value, lora),
        _output(f"{ours}.linear_proj.weight", f"{theirs}.o_proj.weight", h, heads, value),
    ]
    config = {
        "multi_latent_attention": True,
        "num_attention_heads": heads,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": lora,
        "qk_head_dim": key,
        "qk_pos_emb_head_dim": rope,
        "v_head_dim": value,
        "qk_layernorm": True,
        "attention_dropout": hf.attention_dropout,
        **_rotary(hf),
    }
    return Block(config, tuple(rules), rotates=True)


def _queries(hf: Any, ours: str, theirs: str) -> list[Rule]:
    heads, dim, lora = hf.num_attention_heads, hf.qk_nope_head_dim + hf.qk_rope_head_dim, hf.q_lora_rank
    if lora is None:
        return [_by_head(f"{ours}.linear_q_proj.weight", f"{theirs}.q_proj.weight", heads, dim, hf.hidden_size)]
    return [
        replicated(f"{ours}.linear_q_down_proj.weight", f"{theirs}.q_a_proj.weight", (lora, hf.hidden_size)),
        replicated(f"{ours}.linear_q_up_proj.layer_norm_weight", f"{theirs}.q_a_layernorm.weight", (lora,)),
        _by_head(f"{ours}.linear_q_up_proj.weight", f"{theirs}.q_b_proj.weight", heads, dim, lora),
    ]


def _by_head(megatron_name: str, hf_name: str, heads: int, dim: int, columns: int) -> Rule:
    """`[heads * dim, columns]`, dealt by whole heads."""
    part = Part(hf_name, (Axis(heads, 0), Axis(dim, 0), Axis(columns, 1)), hf_shape=(heads * dim, columns))
    return Rule(megatron_name, (part,), (0, columns), axis="tp")


def _output(megatron_name: str, hf_name: str, rows: int, heads: int, dim: int) -> Rule:
    """`[rows, heads * dim]`, dealt by whole heads."""
    part = Part(hf_name, (Axis(rows, 0), Axis(heads, 1), Axis(dim, 1)), hf_shape=(rows, heads * dim))
    return Rule(megatron_name, (part,), (rows, 0), dim=1, axis="tp")


def _rotary(hf: Any) -> dict[str, Any]:
    """Rotary positions as fields of Megatron's `MLATransformerConfig`: plain, or YaRN (arXiv 2309.00071)."""
    rope = hf.rope_parameters
    config = {"rotary_base": rope["rope_theta"], "rotary_percent": 1.0}
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        return {**config, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    if rope_type != "yarn":
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: rope type {rope_type!r} is not supported by Megatron's latent attention; "
            f"supported: default, yarn"
        )
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None or not rope.get("truncate", True) or (mscale_all_dim and not mscale):
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: YaRN with attention_factor, with truncate=False, or with mscale_all_dim but no mscale has "
            f"no counterpart in Megatron's latent attention; found {dict(rope)}"
        )
    original = rope["original_max_position_embeddings"]
    return {
        **config,
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.get("factor") or hf.max_position_embeddings / original,
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        # Transformers looks at mscale only where mscale_all_dim is there too, and takes 1 otherwise.
        "mscale": mscale if mscale_all_dim else 1.0,
        "mscale_all_dim": mscale_all_dim or 0.0,
    }


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


def _prediction_layer_names(hf: Any, layer_rules: tuple[Rule, ...]) -> list[str]:
    """Tensors of the multi-token-prediction layers that a checkpoint may hold."""
    names = []
    for layer in range(hf.num_hidden_layers, hf.num_hidden_layers + (getattr(hf, "num_nextn_predict_layers", None) or 0)):
        names += [f"model.layers.{layer}.{name}.weight" for name in _PREDICTION_TENSORS]
        for part in (part for rule in layer_rules for part in rule.parts):
            experts = range(hf.n_routed_experts) if "{expert}" in part.hf_name else [None]
            names += [part.hf_name.format(layer=layer, expert=expert) for expert in experts]
    return names
