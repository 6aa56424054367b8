"""The multi-head latent attention of DeepSeek's families and their successors."""

from __future__ import annotations

from typing import Any

from mbridge_rl.bridges.blocks.config_reader import ConfigReader, rope_value
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import LatentNormEpsilon
from mbridge_rl.core.rules import Axis, HFPart, Rule, replicated

# The epsilon in Transformers and the models' own code, for every `rms_norm_eps`; Megatron and vLLM use `rms_norm_eps`.
_LATENT_EPSILON = 1e-6


def latent_attention(hf: ConfigReader) -> Block:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values, and with `q_lora_rank` queries, too, pass
    through low-rank projections whose norms are fused into the up-projections. Only the up-projections are sharded, by full
    heads."""
    hf.require("attention_bias", False)
    hf.require("num_key_value_heads", hf.num_attention_heads, None)
    hf.ignore("head_dim")
    hf.require("rope_interleave", True)
    h, heads, rope, lora = hf.hidden_size, hf.num_attention_heads, hf.qk_rope_head_dim, hf.kv_lora_rank
    key, value = hf.qk_nope_head_dim, hf.v_head_dim
    megatron_prefix, hf_prefix = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    rules = [
        replicated(f"{MEGATRON_LAYER}.input_layernorm.weight", f"{HF_LAYER}.input_layernorm.weight", (h,)),
        *_queries(hf, megatron_prefix, hf_prefix),
        replicated(f"{megatron_prefix}.linear_kv_down_proj.weight", f"{hf_prefix}.kv_a_proj_with_mqa.weight", (lora + rope, h)),
        replicated(f"{megatron_prefix}.linear_kv_up_proj.layer_norm_weight", f"{hf_prefix}.kv_a_layernorm.weight", (lora,)),
        _by_head(f"{megatron_prefix}.linear_kv_up_proj.weight", f"{hf_prefix}.kv_b_proj.weight", heads, key + value, lora),
        _output(f"{megatron_prefix}.linear_proj.weight", f"{hf_prefix}.o_proj.weight", h, heads, value),
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
        "attention_dropout": 0.0,  # as in `blocks.attention`
        **_rotary(hf),
    }
    extras = () if hf.rms_norm_eps == _LATENT_EPSILON else (LatentNormEpsilon(_LATENT_EPSILON, hf.rms_norm_eps),)
    return Block(config, tuple(rules), rotates=True, extras=extras)


def _queries(hf: ConfigReader, megatron_prefix: str, hf_prefix: str) -> list[Rule]:
    heads, dim, lora = hf.num_attention_heads, hf.qk_nope_head_dim + hf.qk_rope_head_dim, hf.q_lora_rank
    if lora is None:
        return [_by_head(f"{megatron_prefix}.linear_q_proj.weight", f"{hf_prefix}.q_proj.weight", heads, dim, hf.hidden_size)]
    return [
        replicated(f"{megatron_prefix}.linear_q_down_proj.weight", f"{hf_prefix}.q_a_proj.weight", (lora, hf.hidden_size)),
        replicated(f"{megatron_prefix}.linear_q_up_proj.layer_norm_weight", f"{hf_prefix}.q_a_layernorm.weight", (lora,)),
        _by_head(f"{megatron_prefix}.linear_q_up_proj.weight", f"{hf_prefix}.q_b_proj.weight", heads, dim, lora),
    ]


def _by_head(megatron_name: str, hf_name: str, heads: int, dim: int, columns: int) -> Rule:
    """A rule for `[heads * dim, columns]`, sharded by full heads."""
    part = HFPart(hf_name, (Axis(heads, 0), Axis(dim, 0), Axis(columns, 1)), hf_shape=(heads * dim, columns))
    return Rule(megatron_name, (part,), (0, columns), axis="tp")


def _output(megatron_name: str, hf_name: str, rows: int, heads: int, dim: int) -> Rule:
    """A rule for `[rows, heads * dim]`, sharded by full heads."""
    part = HFPart(hf_name, (Axis(rows, 0), Axis(heads, 1), Axis(dim, 1)), hf_shape=(rows, heads * dim))
    return Rule(megatron_name, (part,), (rows, 0), dim=1, axis="tp")


def _rotary(hf: ConfigReader) -> dict[str, Any]:
    """Rotary positions as fields of Megatron's `MLATransformerConfig`: plain, or YaRN (arXiv 2309.00071)."""
    rope = hf.rope_parameters
    rope_type = rope_value(hf, rope, "rope_type", "default")
    config = {"rotary_base": rope_value(hf, rope, "rope_theta", ...), "rotary_percent": 1.0}
    if rope_value(hf, rope, "partial_rotary_factor") not in (None, 1.0):
        raise hf.refuse(
            "rope_parameters.partial_rotary_factor", "latent attention rotates all of its qk_rope_head_dim channels"
        )
    if hf.qk_rope_head_dim % 2:
        raise CheckpointError(f"{hf.architecture}: qk_rope_head_dim={hf.qk_rope_head_dim}; expected an even number of channels")
    if rope_type == "default":
        return {**config, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    if rope_type != "yarn":
        raise hf.refuse(
            "rope_parameters.rope_type",
            f"rope type {rope_type!r} is not supported by Megatron's latent attention; supported: default, yarn",
        )
    mscale, mscale_all_dim = rope_value(hf, rope, "mscale"), rope_value(hf, rope, "mscale_all_dim")
    whole_numbers = rope_value(hf, rope, "truncate", True)
    if rope_value(hf, rope, "attention_factor") is not None or not whole_numbers or (mscale_all_dim and not mscale):
        raise hf.refuse(
            "rope_parameters",
            "YaRN with attention_factor, with truncate=False, or with mscale_all_dim but no mscale has no counterpart in "
            f"Megatron's latent attention; found {dict(rope)}",
        )
    original = rope_value(hf, rope, "original_max_position_embeddings", hf.max_position_embeddings)
    return {
        **config,
        "rope_type": "yarn",
        "rotary_scaling_factor": rope_value(hf, rope, "factor") or hf.max_position_embeddings / original,
        "original_max_position_embeddings": original,
        "beta_fast": rope_value(hf, rope, "beta_fast") or 32,
        "beta_slow": rope_value(hf, rope, "beta_slow") or 1,
        # Transformers reads mscale only if mscale_all_dim is set, too, and uses 1 otherwise.
        "mscale": mscale if mscale_all_dim else 1.0,
        "mscale_all_dim": mscale_all_dim or 0.0,
    }
