"""Another legal value for every field of a config: what the sweep of `test_config_fields.py` sets, one field at a time.

Most values follow from the field's type. Fields that only some values suit (sizes that must divide, lists as long as the model
is deep, names of functions) or that need another field beside them are listed here by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from families.family import Family


@dataclass(frozen=True)
class Change:
    """Fields of a family's config that are set together, so that `field` has another value.

    Attributes:
        field: by its path, such as `text_config.sliding_window` or `rope_parameters.factor`.
        inside: the config that the fields are in, such as `text_config`; `None` for the outermost.
    """

    field: str
    values: Mapping[str, Any]
    inside: str | None = None

    @property
    def names(self) -> set[str]:
        """Any of these in an error says which field was refused."""
        own = {self.field.rpartition(".")[2], *self.values}
        return own | {other for name in own for other in _STANDS_FOR.get(name, ())}

    def applied(self, family: Family) -> Family:
        config = {**family.base, **family.config}
        if self.inside is None:
            config |= self.values
        else:
            config[self.inside] = {**config.get(self.inside, {}), **self.values}
        return dataclasses.replace(family, base={}, config=config)


# Other names of a field, which an error may use.
_STANDS_FOR = {
    "moe_k": ("num_experts_per_tok",),
    "num_local_experts": ("num_experts", "experts"),
    "sliding_window_pattern": ("layer_types",),
    "use_sliding_window": ("layer_types",),
    # Nemotron-H's older names
    "mamba_n_groups": ("n_groups",),
    "mamba_d_conv": ("conv_kernel",),
    "mamba_conv_bias": ("use_conv_bias",),
}

Values = Callable[[Any], list[Any]]
ACTIVATIONS = ["gelu", "gelu_pytorch_tanh", "relu2", "silu", "relu"]
FLAT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SCALED_ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
# Fields without which a model cannot be built, or not be tested, whatever the type.
_KEPT_IN_ROPE = ("partial_rotary_factor", "llama_4_scaling_beta", "mrope_section", "mrope_interleaved")
# Fields of YaRN, each another value than its default.
YARN = {"beta_fast": 2.0, "beta_slow": 0.5, "attention_factor": 0.7, "mscale": 0.6, "mscale_all_dim": 0.9, "truncate": False}


def _alternating(first: str, second: str) -> Values:
    return lambda config: [[(first, second)[layer % 2] for layer in range(config.num_hidden_layers)]]


def _windows(config: Any) -> list[Any]:
    """Some layers with a window, where the class has both."""
    if not hasattr(config, "sliding_window"):
        return []
    kinds = ["sliding_attention" if layer % 2 else "full_attention" for layer in range(config.num_hidden_layers)]
    more = {"use_sliding_window": True} if hasattr(config, "use_sliding_window") else {}
    return [{"layer_types": kinds, "sliding_window": 3, **more}]


def _layer_types(config: Any) -> list[Any]:
    present = config.layer_types
    if "linear_attention" in present:
        return [list(reversed(present)), ["linear_attention"] * len(present)]
    return _windows(config)


def _cut(config: Any) -> list[Any]:
    """One layer less, also in the lists that have an entry for each."""
    layers = config.num_hidden_layers - 1
    lists = ("layer_types", "mlp_layer_types", "block_configs")
    given = {name: getattr(config, name)[:layers] for name in lists if getattr(config, name, None)}
    fields = {field.name for field in dataclasses.fields(config)}
    return [{"num_hidden_layers": layers, **{name: value for name, value in given.items() if name in fields}}]


def _heads(config: Any) -> list[Any]:
    latent = {"num_key_value_heads": 2} if hasattr(config, "kv_lora_rank") else {}
    return [{"num_attention_heads": 2, **latent}, {"num_attention_heads": 8}]


def _groups(config: Any) -> list[Any]:
    more = {"topk_method": "group_limited_greedy"} if hasattr(config, "topk_method") else {}
    return [{"n_group": 2, "topk_group": 1, **more}, {"n_group": 3, "topk_group": 2, **more}]


def _rope(config: Any) -> list[Any]:
    return []  # `_rope_changes` goes through its fields


def _fixed(*values: Any) -> Values:
    return lambda config: list(values)


BY_NAME: dict[str, Values] = {
    "architectures": _fixed(),  # says which family the config is of
    "text_config": _fixed(),
    "vision_config": _fixed(),
    "audio_config": _fixed(),
    "rope_parameters": _rope,
    "dtype": _fixed("bfloat16"),
    "id2label": _fixed({0: "a", 1: "b", 2: "c"}),
    "label2id": _fixed({"a": 0, "b": 1, "c": 2}),
    "problem_type": _fixed("regression"),
    "transformers_version": _fixed("4.0.0"),
    "vocab_size": _fixed(611),
    "hidden_size": lambda config: [config.hidden_size + 32],
    "intermediate_size": _fixed(160),
    "num_hidden_layers": _cut,
    "num_attention_heads": _heads,
    "num_key_value_heads": _fixed(1, 4),
    "head_dim": _fixed(16),
    "hidden_act": _fixed(*ACTIVATIONS),
    "hidden_activation": _fixed(*ACTIVATIONS),
    "mlp_hidden_act": _fixed(*ACTIVATIONS),
    "mamba_hidden_act": _fixed("gelu"),
    "rms_norm_eps": _fixed(0.1),
    "norm_eps": _fixed(0.1),
    "layer_norm_epsilon": _fixed(0.1),
    "sliding_window": lambda config: [3, *_windows(config)],
    "use_sliding_window": _fixed({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "max_window_layers": _fixed({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "layer_types": _layer_types,
    "layers_block_type": lambda config: [list(reversed(config.layers_block_type))],
    "mtp_layers_block_type": _fixed(["full_attention"]),
    "sliding_window_pattern": _fixed({"sliding_window_pattern": 2, "layer_types": None}),
    "mlp_layer_types": _alternating("sparse", "dense"),
    "mlp_only_layers": _fixed([0, 2]),
    "first_k_dense_replace": _fixed(2, 0),
    "moe_layer_start_index": _fixed(2, 0),
    "moe_layer_end_index": _fixed(1),
    "moe_num_experts": _fixed(4),
    "moe_norm_min": _fixed(0.9),
    "n_group": _groups,
    "topk_group": _groups,
    "topk_method": _groups,
    "num_experts_per_tok": _fixed(1, 2, 3),
    "moe_k": _fixed(1, 3),
    "q_lora_rank": lambda config: [None if config.q_lora_rank else 24],
    "moe_latent_size": _fixed(48),
    "clip_qkv": _fixed(0.3),
    "attn_logit_softcapping": _fixed(1.5, None),
    "final_logit_softcapping": _fixed(1.5, None),
    "query_pre_attn_scalar": _fixed(7),
    "swiglu_limit": _fixed(0.4),
    "time_step_limit": _fixed([0.2, 0.3]),
    "mamba_n_heads": _fixed({"mamba_n_heads": 24, "mamba_d_head": 4}),
    "mamba_d_head": _fixed({"mamba_n_heads": 24, "mamba_d_head": 4}),
    "mamba_d_ssm": _fixed({"mamba_d_ssm": 192, "mamba_n_heads": 24}),
    "mamba_n_groups": _fixed(2),
    "mamba_num_heads": _fixed(16),
    "n_groups": _fixed(2),
    "mamba_norm_before_gate": _fixed(False, {"mamba_norm_before_gate": False, "mamba_rms_norm": True}),
    "mamba_rms_norm": _fixed({"mamba_norm_before_gate": False, "mamba_rms_norm": True}),
    "mlp_multipliers": _fixed([0.5, 1.5]),
    "ssm_multipliers": _fixed([1.2, 1.1, 0.9, 0.8, 0.7]),
    "linear_num_key_heads": _fixed(2),
    "linear_num_value_heads": _fixed(4),
    "fullatt_block_indexes": _fixed([0]),
    "deepstack_visual_indexes": _fixed([1, 0]),
    "block_configs": lambda config: [list(reversed(config.block_configs))],
    "audio_token_id": _fixed(509),
    "video_token_id": _fixed(510),
    "image_token_id": _fixed(511),
    "image_token_index": _fixed(511),
    "force_image_size": _fixed(64),
}
# Fields that some models of Transformers look for though their config class has none, and other spellings of a field.
ANYWHERE: dict[str, Any] = {
    "head_dim": 16,
    "is_causal": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 77.0,
    "rotary_dim": 8,
    "per_layer_config": {1: {"intermediate_size": 48}},
}


def changes_of(family: Family) -> Iterator[Change]:
    """For every field of the config's class, and of the classes of configs inside of it, its other values."""
    config = family.hf_config()
    yield from _changes(config, None)
    for inside in type(config).sub_configs:
        nested = getattr(config, inside, None)
        if dataclasses.is_dataclass(nested):
            yield from _changes(nested, inside)


