"""Reads and writes the config and the other small files of a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.config_fields import check_values
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.hf.publish import put_back
from mbridge_rl.hf.versions import check_release

# Files beside the weights that belong to the model: tokenizer, chat template, generation defaults, code.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)

# Model types that Transformers does not know by name, with the known type that they are.
_SAME_AS = {"kimi_k2": "deepseek_v3"}
# A model type with a class of its own here: it keeps its `auto_map`, by which other programs find the repository's code.
_NEMOTRON_NAS = "nemotron-nas"


def local_directory(path: str | Path) -> Path:
    """`path` if it is a directory (or was one before a save into it was interrupted), otherwise the local snapshot of the hub
    repository of that name.

    Raises:
        CheckpointError: neither exists.
    """
    if Path(path).is_dir() or put_back(Path(path)):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path} is neither a directory nor a repository that the hub gives: {error}") from error


def load_config(directory: Path) -> Any:
    """The Transformers config of a checkpoint directory. Code in the directory is never run.

    Raises:
        CheckpointError: there is no config.json, a field of it has an impossible value, or Transformers has no class for it or
            cannot read it.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text(), object_hook=_special_floats)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON file: {error}") from error
    try:
        config = parse_config(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    config.name_or_path = str(directory)
    return config


def parse_config(values: Any) -> Any:
    """Makes the Transformers config from the contents of a config.json, with Transformers' own class for its `model_type`: the
    code of its repository, which `auto_map` names, is never run.

    Raises:
        CheckpointError: a field has an impossible value (the message has its name, its value and the allowed values), or
            Transformers has no class for the model or cannot make the config.
        ImportError: the installed Transformers is too old.
    """
    check_release()
    from transformers import CONFIG_MAPPING

    check_values(values)
    model_type = values.get("model_type")
    known = _SAME_AS.get(model_type, model_type) if isinstance(model_type, str) else None
    if known != _NEMOTRON_NAS and known not in CONFIG_MAPPING:
        raise CheckpointError(
            f"Transformers cannot read it: it has no class for model_type={model_type!r}; code that a checkpoint brings "
            "(auto_map) is never run"
        )
    try:
        if known == _NEMOTRON_NAS:
            from mbridge_rl.hf.nemotron_nas import NemotronNasConfig

            return NemotronNasConfig.from_dict(dict(values))
        # A renamed model's config is saved with the class's model_type, for which the repository's code is not made.
        renamed = {**values, "model_type": known} if known == model_type else _without_code(values, known)
        return CONFIG_MAPPING[known].from_dict(copy.deepcopy(renamed))
    except Exception as error:  # Transformers' own validation raises many types of errors
        raise CheckpointError(f"Transformers cannot read it: {error!r}") from error


def _without_code(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    return {**{name: value for name, value in values.items() if name != "auto_map"}, "model_type": model_type}


def _special_floats(values: dict[str, Any]) -> Any:
    """Reads numbers that JSON does not have in the form in which Transformers writes them: `{"__float__": "Infinity"}`."""
    tag = values.get("__float__") if len(values) == 1 else None
    return float(tag) if tag in ("Infinity", "-Infinity", "NaN") else values


def save_config(hf_config: Any, directory: Path, dtype: torch.dtype) -> None:
    """Writes config.json with the dtype of the saved weights, which are never quantized."""
    saved = copy.deepcopy(hf_config)
    for config in (saved, saved.get_text_config()):
        for field in ("quantization_config", "compression_config"):
            if getattr(config, field, None) is not None:
                delattr(config, field)
    saved.dtype = dtype
    saved.save_pretrained(directory)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer and generation files that exist."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)
