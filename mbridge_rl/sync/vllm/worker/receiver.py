"""A vLLM worker's model as a sync changes it: where each announced tensor lands, and how parameters are opened and written.

`sync.worker.payload_receiver.PayloadReceiver` runs the transaction itself, from the arrival of the bytes to the commit, and
does not know vLLM. This file gives it the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.sync.payload.compatibility import require_same_config
from mbridge_rl.sync.payload.messages import Announcement, WorkerDescription, fingerprint_of_tensors
from mbridge_rl.sync.vllm.worker import cpu_weights
from mbridge_rl.sync.vllm.worker.engine_config import config_as_given, is_tied
from mbridge_rl.sync.vllm.worker.guard import ModelGuard
from mbridge_rl.sync.vllm.worker.landing_map import LandingMap
from mbridge_rl.sync.vllm.worker.loading import loader_for
from mbridge_rl.sync.worker.payload_receiver import PayloadReceiver
from mbridge_rl.sync.worker.serving_state import Serving
from mbridge_rl.sync.worker.tracer import parameters_and_buffers

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Receiver:
    """One vLLM worker's model, and the receiver of its syncs.

    Args:
        model: the worker's model (`model_runner.get_model()`).
        vllm_config: the engine's config. On a CPU its `weight_transfer_config.backend` must be "mbridge", so that the weights
            are refittable from the start.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self.model = model
        self.vllm_config = vllm_config
        self._device = next(model.parameters()).device
        self._loader = loader_for(model, vllm_config, self._device)
        self._guard = ModelGuard(model)
        self.serving = Serving(self._guard)
        self.payload = PayloadReceiver(self, self.serving)
        self._landings: LandingMap | None = None
        self._targets: dict[str, Tensor] | None = None

    @property
    def unusable(self) -> str | None:
        """The reason why the engine refuses to generate; `None` if it does not."""
        return self._guard.reason

    def describe(self, announcement: Announcement, rank: int, size: int, host: str) -> WorkerDescription:
        """Learns where every announced HF tensor lands. No weight is changed. An open update is dropped, because its trainer is
        gone.

        Args:
            announcement: the tensors that every sync brings.
            rank: rank of the worker in its engine.
            size: number of workers of the engine.
            host: the machine id.

        Raises:
            EngineMismatch: the announcement was damaged on its way; the configs differ; the engine does not know a tensor, or
                has it in another shape or in a dtype that cannot hold it; or no tensor fills one of the engine's parameters.
        """
        self.payload.close("another trainer introduced itself")
        if (fingerprint := fingerprint_of_tensors(announcement.tensors)) != announcement.fingerprint:
            raise EngineMismatch(f"the announced tensors have fingerprint {fingerprint}, expected {announcement.fingerprint}")
        if announcement.config:
            own_config = config_as_given(self.vllm_config.model_config)
            require_same_config(announcement.config, own_config, tied=is_tied(self.model))
        with self._scope(), self._loader.plain():
            optional = frozenset(announcement.optional)
            self._landings = LandingMap.learn(self.model, announcement.tensors, optional, self._device, self.vllm_config)
            parameters = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.parameters().items()}
        return self._landings.description(rank, size, host, parameters)

    # The methods of `sync.worker.update.Model`, which `PayloadReceiver` calls.

    @property
    def settles(self) -> bool:
        return self._loader.keeps_references

    def parameters(self) -> dict[str, Tensor]:
        if self._targets is not None:
            return self._targets
        live = {name: tensor.data for name, tensor in parameters_and_buffers(self.model).items()}
        return live | cpu_weights.plain_convolutions(self.model)

    @contextmanager
    def plain(self) -> Iterator[None]:
        with self._scope(), self._loader.plain():
            yield

    def open(self) -> None:
        with self._scope():
            self._targets = self._loader.begin()

    def load_unsplit(self, hf_name: str, tensor: Tensor) -> None:
        assert self._landings is not None
        with self._scope():
            hf_tensor = tensor.view(self._landings.tensors[hf_name].shape).to(self._device)
            self._loader.load(iter([(hf_name, hf_tensor)]))

    def settle(self) -> None:
        with self._scope():
            self._loader.settle()

    def derive(self) -> None:
        self._targets = None
        with self._scope():
            self._loader.derive()

    @contextmanager
    def _scope(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            yield
