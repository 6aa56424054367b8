"""The engine worker's end of a sync: checks what arrives, loads it, proves what the engine then holds, commits.

A sync is a transaction: `begin(version)`, any number of `load(batch)`, `commit(version)`. Whatever fails before the first
write leaves the old version serving. After it, the engine refuses to generate and names the version it lost, until the next
sync commits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.errors import listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.engine_side import WorkerDescription
from mbridge_rl.sync.errors import DigestMismatch, EngineMismatch, IncompleteSync, SyncError
from mbridge_rl.sync.serving import Serving
from mbridge_rl.sync.vllm import cpu_weights
from mbridge_rl.sync.vllm.compatibility import require_same_config
from mbridge_rl.sync.vllm.engine_config import config_as_given, is_tied
from mbridge_rl.sync.vllm.guard import Guard
from mbridge_rl.sync.vllm.loading import loader_for
from mbridge_rl.sync.vllm.proof import LandingMap
from mbridge_rl.sync.vllm.tracer import parameters_and_buffers
from mbridge_rl.sync.worker import ShardReceiver

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class Receiver:
    """Receives HF tensors into one vLLM worker's model.

    Args:
        model: the worker's model (`model_runner.get_model()`).
        vllm_config: the engine's config; its `weight_transfer_config.backend` must be "mbridge" on a CPU, so that the
            weights were kept refittable from the start.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        self.model = model
        self.vllm_config = vllm_config
        self._device = next(model.parameters()).device
        self._loader = loader_for(model, vllm_config, self._device)
        self._guard = Guard(model)
        self.serving = Serving(self._guard)
        self.shards = ShardReceiver(self, self.serving)
        self._landings: LandingMap | None = None
        self._verify = True
        self._targets: dict[str, Tensor] | None = None
        self._expected: dict[str, int] = {}
        self._received: set[str] = set()
        self._seconds: dict[str, float] = {}

    @property
    def updating(self) -> int | None:
        """The version whose update is open."""
        return self.serving.updating

    @property
    def unusable(self) -> str | None:
        """Why the engine refuses to generate; None if it does not."""
        return self._guard.reason

    def prepare(self, metadata: Iterable[HFTensor], config: Mapping[str, Any] | None = None, *, verify: bool = True) -> None:
        """Learn where every announced HF tensor lands; no weight is changed. An open update is dropped: its trainer is gone.

        Args:
            metadata: name, dtype and shape of every HF tensor that each sync will bring.
            config: the trainer's `config_summary`, compared with the engine's config.
            verify: whether syncs prove the live weights by digest.

        Raises:
            EngineMismatch: the configs differ; the engine does not know a tensor, or has it in another shape or in a dtype
                that cannot hold it; or one of the engine's parameters is filled by none of the tensors.
        """
        self.abort("another trainer introduced itself")
        if config is not None:
            require_same_config(config, config_as_given(self.vllm_config.model_config), tied=is_tied(self.model))
        tensors = list(metadata)
        with self._scope(), self._loader.plain():
            self._landings = LandingMap.learn(self.model, tensors, self._device, self.vllm_config)
        self._verify = verify

    def begin(self, version: int) -> None:
        """Open the update to `version`; the engine generates nothing until `commit` (or a clean `abort`)."""
        if self._landings is None:
            raise SyncError("prepare(metadata) has to come before begin(version)")
        if self.updating is not None:
            self.abort(f"the update to version {version} began before it was committed")
        self.serving.begin(version)
        self._expected, self._received = {}, set()
        self._seconds = {"load": 0.0, "verify": 0.0, "derive": 0.0}
        with self._failing(f"the update to version {version} could not begin"), self._scope():
            self._loader.begin()

    def load(self, tensors: Iterable[tuple[str, Tensor]], digests: Mapping[str, int] | None = None) -> None:
        """Load one batch of `(hf_name, tensor)`; the whole batch is checked before the first write.

        Args:
            digests: the trainer's digest of each tensor. Without it, the engine's weights are proven to be what arrived.

        Raises:
            EngineMismatch: a tensor that was not announced, comes twice, or has another shape or dtype.
            DigestMismatch: a tensor's bytes are not the trainer's.
        """
        if self.updating is None or self._landings is None:
            raise SyncError("begin(version) has to come before load(tensors)")
        with self._failing(f"the update to version {self.updating} failed while loading"):
            batch = list(tensors)
            self._require_announced(batch)
            started = time.perf_counter()
            if self._verify:
                self._require_digests(batch, digests)
            self._received.update(hf_name for hf_name, _ in batch)
            verified = time.perf_counter()
            self.serving.written = True
            with self._scope():
                self._loader.load(self._as_loaded(batch))
            self._seconds["verify"] += verified - started
            self._seconds["load"] += time.perf_counter() - verified

    def commit(self, version: int | None = None) -> dict[str, Any]:
        """Prove the live weights and let the engine serve them as `version` (default: the one begun).

        Returns:
            A report in plain JSON types: `version`, `tensors`, `bytes`, `digest` (of the whole set, as `core.digest.combine`
            gives it), `proven_live` and `proven_received` (numbers of tensors), `seconds` (`load`, `verify`, `derive`).

        Raises:
            IncompleteSync: announced tensors did not arrive.
            DigestMismatch: live weights are not bit for bit the trainer's.
        """
        if self.updating is None or self._landings is None:
            raise SyncError("begin(version) has to come before commit(version)")
        if version is not None and version != self.updating:
            raise SyncError(f"version {version} cannot be committed: the open update is to version {self.updating}")
        with self._failing(f"the update to version {self.updating} failed at commit"), self._scope():
            self._require_complete()
            self._loader.settle()
            started = time.perf_counter()
            proven = self._landings.prove(self.model, self._expected) if self._verify else (0, 0)
            verified = time.perf_counter()
            self._loader.derive()
            self._seconds["verify"] += verified - started
            self._seconds["derive"] += time.perf_counter() - verified
        self.serving.commit()
        return {
            "version": self.serving.version,
            "tensors": len(self._received),
            "bytes": sum(tensor.nbytes for tensor in self._landings.tensors.values()),
            "digest": combine(self._expected) if self._verify else None,
            "proven_live": proven[0],
            "proven_received": proven[1],
            "seconds": dict(self._seconds),
        }

    def abort(self, reason: str) -> None:
        """Close an open update. If nothing was written, the old version serves on; else the engine is unusable."""
        if self.updating is None:
            return
        if self.shards.is_open:
            self.shards.abort(reason)
            return
        with self._scope():
            self._loader.settle()
            self._loader.derive()
        self.serving.abort(reason)

    def describe(self, rank: int, size: int, host: str) -> WorkerDescription:
        """This worker as a part of an engine's side, from the last `prepare`.

        Raises:
            SyncError: there was none.
        """
        if self._landings is None:
            raise SyncError("prepare(metadata) has to come before describe")
        with self.plain():
            parameters = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.parameters().items()}
        return self._landings.description(rank, size, host, parameters)

    # What `sync.worker.ShardReceiver` asks of an engine's model.

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
            self._targets = self._loader.begin_in_place()

    def load_whole(self, hf_name: str, tensor: Tensor) -> None:
        assert self._landings is not None
        with self._scope():
            whole = tensor.view(self._landings.tensors[hf_name].shape).to(self._device)
            self._loader.load(iter([(hf_name, whole)]))

    def settle(self) -> None:
        with self._scope():
            self._loader.settle()

    def derive(self) -> None:
        self._targets = None
        with self._scope():
            self._loader.derive()

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Abort on whatever happens inside, also on KeyboardInterrupt: the engine must never serve a mixture."""
        try:
            yield
        except BaseException as error:
            self.abort(f"{what}: {error}")
            raise

    @contextmanager
    def _scope(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            yield

    def _require_announced(self, batch: Sequence[tuple[str, Tensor]]) -> None:
        assert self._landings is not None
        problems, seen = [], set(self._received)
        for hf_name, tensor in batch:
            announced = self._landings.tensors.get(hf_name)
            if announced is None:
                problems.append(f"{hf_name} was not announced")
                continue
            if hf_name in seen:
                problems.append(f"{hf_name} came twice")
            seen.add(hf_name)
            if tuple(tensor.shape) != announced.shape or tensor.dtype != announced.dtype:
                problems.append(
                    f"{hf_name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"but was announced as {announced.dtype} {announced.shape}"
                )
        if problems:
            raise EngineMismatch(f"{len(problems)} of {len(batch)} tensors are not what was announced: {listed(problems)}")

    def _require_digests(self, batch: Sequence[tuple[str, Tensor]], digests: Mapping[str, int] | None) -> None:
        """Compare whole tensors with the trainer's digests, and note what commit will need."""
        assert self._landings is not None
        if digests is not None and (absent := [hf_name for hf_name, _ in batch if hf_name not in digests]):
            raise EngineMismatch(f"no digest was sent for {listed(absent)}; send one each, or none at all")
        wrong = []
        for hf_name, tensor in batch:
            found = digest(tensor)
            expected = found if digests is None else digests[hf_name]
            if found != expected:
                wrong.append(f"{hf_name} (expected {expected:016x}, found {found:016x})")
            self._expected[hf_name] = expected
        if wrong:
            raise DigestMismatch(f"{len(wrong)} of {len(batch)} tensors arrived with other bytes: {listed(wrong)}")
        for hf_name, tensor in batch:
            self._landings.note_parts(hf_name, tensor)

    def _require_complete(self) -> None:
        assert self._landings is not None
        missing = self._landings.tensors.keys() - self._received
        if missing:
            raise IncompleteSync(
                f"{len(missing)} of {len(self._landings.tensors)} announced tensors did not arrive: {listed(missing)}"
            )

    def _as_loaded(self, batch: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What the loader is given: never a tensor that it could change, or keep, behind the owner's back."""
        assert self._landings is not None
        for hf_name, tensor in batch:
            copied = self._loader.keeps_references or hf_name in self._landings.untraceable
            yield hf_name, tensor.detach().to(self._device, copy=True) if copied else tensor.detach()
