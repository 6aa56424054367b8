"""Refit: the trainer's weights into a running engine, as one versioned transaction per sync.

Every trainer rank writes the rectangles that it holds straight into shared memory, already in HF layout, so nothing is gathered
and no collective carries weights. Two halves of the arena alternate: while the engine loads one, the ranks fill the other.
The one small all-reduce per bucket sums the ranks' digests and is the barrier that says the half is full.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mbridge_rl.core.buckets import Bucket, pack
from mbridge_rl.core.digest import add, combine, signed, unsigned
from mbridge_rl.core.plan import Plan, copy_digest
from mbridge_rl.megatron.parameters import layout_of, live_side, model_dtype
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.errors import SyncError
from mbridge_rl.sync.group import RankGroup
from mbridge_rl.sync.vllm.compatibility import config_summary
from mbridge_rl.sync.vllm.engine import init_info

_log = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 64 << 20
LOAD_TIMEOUT_SECONDS = 600.0


class EngineClient(Protocol):
    """What a sync asks of an engine: vLLM's weight-transfer calls (`sync.vllm.engine` has two implementations)."""

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Mapping[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class SyncReport:
    """What one sync did, and the proof of it.

    Attributes:
        digest: of the whole HF state that the trainer meant; the engine's equals it, or the sync had raised.
        verified: the engine proved its live weights against the trainer's digests.
        seconds: wall time, all of it.
        engine: the engine's own report.
    """

    version: int
    tensors: int
    nbytes: int
    buckets: int
    digest: str | None
    verified: bool
    seconds: float
    engine: Mapping[str, Any]

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9


class WeightSync:
    """Keeps one engine's weights those of a live Megatron model. Made once by all trainer ranks together; `sync` is collective.

    Args:
        bridge: of the model.
        model: this rank's chunks (`AutoBridge.build_model`); adapters are merged on the way.
        client: the engine, on rank 0; `None` on the other ranks.
        dtype: that the engine holds and the wire carries; `None` means the model's.
        bucket_bytes: size of one half of the arena; a larger tensor enlarges it.
        verify: sum digests on both ends and compare them before the commit.

    Raises:
        SyncError: not all ranks are on the engine's machine, or no engine was given; EngineMismatch: the engine's model is not
            the bridge's. No weight is changed.
    """

    def __init__(
        self,
        bridge: Any,
        model: Sequence[nn.Module],
        client: EngineClient | None,
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        verify: bool = True,
    ) -> None:
        self._spec, self._model, self._client = bridge.spec, model, client
        self._group = RankGroup()
        self._layout = layout_of(model, bridge.spec)
        self._dtype = dtype or model_dtype(model)
        self._verify = verify
        self._plan: Plan = bridge.export_plan(self._layout)
        self._tensors = [
            replace(tensor, word_elements=self._plan.word_elements(tensor.hf_name, tensor.dtype.itemsize))
            for tensor in self._spec.hf_tensors(self._dtype)
        ]
        self._buckets = pack(self._tensors, bucket_bytes)
        self._half_bytes = max(bucket.nbytes for bucket in self._buckets)
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refit")
        self._handshake()
        self._arena = self._shared_arena()
        self._fingerprint = ""
        self._group.first_rank_does(lambda: self._introduce(bridge.hf_config))

    def sync(self, version: int) -> SyncReport:
        """Moves the live weights into the engine and commits them as `version`.

        Returns:
            The same report on every rank (`engine` only on rank 0).

        Raises:
            SyncError: on every rank, if any part failed on any; the engine then serves the old version, or refuses to generate
                and says which version it lost.
        """
        started = time.perf_counter()
        live, _ = live_side(self._model, self._spec, self._layout, self._group.rank)
        self._on_engine(lambda client: client.start_weight_update())
        digests: dict[str, int] = {}
        loading: Future[None] | None = None
        for index, bucket in enumerate(self._buckets):
            half = (index % 2) * self._half_bytes
            sums = self._fill(bucket, half, live)
            failure = _failure_of(loading)
            sums = self._agree(sums, failure, version)
            of_bucket = {slot.tensor.hf_name: unsigned(value) for slot, value in zip(bucket.slots, sums.tolist(), strict=True)}
            digests.update(of_bucket)
            if self._client is not None:
                loading = self._loading.submit(self._client.update_weights, self._update_info(bucket, half, of_bucket, version))
        self._agree(torch.zeros(0, dtype=torch.int64), _failure_of(loading), version)
        engine_report: dict[str, Any] = {}
        self._on_engine(lambda client: engine_report.update(client.finish_weight_update(str(version))))
        report = SyncReport(
            version=version,
            tensors=len(self._tensors),
            nbytes=sum(tensor.nbytes for tensor in self._tensors),
            buckets=len(self._buckets),
            digest=combine(digests) if self._verify else None,
            verified=self._verify,
            seconds=time.perf_counter() - started,
            engine=engine_report,
        )
        _log.info("version %d: %d bytes in %.3f s, digest %s", version, report.nbytes, report.seconds, report.digest)
        return report

    def close(self) -> None:
        """Frees the shared memory. The engine keeps its weights."""
        self._loading.shutdown()
        self._arena.close()

    def _handshake(self) -> None:
        """Once: everybody has the same plan, and shares a machine."""
        said = self._group.gather_object((socket.gethostname(), self._plan.fingerprint, str(self._dtype)))
        hosts = sorted({host for host, _, _ in said})
        if len(hosts) > 1:
            raise SyncError(f"refit through shared memory needs all trainer ranks on the engine's machine, found {hosts}")
        for rank, (_, fingerprint, dtype) in enumerate(said):
            if (fingerprint, dtype) != said[0][1:]:
                raise SyncError(
                    f"rank {rank} has plan {fingerprint} in {dtype}, rank 0 has {said[0][1]} in {said[0][2]}: "
                    f"give every rank the same model, layout and dtype"
                )

    def _shared_arena(self) -> Arena:
        nbytes = 2 * self._half_bytes
        created: list[Arena] = []
        self._group.first_rank_does(lambda: created.append(Arena.create(nbytes)))
        path = self._group.gather_object(created[0].path if created else None)[0]
        return created[0] if created else Arena.attach(path, nbytes, writable=True)

    def _introduce(self, hf_config: Any) -> None:
        if self._client is None:
            raise SyncError("rank 0 has no engine client: give WeightSync(client=...) an engine there")
        info = init_info(self._tensors, config_summary(hf_config))
        arena = {"arena_path": self._arena.path, "arena_nbytes": self._arena.nbytes, "verify": self._verify}
        self._fingerprint = info["fingerprint"]
        self._client.init_weight_transfer_engine(info | arena)

    def _fill(self, bucket: Bucket, half: int, live: Mapping[str, Tensor]) -> Tensor:
        """Writes this rank's rectangles of `bucket`; returns its share of every slot's digest, int64 `[slots]`."""
        sums = torch.zeros(len(bucket.slots), dtype=torch.int64)
        for index, slot in enumerate(bucket.slots):
            tensor = slot.tensor
            target = self._arena.view(half + slot.offset, tensor.shape, tensor.dtype)
            share = 0
            for copy in self._plan.by_hf_name[tensor.hf_name]:
                if copy.source_rank != self._group.rank:
                    continue
                part = copy.source.of(live[copy.source.name], copy.shape).to(tensor.dtype)
                copy.target.of(target, copy.shape).copy_(part)
                if self._verify:
                    share = add(share, copy_digest(copy, part, tensor))
            sums[index] = signed(share)
        return sums

    def _agree(self, sums: Tensor, failure: BaseException | None, version: int) -> Tensor:
        """Sums digests over the ranks; also the barrier, and where all ranks learn that the engine failed."""
        summed = self._group.sum(torch.cat([sums, torch.tensor([int(failure is not None)])]))
        if failure is not None:
            self._group.gather_object(f"{type(failure).__name__}: {failure}")
            raise failure
        if summed[-1].item():
            raise SyncError(f"version {version} was not committed: {self._group.gather_object(None)[0]}")
        return summed[:-1]

    def _on_engine(self, call: Callable[[EngineClient], Any]) -> None:
        def action() -> None:
            if self._client is not None:
                call(self._client)

        self._group.first_rank_does(action)

    def _update_info(self, bucket: Bucket, half: int, digests: Mapping[str, int], version: int) -> dict[str, Any]:
        return {
            "version": version,
            "names": [slot.tensor.hf_name for slot in bucket.slots],
            "offsets": [half + slot.offset for slot in bucket.slots],
            "digests": [f"{digests[slot.tensor.hf_name]:016x}" for slot in bucket.slots] if self._verify else [],
            "fingerprint": self._fingerprint,
        }


def _failure_of(loading: Future[None] | None) -> BaseException | None:
    """Waits for the engine to have loaded the bucket before; its half may then be overwritten."""
    return None if loading is None else loading.exception(timeout=LOAD_TIMEOUT_SECONDS)