def language_part(family: Family) -> tuple[Any, str | None]:
    """The config of the language model, and where it is in the family's."""
    config = family.hf_config()
    return (config.text_config, "text_config") if "text_config" in type(config).sub_configs else (config, None)


def foreign_fields(family: Family, families: Mapping[str, Family]) -> dict[str, Any]:
    """Fields that other families' language models have and this one's doesn't, each with a value other than that family's."""
    own, _ = language_part(family)
    names = {*vars(own), *(field.name for field in dataclasses.fields(own)), *type(own).attribute_map, *ANYWHERE}
    fields: dict[str, Any] = {}
    for other in families.values():
        config, _ = language_part(other)
        for change in _changes(config, None):
            if "." not in change.field and change.field not in names and hasattr(config, change.field):
                fields.setdefault(change.field, change.values[change.field])
    return fields


def _changes(config: Any, inside: str | None) -> Iterator[Change]:
    prefix = f"{inside}." if inside else ""
    for field in dataclasses.fields(config):
        present = getattr(config, field.name)
        for value in BY_NAME.get(field.name, _typed(field))(config):
            values = value if isinstance(value, dict) and field.name in value else {field.name: value}
            if values[field.name] != present or len(values) > 1:
                yield Change(f"{prefix}{field.name}", values, inside)
        if field.name == "rope_parameters" and present:
            for name, parameters in _rope_changes(present):
                yield Change(f"{prefix}rope_parameters.{name}", {"rope_parameters": parameters}, inside)


