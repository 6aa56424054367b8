"""The attention of Qwen3-Next and its successors: gated delta nets (arXiv 2412.06464) in most layers, attention with a gated
output in the others."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block, attention, head_dim, kv_heads_of
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import PlainNorm
from mbridge_rl.core.rules import Axis, HFPart, Rule, column_parallel, full_tensor, replicated, row_parallel, stacked

_MEGATRON_PREFIX, _HF_PREFIX = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.linear_attn"


def gated_delta_net(hf: ConfigReader, projection: tuple[HFPart, ...]) -> Block:
    """Linear attention in the layers that `layer_types` names.

    Args:
        projection: the parts of the input projection's rows in Megatron's order: query, key, value, gate z, beta, alpha.
    """
    hf.require("hidden_act", "silu")  # the activation of the convolution, too, which is fixed in Megatron
    layers = _layers(hf, "linear_attention")
    key, value = hf.linear_num_key_heads * hf.linear_key_head_dim, hf.linear_num_value_heads * hf.linear_value_head_dim
    h, heads, width = hf.hidden_size, hf.linear_num_value_heads, hf.linear_conv_kernel_dim
    if heads % hf.linear_num_key_heads:
        raise CheckpointError(
            f"{hf.architecture}: linear_num_key_heads={hf.linear_num_key_heads}; expected a divisor of "
            f"linear_num_value_heads={heads}"
        )
    rules = (
        replicated(f"{_MEGATRON_PREFIX}.in_proj.layer_norm_weight", f"{HF_LAYER}.input_layernorm.weight", (h,)),
        Rule(f"{_MEGATRON_PREFIX}.in_proj.weight", projection, (0, h), axis="tp"),
        Rule(f"{_MEGATRON_PREFIX}.conv1d.weight", _rows("conv1d", (key, key, value), (1, width)), (0, 1, width), axis="tp"),
        column_parallel(f"{_MEGATRON_PREFIX}.dt_bias", {f"{_HF_PREFIX}.dt_bias": heads}),
        column_parallel(f"{_MEGATRON_PREFIX}.A_log", {f"{_HF_PREFIX}.A_log": heads}),
        replicated(f"{_MEGATRON_PREFIX}.out_norm.weight", f"{_HF_PREFIX}.norm.weight", (hf.linear_value_head_dim,)),
        row_parallel(f"{_MEGATRON_PREFIX}.out_proj.weight", f"{_HF_PREFIX}.out_proj.weight", (h, value)),
    )
    config = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(layer in layers) for layer in range(hf.num_hidden_layers)],
        "linear_conv_kernel_dim": width,
        "linear_key_head_dim": hf.linear_key_head_dim,
        "linear_value_head_dim": hf.linear_value_head_dim,
        "linear_num_key_heads": hf.linear_num_key_heads,
        "linear_num_value_heads": heads,
        "layernorm_zero_centered_gamma": True,
    }
    return Block(config, rules, extras=(PlainNorm("self_attention.out_norm"),)).only_in(layers)


def projections_by_head(hf: ConfigReader) -> tuple[HFPart, ...]:
    """The projections of Qwen3-Next: for every key head its query, key, values and gates together; betas and alphas
    likewise."""
    values = hf.linear_num_value_heads // hf.linear_num_key_heads
    key, value = hf.linear_key_head_dim, values * hf.linear_value_head_dim
    return (
        *_parts_by_head(hf, "in_proj_qkvz", (key, key, value, value)),
        *_parts_by_head(hf, "in_proj_ba", (values, values)),
    )


def projections_apart(hf: ConfigReader) -> tuple[HFPart, ...]:
    """The projections of Qwen3.5: query, key and value in one tensor, the others in separate tensors."""
    h, heads = hf.hidden_size, hf.linear_num_value_heads
    key, value = hf.linear_num_key_heads * hf.linear_key_head_dim, heads * hf.linear_value_head_dim
    return (
        *_rows("in_proj_qkv", (key, key, value), (h,)),
        full_tensor(f"{_HF_PREFIX}.in_proj_z.weight", (value, h)),
        full_tensor(f"{_HF_PREFIX}.in_proj_b.weight", (heads, h)),
        full_tensor(f"{_HF_PREFIX}.in_proj_a.weight", (heads, h)),
    )


def gated_attention(hf: ConfigReader) -> Block:
    """Attention in the layers that `layer_types` names, with its output multiplied by the sigmoid of a gate. HF's `q_proj`
    holds, head by head, the query and its gate; Megatron has a group's queries, then their gates, then its key and value."""
    hf.require("attention_bias", False)
    plain = attention(hf, qk_norm=True)
    h, heads, groups, dim = hf.hidden_size, hf.num_attention_heads, kv_heads_of(hf), head_dim(hf)
    q_proj, *keys = (f"{HF_LAYER}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj"))
    query, gate = (
        HFPart(q_proj, (Axis(heads, 0), Axis(2, start=half), Axis(dim, 0), Axis(h, 1)), (2 * heads * dim, h)) for half in (0, 1)
    )
    parts = (query, gate, *(full_tensor(hf_name, (groups * dim, h)) for hf_name in keys))
    fused = Rule(f"{_MEGATRON_PREFIX}.linear_qkv.weight", parts, (0, h), axis="tp", groups=groups)
    rules = tuple(fused if rule.megatron_name == fused.megatron_name else rule for rule in plain.rules)
    return replace(plain, config={**plain.config, "attention_output_gate": True}, rules=rules).only_in(
        _layers(hf, "full_attention")
    )


def _layers(hf: ConfigReader, kind: str) -> tuple[int, ...]:
    return tuple(layer for layer, layer_type in enumerate(hf.layer_types) if layer_type == kind)


def _rows(name: str, sizes: tuple[int, ...], inner: tuple[int, ...]) -> tuple[HFPart, ...]:
    return stacked(f"{_HF_PREFIX}.{name}.weight", sizes, inner)


def _parts_by_head(hf: ConfigReader, name: str, sizes: tuple[int, ...]) -> tuple[HFPart, ...]:
    """The parts of a tensor that holds, for every key head, `sizes` rows of each part."""
    heads, rows, h = hf.linear_num_key_heads, sum(sizes), hf.hidden_size
    starts = (sum(sizes[:index]) for index in range(len(sizes)))
    return tuple(
        HFPart(f"{_HF_PREFIX}.{name}.weight", (Axis(heads, 0), Axis(rows, 0, start, size), Axis(h, 1)), (heads * rows, h))
        for start, size in zip(starts, sizes, strict=True)
    )
