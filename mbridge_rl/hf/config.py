"""Configs and the other small files of a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.hf.publish import put_back

# What lies beside the weights and belongs to the model: tokenizer, chat template, generation defaults, code.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)

# Model types that Transformers does not know by name, though it knows what they are.
_SAME_AS = {"kimi_k2": "deepseek_v3"}
# And one that has its own class, here: it keeps its `auto_map`, by which others find the repository's code.
_NEMOTRON_NAS = "nemotron-nas"


def local_directory(path: str | Path) -> Path:
    """`path` if it is a directory (or was, when a save into it was interrupted), else the local snapshot of the hub repository
    of that name.

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
    """The Transformers config of a checkpoint directory.

    Raises:
        CheckpointError: there is no config.json, or Transformers cannot read it.
    """
    from transformers import AutoConfig

    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        values = json.loads((directory / "config.json").read_text())
        return (
            parse_config(values)
            if values.get("model_type") in (*_SAME_AS, _NEMOTRON_NAS)
            else AutoConfig.from_pretrained(directory)
        )
    except Exception as error:  # Transformers' own validation raises many types; all of them mean this
        raise CheckpointError(f"{directory}/config.json: Transformers cannot read it: {error}") from error


def parse_config(values: Mapping[str, Any]) -> Any:
    """The Transformers config that the contents of a config.json stand for, without the code of its repository."""
    from transformers import CONFIG_MAPPING

    if values["model_type"] == _NEMOTRON_NAS:
        from mbridge_rl.hf.nemotron_nas import NemotronNasConfig

        return NemotronNasConfig.from_dict(dict(values))
    model_type = _SAME_AS.get(values["model_type"], values["model_type"])
    plain = {name: value for name, value in values.items() if name != "auto_map"}
    return CONFIG_MAPPING[model_type].from_dict({**plain, "model_type": model_type})


def save_config(hf_config: Any, directory: Path, dtype: torch.dtype) -> None:
    """Writes config.json, its dtype that of the saved weights, which are never quantized."""
    saved = copy.deepcopy(hf_config)
    for config in (saved, saved.get_text_config()):
        for field in ("quantization_config", "compression_config"):
            if getattr(config, field, None) is not None:
                delattr(config, field)
    saved.dtype = dtype
    saved.save_pretrained(directory)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation files, whichever exist."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)
