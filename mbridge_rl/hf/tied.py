"""Handles the different ways in which checkpoints store tied embeddings.

A tied model's output layer is its embedding, and its checkpoint holds that tensor once, under the embedding's name. Some
checkpoints hold it under the output layer's name alone, or under both names. If the two tensors differ, the config is wrong,
and the model has a separate output layer. Transformers and vLLM compare the two tensors to decide this, and so does this
module. `ModelSpec.aliases` names the pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.model import ModelSpec

T = TypeVar("T")

_ROWS = 4096  # rows of two tensors of different dtypes that are compared at a time


class Renamed(Mapping[str, T]):
    """Tensors, or their descriptions, of which some have an additional name.

    Args:
        names: `{additional name: name in tensors}`.
    """

    def __init__(self, tensors: Mapping[str, T], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, hf_name: str) -> T:
        return self._tensors[self._names.get(hf_name, hf_name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors
        yield from self._names

    def __len__(self) -> int:
        return len(self._tensors) + len(self._names)


def missing_names(spec: ModelSpec, names: Mapping[str, Any]) -> dict[str, str]:
    """`{hf_name: alias}` of the tensors that `names` has only under their alias."""
    return {hf_name: alias for alias, hf_name in spec.aliases.items() if alias in names and hf_name not in names}


def add_missing_names(spec: ModelSpec, entries: MutableMapping[str, Any]) -> None:
    """Adds entries that exist only under an alias under their own name, too."""
    entries.update({hf_name: entries[alias] for hf_name, alias in missing_names(spec, entries).items()})


def require_tied(spec: ModelSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks that tensors that are stored under two names are equal.

    Raises:
        StateMismatchError: they differ, so that this model would lose one of them.
    """
    for alias, hf_name in own_tensors(spec, tensors).items():
        raise StateMismatchError(
            f"{where} holds a {alias} that is not {hf_name}, and this model was built tied (tie_word_embeddings), so that it "
            f"has one tensor for both. Make the bridge with AutoBridge.from_pretrained from a directory that holds both (it "
            f"builds an output layer of its own then), or from a config with tie_word_embeddings=False. Nothing was changed"
        )


def own_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`{alias: hf_name}` of the aliases whose tensor exists and differs from the tensor of the name."""
    return {
        alias: hf_name
        for alias, hf_name in spec.aliases.items()
        if alias in tensors and hf_name in tensors and not same_values(tensors[alias], tensors[hf_name])
    }


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN included. Tensors of different dtypes are compared in fp32."""
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype:
        return torch.equal(_bits(first), _bits(second))
    rows = range(0, first.shape[0] if first.dim() else 1, _ROWS)
    return all(torch.equal(first[row : row + _ROWS].float(), second[row : row + _ROWS].float()) for row in rows)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def untied(hf_config: Any) -> Any:
    """The config of the same model with a separate output layer."""
    changed = copy.deepcopy(hf_config)
    changed.tie_word_embeddings = False
    changed.get_text_config().tie_word_embeddings = False
    return changed
