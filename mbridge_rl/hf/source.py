"""Whatever holds a model's HF weights, opened: a checkpoint's directory, a state dict, a live Transformers module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import CheckpointError, StateMismatchError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.config import local_directory
from mbridge_rl.hf.dequantize import Dequantized
from mbridge_rl.hf.module import HFModule
from mbridge_rl.hf.quantization import quantization_of
from mbridge_rl.hf.state import Contiguous, check_hf_state
from mbridge_rl.hf.tied import Renamed, add_missing_names, missing_names, own_tensors, require_tied

HfState = Mapping[str, Tensor]
HfSource = str | Path | HfState | nn.Module


def open_source(spec: ModelSpec, hf_config: Any, source: HfSource) -> Checkpoint | HFModule | HfState:
    """The tensors of `source`, checked against the mapping, contiguous when they are read (a module's as they lie). Quantized
    ones, if the config says that it is, are read as what they stand for.

    Raises:
        CheckpointError, StateMismatchError: it cannot be read, or is another model's.
    """
    if isinstance(source, nn.Module):
        return HFModule(spec, source)
    if isinstance(source, str | Path):
        opened = open_checkpoint(spec, hf_config, local_directory(source))
        return opened if isinstance(opened, Checkpoint) else Contiguous(opened)
    hf_state = source
    if quantization := quantization_of(hf_config):
        hf_state = Dequantized(hf_state, quantization, hf_config.dtype or torch.bfloat16)
    return Contiguous(checked_state(spec, hf_state, "the given source"))


def open_checkpoint(spec: ModelSpec, hf_config: Any, directory: Path) -> Checkpoint | Dequantized:
    """The tensors of a checkpoint directory, checked against the mapping.

    Raises:
        CheckpointError, StateMismatchError: it cannot be read, or is another model's.
    """
    opened = _opened(spec, hf_config, directory)
    if isinstance(opened, Checkpoint):
        check_hf_state(spec, opened.entries, str(directory))
    else:
        check_hf_state(spec, opened.tensors, str(directory), str(opened.scheme))
    require_tied(spec, opened, str(directory))
    return opened


def checked_state(spec: ModelSpec, hf_state: HfState, where: str) -> HfState:
    """The tensors of a state dict under the names of the mapping.

    Raises:
        StateMismatchError: they are another model's.
    """
    quantized = hf_state if isinstance(hf_state, Dequantized) else None
    if missing := missing_names(spec, hf_state):
        hf_state = Renamed(hf_state, missing)
    check_hf_state(spec, hf_state, where, "" if quantized is None else str(quantized.scheme))
    require_tied(spec, hf_state, where)
    return hf_state


def has_own_output_layer(spec: ModelSpec, hf_config: Any, directory: Path) -> bool:
    """Whether a checkpoint of a model that is tied by its config holds an output layer that is not its embedding."""
    if not spec.aliases:
        return False
    try:
        return bool(own_tensors(spec, _opened(spec, hf_config, directory)))
    except (CheckpointError, StateMismatchError):  # whoever asks for the weights will hear of it
        return False


def _opened(spec: ModelSpec, hf_config: Any, directory: Path) -> Checkpoint | Dequantized:
    checkpoint = Checkpoint(directory)
    add_missing_names(spec, checkpoint.entries)
    quantization = quantization_of(hf_config)
    return Dequantized(checkpoint, quantization, hf_config.dtype or torch.bfloat16) if quantization else checkpoint


def spelled_as_in(spec: ModelSpec, directory: Path | None) -> ModelSpec:
    """The alternative of `spec` that a checkpoint follows; an export then has the same names and shapes."""
    if directory is None or not spec.alternatives:
        return spec
    try:
        tensors = Checkpoint(directory).tensors
    except CheckpointError:  # no weights, or broken ones: whoever asks for them will hear of it
        return spec
    return spec.for_checkpoint({hf_name: tuple(tensor.shape) for hf_name, tensor in tensors.items()})
