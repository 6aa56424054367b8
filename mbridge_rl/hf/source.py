"""Opens every kind of source of a model's HF weights: a checkpoint's directory, a state dict, a live Transformers module."""

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
from mbridge_rl.hf.quantization import quantization_of, scheme_of
from mbridge_rl.hf.respelled import Respelled, respell_entries, respelled
from mbridge_rl.hf.state import Contiguous, check_hf_state
from mbridge_rl.hf.tied import Renamed, add_missing_names, missing_names, own_tensors, require_tied

HfState = Mapping[str, Tensor]
HfSource = str | Path | HfState | nn.Module
Opened = Checkpoint | Dequantized | Respelled


def open_source(spec: ModelSpec, hf_config: Any, source: HfSource) -> Checkpoint | HFModule | HfState:
    """The tensors of `source`, checked against the mapping. They are contiguous when they are read, except those of a module.
    If the config describes a quantization, they are dequantized when they are read.

    Raises:
        CheckpointError, StateMismatchError: the source cannot be read, or belongs to another model.
    """
    if isinstance(source, nn.Module):
        return HFModule(spec, source)
    if isinstance(source, str | Path):
        opened = open_checkpoint(spec, hf_config, local_directory(source))
        return opened if isinstance(opened, Checkpoint) else Contiguous(opened)
    return Contiguous(checked_state(spec, hf_config, source))


def open_checkpoint(spec: ModelSpec, hf_config: Any, directory: Path) -> Opened:
    """The tensors of a checkpoint directory by the names of the mapping, checked against it.

    Raises:
        CheckpointError, StateMismatchError: the checkpoint cannot be read, or belongs to another model.
    """
    opened, where = _opened(spec, hf_config, directory), str(directory)
    check_hf_state(spec, opened.entries if isinstance(opened, Checkpoint) else opened.tensors, where, _scheme(hf_config))
    require_tied(spec, opened, where)
    return opened


def checked_state(spec: ModelSpec, hf_config: Any, hf_state: HfState) -> HfState:
    """The tensors of a state dict by the names of the mapping, checked against it, as `open_checkpoint` does for a directory.

    Raises:
        StateMismatchError: the tensors belong to another model.
    """
    where, described = "the given state dict", hf_state
    if quantization := quantization_of(hf_config):
        hf_state = Dequantized(hf_state, quantization, hf_config.dtype or torch.bfloat16)
        described = hf_state.tensors
    if (renamed := respelled(spec, hf_state, described, where)) is not None:
        hf_state, described = renamed, renamed.tensors
    if missing := missing_names(spec, hf_state):
        hf_state, described = Renamed(hf_state, missing), Renamed(described, missing)
    check_hf_state(spec, described, where, _scheme(hf_config))
    require_tied(spec, hf_state, where)
    return hf_state


def has_own_output_layer(spec: ModelSpec, hf_config: Any, directory: Path) -> bool:
    """Whether a checkpoint whose config ties the embeddings holds an output layer that differs from the embedding."""
    if not spec.aliases:
        return False
    try:
        return bool(own_tensors(spec, _opened(spec, hf_config, directory)))
    except (CheckpointError, StateMismatchError):  # loading the weights will raise it
        return False


def _opened(spec: ModelSpec, hf_config: Any, directory: Path) -> Opened:
    checkpoint = Checkpoint(directory)
    add_missing_names(spec, checkpoint.entries)
    if not (quantization := quantization_of(hf_config)):
        respell_entries(spec, checkpoint.entries, str(directory))
        return checkpoint
    dequantized = Dequantized(checkpoint, quantization, hf_config.dtype or torch.bfloat16)
    return respelled(spec, dequantized, dequantized.tensors, str(directory)) or dequantized


def _scheme(hf_config: Any) -> str:
    quantization = quantization_of(hf_config)
    return str(scheme_of(quantization)) if quantization else ""


def spelled_as_in(spec: ModelSpec, directory: Path | None) -> ModelSpec:
    """The alternative of `spec` with the names and shapes of a checkpoint, so that an export has the same ones."""
    if directory is None or not spec.alternatives:
        return spec
    try:
        tensors = Checkpoint(directory).tensors
    except CheckpointError:  # there are no weights, or damaged ones: loading them will raise it
        return spec
    return spec.for_checkpoint({hf_name: tuple(tensor.shape) for hf_name, tensor in tensors.items()})
