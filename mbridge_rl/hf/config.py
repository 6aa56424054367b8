"""Configs and the other small files of a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.errors import CheckpointError

# What lies beside the weights and belongs to the model: tokenizer, chat template, generation defaults.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*", "generation_config.json")


def local_directory(path: str | Path) -> Path:
    """`path` if it is a directory, else the local snapshot of the hub repository of that name.

    Raises:
        CheckpointError: neither exists.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
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
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # Transformers' own validation raises many types; all of them mean this
        raise CheckpointError(f"{directory}/config.json: Transformers cannot read it: {error}") from error


def save_config(hf_config: Any, directory: Path, dtype: torch.dtype) -> None:
    """Writes config.json, its dtype that of the saved weights, which are never quantized."""
    saved = copy.deepcopy(hf_config)
    if getattr(saved, "quantization_config", None) is not None:
        del saved.quantization_config
    saved.dtype = dtype
    saved.save_pretrained(directory)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation files, whichever exist."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)
