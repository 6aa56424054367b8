"""Hugging Face checkpoints on disk, read lazily: tensors are views of mapped files, and only touched pages are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mbridge_rl.core.errors import CheckpointError, StateMismatchError, listed

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by `hf_name`, mapped read-only from its safetensors files.

    Raises:
        CheckpointError: no safetensors files, a file that the index names is missing, or a truncated or corrupt file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = {}
        self._file_of: dict[str, str] = {}
        for name in _file_names(self.directory):
            opened = self._files[name] = _open(self.directory / name)
            self._file_of.update(dict.fromkeys(opened.keys(), name))
        _check_index(self.directory, self._file_of)

    def __getitem__(self, hf_name: str) -> Tensor:
        return self._files[self._file_of[hf_name]].get_tensor(hf_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _file_names(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give the folder of a Hugging Face checkpoint")
    index = directory / INDEX_FILE
    if index.exists():
        return sorted(set(_weight_map(index).values()))
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}; download or save the checkpoint again") from error


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, though the index names it; download the checkpoint again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); download or save it again") from error


def _check_index(directory: Path, file_of: dict[str, str]) -> None:
    index = directory / INDEX_FILE
    if index.exists() and (absent := set(_weight_map(index)) - set(file_of)):
        raise StateMismatchError(f"{index} names tensors that its files do not hold: {listed(absent)}")
