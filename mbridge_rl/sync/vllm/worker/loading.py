"""Two loaders of a running vLLM model: plain parameters on a CPU, vLLM's layerwise reload on an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.sync.vllm.worker import cpu_weights
from mbridge_rl.sync.worker.tracer import parameters_and_buffers

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Loader(Protocol):
    """A loader is called with gradients off and the engine's vLLM config set."""

    keeps_references: bool  # whether `load` may keep references to the tensors after it returned

    def begin(self) -> dict[str, Tensor]:
        """Opens the model for writing. Returns the tensors that the kernels read, by parameter name, to be written directly."""

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None: ...

    def settle(self) -> None:
        """Finishes loading, after the last load: the parameters then hold the values that arrived."""

    def derive(self) -> None:
        """Computes what the kernels need from the parameters."""

    @contextmanager
    def plain(self) -> Iterator[None]:
        """A scope in which the model's own `load_weights` fits its parameters; nothing may be loaded in it."""
        yield


def loader_for(model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> Loader:
    """The loader for the model's device.

    Raises:
        EngineMismatch: a CPU engine was not started with the backend "mbridge", so that its weights are packed for good.
    """
    if device.type != "cpu":
        return _LayerwiseLoader(model, vllm_config)
    transfer = vllm_config.weight_transfer_config
    if transfer is None or transfer.backend != cpu_weights.BACKEND:
        raise EngineMismatch(
            "a CPU engine keeps refittable weights only when it is started with "
            f'weight_transfer_config=WeightTransferConfig(backend="{cpu_weights.BACKEND}"); this one was not'
        )
    return _PlainLoader(model, vllm_config)


class _PlainLoader:
    keeps_references = False

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self._model = model
        self._dtype = vllm_config.model_config.dtype

    def begin(self) -> dict[str, Tensor]:
        cpu_weights.restore_plain(self._model)
        return {name: tensor.data for name, tensor in parameters_and_buffers(self._model).items()}

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._model.load_weights(tensors)

    def settle(self) -> None:
        """Does nothing: loading defers nothing."""

    def derive(self) -> None:
        cpu_weights.derive(self._model, self._dtype)

    @contextmanager
    def plain(self) -> Iterator[None]:
        cpu_weights.restore_plain(self._model)
        try:
            yield
        finally:
            cpu_weights.derive(self._model, self._dtype)


class _LayerwiseLoader:
    """Buffers the tensors of a layer until it is complete, so they must be copies; vLLM rebuilds the layouts of its kernels."""

    keeps_references = True

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self._model = model
        self._model_config = vllm_config.model_config

    def begin(self) -> dict[str, Tensor]:
        """Begins a layerwise reload. After a reload vLLM restores the tensors of every layer for which no weight was loaded."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        live = {name: tensor.data for name, tensor in parameters_and_buffers(self._model).items()}
        initialize_layerwise_reload(self._model)
        return live

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._model.load_weights(tensors)

    def settle(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self._model, self._model_config)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def derive(self) -> None:
        """Does nothing: `settle` has computed it."""

    @contextmanager
    def plain(self) -> Iterator[None]:
        yield