def _typed(field: dataclasses.Field[Any]) -> Values:
    """Another value of the same type; of the annotated one where there is none."""

    def values(config: Any) -> list[Any]:
        present, annotation = getattr(config, field.name), str(field.type)
        if isinstance(present, bool):
            return [not present]
        if isinstance(present, int):
            return [2 * present or 1]
        if isinstance(present, float):
            return [2 * present or 0.5]
        if present is None:
            named = {"bool": True, "int": 3, "float": 0.5, "str": "other"}
            return [value for name, value in named.items() if name in annotation][:1]
        return ["other"] if isinstance(present, str) else []

    return values


def _rope_changes(present: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changed fields of rotary parameters: flat ones, or of each kind of layers."""
    kinds = [name for name, value in present.items() if isinstance(value, Mapping)]
    for kind in kinds:
        for name, parameters in _flat_rope_changes(present[kind]):
            yield f"{kind}.{name}", {**present, kind: parameters}
    if not kinds:
        yield from _flat_rope_changes(present)


def _flat_rope_changes(present: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "rope_theta", {**present, "rope_theta": 55.0}
    yield "partial_rotary_factor", {**present, "partial_rotary_factor": 0.5}
    more = {name: present[name] for name in _KEPT_IN_ROPE if name in present}
    for rope_type, fields in SCALED_ROPE.items():
        plain = {**FLAT_ROPE, **more, "rope_type": rope_type, **fields}
        yield "rope_type", plain
        for name, value in fields.items():
            yield name, {**plain, name: 2 * value}
    yarn = {**FLAT_ROPE, **more, "rope_type": "yarn", **SCALED_ROPE["yarn"]}
    for name, value in YARN.items():
        yield name, {**yarn, name: value}
    yield "mscale_all_dim", {**yarn, "mscale": 0.6, "mscale_all_dim": 0.9}
    yield "rope_type", {"rope_type": "default", "rope_theta": 1e4, **more}
    if "mrope_section" in present:
        yield "mrope_section", {**present, "mrope_section": list(reversed(present["mrope_section"]))}
    if "llama_4_scaling_beta" in present:
        yield "llama_4_scaling_beta", {**present, "llama_4_scaling_beta": 0.5}
