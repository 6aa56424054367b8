"""The type and the bounds of every field of Hugging Face configs that a bridge reads.

A value outside of them would cause an error somewhere in a family's table, or keep it busy for minutes. Values are therefore
checked before any table uses them: in config.json (`check_values`), and again where a family reads one (`check_value`). The
bounds are far beyond every existing model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mbridge_rl.core.errors import CheckpointError


@dataclass(frozen=True)
class FieldKind:
    """The values that a field may have.

    Attributes:
        expected: a description of these values, for the error.
        admits: whether a value is of this kind.
        optional: whether a family may read `None`, which means that the field is absent.
    """

    expected: str
    admits: Callable[[Any], bool]
    optional: bool = False

    def or_none(self) -> FieldKind:
        return FieldKind(f"{self.expected} or null", self.admits, optional=True)


def _integer(least: int, most: int) -> FieldKind:
    return FieldKind(
        f"an integer from {least} to {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def _number(expected: str, admits: Callable[[float], bool]) -> FieldKind:
    def is_admitted(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and admits(value)

    return FieldKind(expected, is_admitted)


def _list_of(item: FieldKind, plural: str, most: int) -> FieldKind:
    return FieldKind(
        f"a list of at most {most} {plural}",
        lambda value: isinstance(value, list | tuple) and len(value) <= most and all(map(item.admits, value)),
    )


MOST_LAYERS = 1024
MOST_EXPERTS = 8192
# Most experts in all layers of a model together; Kimi-K2 has 23,040. Names for so many are made in less than a second.
MOST_EXPERTS_OF_ALL_LAYERS = 1 << 16

_SIZE, _COUNT, _WINDOW = _integer(1, 1 << 20), _integer(0, MOST_EXPERTS), _integer(0, 1 << 40)
_FLAG = FieldKind("true or false", lambda value: isinstance(value, bool))
_NAME = FieldKind("a string", lambda value: isinstance(value, str))
_POSITIVE = _number("a positive number", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number that is not negative", lambda value: value >= 0)
_FINITE = _number("a finite number", math.isfinite)
_SHARE = _number("a number above 0 and up to 1", lambda value: 0 < value <= 1)
_NAMES, _NUMBERS = _list_of(_NAME, "strings", MOST_LAYERS), _list_of(_FINITE, "numbers", 1 << 16)
_LAYERS = _list_of(_integer(0, MOST_LAYERS), "layer indices", MOST_LAYERS)
_OBJECT = FieldKind("an object", lambda value: isinstance(value, Mapping))
_CONFIG = FieldKind("an object", lambda value: isinstance(value, Mapping) or hasattr(value, "to_dict"))
_LIMITS = FieldKind("two numbers", lambda value: isinstance(value, list | tuple) and len(value) == 2)

_BY_KIND: list[tuple[FieldKind, str]] = [
    (_SIZE, "hidden_size intermediate_size num_attention_heads moe_intermediate_size shared_expert_intermediate_size"),
    (_SIZE, "moe_shared_expert_intermediate_size kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (_SIZE, "ssm_state_size mamba_num_heads mamba_head_dim n_groups conv_kernel linear_key_head_dim linear_value_head_dim"),
    (_SIZE, "linear_num_key_heads linear_num_value_heads linear_conv_kernel_dim mamba_n_heads mamba_n_groups mamba_d_state"),
    (_SIZE, "mamba_d_head mamba_d_conv decoder_sparse_step moe_layer_interval moe_layer_freq"),
    (_SIZE.or_none(), "num_key_value_heads head_dim q_lora_rank moe_latent_size mamba_d_ssm"),
    (_integer(1, 1 << 26), "vocab_size"),
    (_integer(1, 1 << 40), "max_position_embeddings original_max_position_embeddings"),
    (_integer(1, MOST_LAYERS), "num_hidden_layers depth"),
    (_COUNT.or_none(), "n_shared_experts moe_num_shared_experts n_group topk_group num_mtp_modules num_nextn_predict_layers"),
    (_integer(0, MOST_LAYERS).or_none(), "num_mtp_layers first_k_dense_replace"),
    (_integer(1, MOST_EXPERTS), "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_k"),
    (_integer(0, MOST_LAYERS), "moe_layer_start_index"),
    (_integer(-1, 1 << 20), "moe_layer_end_index"),
    (_WINDOW.or_none(), "sliding_window"),
    (_FLAG, "tie_word_embeddings attention_bias mlp_bias use_bias qkv_bias attention_out_bias norm_topk_prob use_qk_norm"),
    (_FLAG, "use_conv_bias mamba_proj_bias mamba_conv_bias mamba_rms_norm mamba_norm_before_gate projectors_bias"),
    (_FLAG, "residual_in_fp32 rope_interleave use_routing_bias truncate is_encoder_decoder is_causal mrope_interleaved"),
    (_FLAG.or_none(), "use_bidirectional_attention use_sliding_window"),
    (_NAME, "hidden_act hidden_activation mlp_hidden_act mamba_hidden_act scoring_func topk_method qk_norm_type rope_type"),
    (_NAMES.or_none(), "layer_types mlp_layer_types layers_block_type"),
    (_LAYERS.or_none(), "mlp_only_layers"),
    (_NOT_NEGATIVE, "rms_norm_eps norm_eps layer_norm_epsilon initializer_range moe_norm_min low_freq_factor time_step_min"),
    (_POSITIVE, "query_pre_attn_scalar attention_multiplier logits_scaling rope_theta routed_scaling_factor"),
    (_POSITIVE, "high_freq_factor swiglu_limit"),
    (_FINITE, "embedding_multiplier residual_multiplier lm_head_multiplier key_multiplier attention_in_multiplier"),
    (_FINITE, "attention_out_multiplier ssm_in_multiplier ssm_out_multiplier swiglu_alpha llama_4_scaling_beta"),
    (_POSITIVE.or_none(), "attn_logit_softcapping final_logit_softcapping clip_qkv"),
    (_NOT_NEGATIVE.or_none(), "factor beta_fast beta_slow mscale mscale_all_dim attention_factor"),
    (_SHARE.or_none(), "partial_rotary_factor"),
    (_NUMBERS, "mlp_multipliers ssm_multipliers short_factor long_factor"),
    (_LIMITS, "time_step_limit"),
    (_OBJECT, "rope_parameters"),
    (_CONFIG, "text_config vision_config"),
    (_list_of(_OBJECT, "objects", MOST_LAYERS), "block_configs"),
    (_integer(0, 1 << 26).or_none(), "image_token_id image_token_index video_token_id audio_token_id"),
]
KINDS: dict[str, FieldKind] = {name: kind for kind, names in _BY_KIND for name in names.split()}


def check_value(name: str, value: Any, where: str = "") -> None:
    """Checks the value of a field that a family is about to read.

    Args:
        where: text before the name in the error, such as `LlamaForCausalLM: text_config.`.

    Raises:
        CheckpointError: the value is not allowed; the message names the field, the allowed values and the value.
    """
    kind = KINDS[name]
    if not (value is None and kind.optional) and not kind.admits(value):
        raise CheckpointError(f"{where}{name}={_shortened(value)} in the config; expected {kind.expected}")


def check_values(values: Any, where: str = "") -> None:
    """Checks every field of a config.json whose kind is known, and those of the objects in it. A field that is null or absent
    takes the default of the model's class.

    Raises:
        CheckpointError: a value is not allowed; the message names the field, the allowed values and the value.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"a config is a JSON object; found {_shortened(values)}")
    for name, value in values.items():
        if value is not None and name in KINDS:
            check_value(name, value, where)
        if name.endswith("_config") and isinstance(value, Mapping):
            check_values(value, f"{where}{name}.")


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list inside of itself
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:80]}..."
