"""PEFT adapters on disk: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from mbridge_rl.core.adapters import PEFT_PREFIX, LoRAConfig, equal_tensors, module_name, peft_modules, targets_of
from mbridge_rl.core.errors import CheckpointError, StateMismatchError, UnsupportedModelError, listed
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.writer import ShardFile, shard_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

# What changes the meaning of the factors, and the values under which it does not; an absent field has its first one.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base weights, too
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    **dict.fromkeys(("modules_to_save", "layer_replication", "trainable_token_indices"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"), (None,)),
}


def open_adapter(directory: str | Path) -> Checkpoint:
    """The adapter's tensors by PEFT name.

    Raises:
        CheckpointError: there are none, or the file is corrupt.
    """
    return Checkpoint(directory, ADAPTER_FILE)


def read_lora_config(spec: ModelSpec, directory: str | Path) -> LoRAConfig:
    """The config under which the adapter of `directory` can be attached and loaded: canonical, its targets taken from the
    tensors that are there.

    Raises:
        CheckpointError: there is no readable adapter; UnsupportedModelError: it is more than LoRA on linears, and what;
            StateMismatchError: it adapts modules that the model does not have.
    """
    path = Path(directory) / ADAPTER_CONFIG
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        rank, alpha = int(said["r"]), float(said["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of a LoRA adapter: {error!r}") from error
    for name, plain in _PLAIN.items():
        if said.get(name, plain[0]) not in plain:
            raise UnsupportedModelError(f"{path}: {name}={said[name]!r} is not supported; only {name}={plain[0]!r} is")
    modules = {module_name(module_name(name.removeprefix(PEFT_PREFIX))) for name in open_adapter(directory)}
    linears = {module_name(hf_name) for hf_name in spec.hf_shapes}
    if unknown := modules - linears:
        raise StateMismatchError(f"{directory} adapts what {spec.architecture} does not have: {listed(unknown)}")
    _require_one_rank(said, modules, path)
    return LoRAConfig(rank, alpha, targets_of(spec, modules), canonical=True, rslora=bool(said.get("use_rslora")))


def _require_one_rank(said: Mapping[str, Any], modules: Set[str], path: Path) -> None:
    """Ranks and scales of single modules are refused; PEFT also writes patterns that match none."""
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (said.get(name) or {}).items():
            if special := [module for module in modules if re.match(rf"(.*\.)?({pattern})$", module)]:
                raise UnsupportedModelError(
                    f"{path}: {name} gives {pattern} the value {value}, and all adapters must have one rank and one alpha: "
                    f"found {listed(special)}"
                )


def adapter_file(tensors: Sequence[HFTensor]) -> ShardFile:
    """The one file of an adapter."""
    return shard_file(ADAPTER_FILE, tensors)


def write_lora_config(spec: ModelSpec, adapters: ModelSpec, config: LoRAConfig, base: str | None, directory: Path) -> None:
    """Writes `adapter_config.json`.

    Args:
        spec, adapters: of the base model and of its adapters.
        base: name or path of the base model, for whoever loads the adapter.
    """
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": _target_modules(spec, adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _target_modules(spec: ModelSpec, adapters: ModelSpec) -> list[str]:
    """Last names of the adapted linears, or full ones where a last name would adapt others, too."""
    modules = peft_modules(adapters)
    wanted = {name.rpartition(".")[2] for name in modules}
    others = {module_name(hf_name) for hf_name in spec.hf_shapes} - set(modules)
    ambiguous = {name.rpartition(".")[2] for name in others} & wanted
    return sorted({name if (last := name.rpartition(".")[2]) in ambiguous else last for name in modules})


def require_loadable(adapters: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks that parts of a fused linear that share one `A` here have equal ones in `tensors`.

    Raises:
        StateMismatchError: naming the tensors that differ.
    """
    for hf_names in equal_tensors(adapters):
        first = tensors[hf_names[0]]
        differing = [hf_name for hf_name in hf_names[1:] if not first.equal(tensors[hf_name])]
        if differing:
            raise StateMismatchError(
                f"{where}: {hf_names[0]} is another than {listed(differing)}, and the model's adapters share one A: "
                f"attach them with canonical=True. Nothing was changed"
            )
