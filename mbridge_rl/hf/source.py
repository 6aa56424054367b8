"""Whatever holds a model's HF weights, opened: a checkpoint's directory, a state dict, a live Transformers module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.config import local_directory
from mbridge_rl.hf.dequantize import Dequantized
from mbridge_rl.hf.module import HFModule
from mbridge_rl.hf.state import Contiguous, check_hf_state

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
    where, hf_state = "the given source", source
    if isinstance(source, str | Path):
        directory = local_directory(source)
        where, hf_state = str(directory), Checkpoint(directory)
    if quantization := getattr(hf_config, "quantization_config", None):
        hf_state = Dequantized(hf_state, quantization, hf_config.dtype or torch.bfloat16)
    check_hf_state(spec, hf_state.entries if isinstance(hf_state, Checkpoint) else hf_state, where)
    return hf_state if isinstance(hf_state, Checkpoint) else Contiguous(hf_state)


def spelled_as_in(spec: ModelSpec, directory: Path | None) -> ModelSpec:
    """The alternative of `spec` that a checkpoint follows; an export then has the same names and shapes."""
    if directory is None or not spec.alternatives:
        return spec
    try:
        tensors = Checkpoint(directory).tensors
    except CheckpointError:  # no weights, or broken ones: whoever asks for them will hear of it
        return spec
    return spec.for_checkpoint({hf_name: tuple(tensor.shape) for hf_name, tensor in tensors.items()})
