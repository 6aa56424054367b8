"""Checks which files of a checkpoint directory are its weights. A directory is refused if Transformers, vLLM and this library
would read different files.

Transformers reads `model.safetensors` if it exists, whatever the index says. vLLM reads the files that the index names. If a
tensor is in several of these files, both use the copy in the last file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from mbridge_rl.core.errors import CheckpointError, listed

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def require_one_set(directory: Path, weight_map: Mapping[str, str]) -> None:
    """Checks that the single file and the index do not name different files.

    Args:
        weight_map: the file of each tensor, from the index.

    Raises:
        CheckpointError: `model.safetensors` exists, and the index names other files.
    """
    others = set(weight_map.values()) - {SINGLE_FILE}
    if others and (directory / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{directory} holds {SINGLE_FILE} and also {INDEX_FILE}, which names {listed(others)}: Transformers reads the "
            f"former, vLLM the latter. Remove the one that is not the model: {SINGLE_FILE}, or {INDEX_FILE} with its files"
        )


def require_one_copy(directory: Path, tensors: Mapping[str, Collection[str]]) -> None:
    """Checks that every tensor is in only one file.

    Args:
        tensors: names of the tensors in each file.

    Raises:
        CheckpointError: a tensor is in two files.
    """
    file_of: dict[str, str] = {}
    for file, hf_names in tensors.items():
        if twice := file_of.keys() & set(hf_names):
            first = min(twice)
            raise CheckpointError(
                f"{directory}: {listed(twice)} lie in {file} and in {file_of[first]}, and which copy is read depends on the "
                f"program: save the checkpoint again"
            )
        file_of.update(dict.fromkeys(hf_names, file))


def require_safetensors(directory: Path) -> None:
    """Checks that `model.safetensors` exists.

    Raises:
        CheckpointError: it does not; if the weights are pickled files, the message says how to convert them.
    """
    if (directory / SINGLE_FILE).exists():
        return
    if pickled := next((name for name in _PICKLED if (directory / name).exists()), None):
        raise CheckpointError(
            f"{directory} holds {pickled}, and only safetensors checkpoints are read. Convert it with Transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained(another_directory)"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read")
