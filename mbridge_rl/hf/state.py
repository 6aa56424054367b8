"""Checks, before anything is written, that a set of HF tensors matches the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.model import ModelSpec

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class Described(Protocol):
    """A tensor, or its description in a file's header."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def check_hf_state(spec: ModelSpec, hf_state: Mapping[str, Described], where: str, quantized: str = "") -> None:
    """Checks names, shapes and dtypes of `hf_state` against the mapping.

    Args:
        hf_state: tensors, or their descriptions in a file's header.
        where: the name of the state in the message (a path, or "the given state dict").
        quantized: the quantization in config.json, for the message.

    Raises:
        StateMismatchError: a tensor is missing, unexpected, has a wrong shape, or is not floating point.
    """
    missing = spec.hf_shapes.keys() - hf_state.keys() - spec.repeated_hf_names
    unknown = hf_state.keys() - spec.hf_shapes.keys() - spec.aliases.keys()
    extra = {hf_name for hf_name in unknown if not is_ignored(spec, hf_name)}
    if missing or extra:
        problems = [f"missing {listed(missing)}"] if missing else []
        problems += [f"unexpected {listed(extra)}"] if extra else []
        raise StateMismatchError(
            f"{where} does not match {spec.architecture}: {'; '.join(problems)}. {_doubt(quantized)} Nothing was changed"
        )
    for hf_name in (hf_name for hf_name in spec.hf_shapes if hf_name in hf_state):
        try:
            check_hf_tensor(spec, hf_name, hf_state[hf_name], where)
        except StateMismatchError as error:
            raise StateMismatchError(f"{error}. Nothing was changed") from error


def _doubt(quantized: str) -> str:
    if quantized:
        return f"config.json says {quantized}: these are not the weights and scales that such a checkpoint is known to hold."
    return "Is config.json the one of these weights?"


def check_hf_tensor(spec: ModelSpec, hf_name: str, tensor: Described, where: str) -> None:
    """Checks shape and dtype of one tensor that the model has.

    Raises:
        StateMismatchError: the tensor has another shape, or is not floating point.
    """
    if tuple(tensor.shape) != spec.hf_shapes[hf_name]:
        raise StateMismatchError(
            f"{where}: {hf_name} has shape {list(tensor.shape)}, the config says {list(spec.hf_shapes[hf_name])}"
        )
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise StateMismatchError(
            f"{where}: {hf_name} is {tensor.dtype}; only float16, bfloat16, float32 and float64 weights can be "
            f"imported, dequantize it first"
        )


def is_ignored(spec: ModelSpec, hf_name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model does not use it."""
    return hf_name.startswith(spec.ignored_hf_prefixes) or hf_name.endswith(_IGNORED_SUFFIXES)


class Contiguous(Mapping[str, Tensor]):
    """Tensors that are made contiguous when they are read; those of mapped files are contiguous already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
