"""PEFT adapters on disk: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torch import Tensor

from mbridge_rl.core.adapter_targets import adapted_rules, adapted_spec, linear_name, targets_of
from mbridge_rl.core.adapters import PEFT_PREFIX, adapted_linears, equal_tensors
from mbridge_rl.core.errors import CheckpointError, StateMismatchError, UnsupportedModelError, listed
from mbridge_rl.core.lora_config import MAX_RANK, LoRAConfig
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.patterns import PatternError, pattern_matches
from mbridge_rl.core.typed_values import Positive, Range, shown
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.json_files import from_json, read_json_object
from mbridge_rl.hf.writer import ShardFile, shard_file

T = TypeVar("T")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

_FACTOR = re.compile(r"\.(lora_[AB]\.weight|lora_magnitude_vector)$")
_STACK = re.compile(r"\.experts(\.base_layer)*$")

# Fields that may change the meaning of the factors, with the values for which they do not. An absent field has the first value.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base weights, too
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    **dict.fromkeys(("modules_to_save", "layer_replication", "trainable_token_indices"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"), (None,)),
}


Rank = Annotated[int, Range(1, MAX_RANK)]


@dataclass(frozen=True)
class _AdapterConfig:
    """The fields that are read from `adapter_config.json`, besides `_PLAIN`. The adapted modules are not read from it: they
    follow from the names of the tensors."""

    r: Rank
    lora_alpha: Positive
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_dropout: Annotated[float, Range(least=0.0, below=1.0)] | None = None
    rank_pattern: Mapping[str, Rank] | None = None
    alpha_pattern: Mapping[str, Positive] | None = None
    target_parameters: list[str] | None = None


def open_adapter(directory: str | Path) -> Checkpoint:
    """The adapter's tensors by PEFT name.

    Raises:
        CheckpointError: there is no adapter, or its file is corrupt.
    """
    return Checkpoint(directory, ADAPTER_FILE)


def read_lora_config(spec: ModelSpec, directory: str | Path) -> LoRAConfig:
    """The config with which the adapter in `directory` can be attached and loaded: it is canonical, and its targets follow from
    the adapter's tensors.

    Raises:
        CheckpointError: there is no readable adapter.
        UnsupportedModelError: the adapter is more than LoRA on linears (the message names the feature), gives parts of one
            fused linear different ranks, or adapts only some experts of a layer.
        StateMismatchError: the adapter adapts modules that the model does not have.
    """
    path = Path(directory) / ADAPTER_CONFIG
    values = read_json_object(path)
    if str(values.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UnsupportedModelError(
            f"{path}: init_lora_weights={shown(values['init_lora_weights'])} changed the base weights at first: save the "
            f"adapter with save_pretrained(path_initial_model_for_weight_conversion=...), which makes it one of weights as "
            f"they were"
        )
    for name, plain in _PLAIN.items():
        if values.get(name, plain[0]) not in plain:
            raise UnsupportedModelError(f"{path}: {name}={shown(values[name])} is not supported; only {name}={plain[0]!r} is")
    fields = from_json(values, _AdapterConfig, str(path))
    modules = {_FACTOR.sub("", name.removeprefix(PEFT_PREFIX)) for name in open_adapter(directory)}
    stacks = {module for module in modules if _STACK.search(module)}
    config = LoRAConfig(
        fields.r,
        fields.lora_alpha,
        canonical=True,
        rslora=bool(fields.use_rslora),
        dora=bool(fields.use_dora),
        dropout=fields.lora_dropout or 0.0,
        stacked_experts=bool(stacks),
    )
    hf_names = set(adapted_spec(spec, config).hf_shapes)
    linears = {linear_name(hf_name) for hf_name in hf_names}
    if stacks:
        parents = {_STACK.sub(".experts", stack) for stack in stacks}
        parameters = {name for name in linears & hf_names if name.rpartition(".")[0] in parents}
        modules = modules - stacks | _targeted(fields.target_parameters or (), parameters)
    if base := sorted(module for module in modules if module.endswith((".base_layer.weight", ".base_layer.bias"))):
        raise UnsupportedModelError(
            f"{directory} holds weights of the base model beside adapters ({listed(base)}): save it with "
            f"save_pretrained(save_embedding_layers=False)"
        )
    if embeddings := sorted(module for module in modules if "lora_embedding_" in module):
        raise UnsupportedModelError(f"{directory} has adapters of embeddings, which are not supported: {listed(embeddings)}")
    if unknown := modules - linears:
        raise StateMismatchError(f"{directory} adapts what {spec.architecture} does not have: {listed(unknown)}")
    targets, layers = targets_of(adapted_spec(spec, config), modules)
    config = replace(config, targets=targets, layers=layers)
    # PEFT also writes patterns that match nothing.
    config = replace(
        config,
        rank_pattern=_matching(fields.rank_pattern or {}, modules, f"{path}: rank_pattern"),
        alpha_pattern=_matching(fields.alpha_pattern or {}, modules, f"{path}: alpha_pattern"),
    )
    adapted_rules(adapted_spec(spec, config), config)
    return config


def _targeted(target_parameters: Sequence[str], parameters: Set[str]) -> set[str]:
    """The `parameters` that PEFT's `target_parameters` name, by their full names or the ends of their names."""
    return {name for name in parameters if any(name == target or name.endswith(f".{target}") for target in target_parameters)}


def _matching(patterns: Mapping[str, T], modules: Set[str], where: str) -> dict[str, T]:
    """The patterns that match a module.

    Raises:
        CheckpointError: a pattern is no regular expression, or takes too long to match.
    """
    try:
        return {
            pattern: value for pattern, value in patterns.items() if any(pattern_matches(pattern, module) for module in modules)
        }
    except PatternError as error:
        raise CheckpointError(f"{where}: {error}") from error


def adapter_file(tensors: Sequence[HFTensor]) -> ShardFile:
    """The single file of an adapter."""
    return shard_file(ADAPTER_FILE, tensors)


def write_lora_config(spec: ModelSpec, config: LoRAConfig, base: str | None, directory: Path) -> None:
    """Writes `adapter_config.json`.

    Args:
        spec: the spec of the base model.
        base: name or path of the base model, which is written to the config.
    """
    parameters, modules = _targets_in_peft(spec, config)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.peft_rank,
        "lora_alpha": config.peft_alpha,
        **patterns_in_peft(spec, config),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def patterns_in_peft(spec: ModelSpec, config: LoRAConfig) -> dict[str, dict[str, float]]:
    """PEFT's `rank_pattern` and `alpha_pattern`, without empty ones. No two keys match the same linear, since `peft` does not
    preserve their order.

    Args:
        spec: the spec of the base model.
    """
    adapted = adapted_linears(spec, config)
    values = {
        "rank_pattern": _pattern({name: own.peft_rank for name, own in adapted.items()}, config.peft_rank),
        "alpha_pattern": _pattern({name: own.peft_alpha for name, own in adapted.items()}, config.peft_alpha),
    }
    return {name: pattern for name, pattern in values.items() if pattern}


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The values that are not the default: by the last name of the linears if all linears of that name have one value,
    otherwise by full names."""
    values_of_last_name: dict[str, set[float]] = {}
    for name, value in values.items():
        values_of_last_name.setdefault(_last(name), set()).add(value)
    return {
        _last(name) if len(values_of_last_name[_last(name)]) == 1 else name: value
        for name, value in values.items()
        if value != default
    }


def _targets_in_peft(spec: ModelSpec, config: LoRAConfig) -> tuple[list[str], list[str]]:
    """The adapted parameters (of stacked experts) and modules: by their last names, or by full names where a last name would
    match other linears, too."""
    adapted = adapted_linears(spec, config)
    hf_names = adapted_spec(spec, config).hf_shapes
    others = {linear_name(hf_name) for hf_name in hf_names} - set(adapted)
    ambiguous = {_last(name) for name in others} & {_last(name) for name in adapted}
    short = {name: name if _last(name) in ambiguous else _last(name) for name in adapted}
    modules = {name for name in adapted if f"{name}.weight" in hf_names}
    parameters = {name if name != _last(name) else f"experts.{name}" for full, name in short.items() if full not in modules}
    return sorted(parameters), sorted({name for full, name in short.items() if full in modules})


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def require_loadable(adapters: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks that parts of a fused linear that share one `A` in the model have equal `A` in `tensors`.

    Raises:
        StateMismatchError: they differ; the message names the tensors.
    """
    for hf_names in equal_tensors(adapters):
        first = tensors[hf_names[0]]
        differing = [hf_name for hf_name in hf_names[1:] if not first.equal(tensors[hf_name])]
        if differing:
            raise StateMismatchError(
                f"{where}: {hf_names[0]} is another than {listed(differing)}, and the model's adapters share one A: "
                f"attach them with canonical=True. Nothing was changed"
            )
