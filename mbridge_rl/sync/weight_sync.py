"""Refit: the trainer's weights into running engines, as one versioned transaction per sync.

    begin(version) -> transfer -> verify -> commit | abort

One static plan says which rectangle of which trainer rank each engine worker keeps; every worker receives those bytes and no
others. Staged, they arrive beside the weights that are served, are verified there, and replace them in one short pause;
streaming, they replace them as they arrive.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import (
    EngineMismatch,
    RanksUnreachable,
    SyncError,
)
from mbridge_rl.core.finite import refuse_nonfinite, require_finite
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.distributed.live_fp8 import QuantizedLive
from mbridge_rl.megatron.parameters import LiveParameters, live_side
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.sync.payload.delta import Delta, carried_bytes
from mbridge_rl.sync.payload.route import Route
from mbridge_rl.sync.pull import published, restore
from mbridge_rl.sync.record import phases
from mbridge_rl.sync.record.report import EngineOutcome, SyncReport
from mbridge_rl.sync.record.sinks import Sink
from mbridge_rl.sync.record.timeline import Span, Stopwatch, of_engine
from mbridge_rl.sync.store.image import new_fill
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.delta_sender import DeltaSender
from mbridge_rl.sync.trainer.engines import Engine, Engines, outcomes_of
from mbridge_rl.sync.trainer.joining import bring_up, introduce
from mbridge_rl.sync.trainer.meeting import ON_ONE_HOST, Connection, connect, held_store, meet
from mbridge_rl.sync.trainer.packer import Packer
from mbridge_rl.sync.trainer.retries import with_retries
from mbridge_rl.sync.transports import Outlet, Wire, fails_with
from mbridge_rl.sync.transports.waiting import Timeout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Done:
    """What an attempt did: the digest of all weights, the delta if it was one, what became of every engine, what those that
    committed said (on rank 0), and the other ranks' time."""

    digest: str | None
    delta: Delta | None
    outcomes: Sequence[EngineOutcome]
    engines: Sequence[Mapping[str, Any]]
    others: Sequence[Span]

    @property
    def by_engine(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        committed = [outcome.engine for outcome in self.outcomes if outcome.error is None]
        return zip(committed, self.engines, strict=False)  # on rank 0 alone they say something


class WeightSync:
    """Keeps engines' weights those of a live Megatron model. Made once by all trainer ranks together; `sync` is collective.

    Args:
        bridge: of the model.
        model: this rank's chunks (`AutoBridge.build_model`); adapters are merged on the way.
        client: the engine, or replicas of equal layout, on rank 0; `None` on the other ranks.
        dtype: of the policy as engines see it; `None` means the model's.
        sinks: that rank 0 tells of every sync, the failed ones too (`sync.record.sinks`); the log hears of all anyway.
        options: or fields of `SyncOptions` by keyword.

    Raises:
        SyncError: no engine was given; EngineMismatch: an engine's model is not the bridge's; PlanError; StoreError: another
            trainer of this host writes to a store of this name. No weight is changed.
    """

    def __init__(
        self,
        bridge: AutoBridge,
        model: Sequence[nn.Module],
        client: Engine | Sequence[Engine] | None,
        *,
        dtype: torch.dtype | None = None,
        sinks: Sequence[Sink] = (),
        options: SyncOptions | None = None,
        **fields: Any,
    ) -> None:
        self.options = options or SyncOptions(**fields)
        self._bridge, self._model = bridge, model
        self._group = RankGroup()
        self._engines = Engines(client if isinstance(client, Sequence) else [] if client is None else [client])
        self._timeout = Timeout(self.options.timeout)
        self._sinks = sinks if self._group.rank == 0 else ()
        self._generation = 0  # of the engines
        self._slot = 0  # of the two that workers on other hosts fill in turn
        self._images = secrets.token_hex(8)  # prefix of the tokens of those slots, which no other sync has
        self._planning = Stopwatch(phases.lane(self._group.rank))
        self._store = held_store(self.options, self._group)
        try:
            with self._planning(phases.PLAN):
                self._meeting = meet(bridge, model, self._engines, self._group, self.options, dtype)
                self._group.first_rank_does(lambda: self._store.describe(self.route.fingerprint, self._meeting.introduction))
                self._connection = self._connected(self._meeting.hosts, self._meeting.replicas)
        except BaseException:
            self._store.close()
            raise
        self._deltas = DeltaSender(self.route, self._group.rank) if self.options.delta else None

    def sync(self, version: int) -> SyncReport:
        """Moves the live weights into the engines and commits them as `version`.

        Returns:
            The same report on every rank (`engines` only on rank 0).

        Raises:
            NonFiniteWeights, StateMismatchError: before anything was sent.
            SyncError: on every rank, if any part failed on any before the commit, or every engine's commit did; the engines
                then serve the old version or, where live weights were written already, refuse to generate and say which version
                they lost. If but some fail to commit, the others serve the new version, and the report names the failed ones.
        """
        with self._engines.turn:
            self._connect_members()
            return self._sync(version)

    def _sync(self, version: int) -> SyncReport:
        return with_retries(
            version,
            lambda watch, first: self._attempt(version, watch, can_be_delta=first),
            lambda watches, done, error: self._report(version, watches, done, error),
            lane=phases.lane(self._group.rank),
            retries=self.options.retries,
            sinks=self._sinks,
            goes_on=self._goes_on_without_lost,
        )

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that take part, on rank 0."""
        return self._engines.all

    def add_engine(self, engine: Engine) -> int | None:
        """One more engine takes part, from the next sync on. On rank 0 alone, from any thread; a sync that runs is waited for.

        Returns:
            The version that it serves now: the one committed last, where the weight store of its host holds it; otherwise
            `None`, and it gets its first version from the next sync.

        Raises:
            EngineMismatch: its model or layout is not the others', or the chosen transport does not reach it.
        """
        hosts = introduce(engine, self._meeting.introduction)
        here = hosts == {machine_id()}
        if not here and self.options.transport in ON_ONE_HOST:
            raise EngineMismatch(
                f"the engine that joins is on {sorted(hosts)}, where the transport {self.options.transport!r} does not reach"
            )
        how = self.route.fingerprint, self.options.requests, self.options.timeout
        with self._engines.turn:
            version = bring_up(engine, self._store, *how) if here else None
            self._engines.admit(engine, hosts)
        return version

    def remove_engine(self, engine: Engine) -> None:
        """Lets an engine go, with the weights it has. On rank 0 alone, from any thread; a sync that runs is waited for.

        Raises:
            SyncError: it takes no part.
        """
        with self._engines.turn:
            self._engines.dismiss(engine)

    def pull(self, engine: int = 0) -> None:
        """The way back: gives the trainer's live model the weights that an engine serves, under whatever layout it has, proven
        by digest. All ranks together; the engine must be on the trainer's host (`sync.pull.restore_from_store` needs none).

        Raises:
            SyncError: the engine holds no version, quantized weights, or tensors that only its own loader can place.
            DigestMismatch.
        """
        if self.options.quantization is not None:
            raise SyncError("the engines hold quantized weights, which a trainer cannot go on from: restore a checkpoint")

        def publish(paths: Sequence[str]) -> None:
            self._engines.all[engine].publish_weights(paths)

        with published(self.route.workers, publish, self._group) as images:
            restore(self._bridge, self._model, self.route.workers, images, self._group)

    @property
    def route(self) -> Route:
        """What each engine worker receives."""
        return self._meeting.route

    @property
    def store(self) -> WeightStore:
        """Where engines catch up from (with the transport `shared_memory` in mode `staged`)."""
        return self._store

    def close(self) -> None:
        """Frees shared memory; a store that was given a name stays. The engines keep their weights."""
        self._connection.way.close()
        self._engines.close()
        if self._group.rank == 0:
            self._store.close()

    def _attempt(self, version: int, watch: Stopwatch, *, can_be_delta: bool) -> _Done:
        with watch("check"):
            packer = self._examined()
        began = False
        try:
            delta = None
            if self._deltas is not None and can_be_delta:
                with watch("encode"):
                    delta = self._encoded(self._deltas, packer)
            sent = self.route if delta is None else delta.route
            with watch("begin"):
                wire, outlet = self._connection.way.open(version, sent)
                began = True
                self._group.first_rank_does(lambda: self._begin(version, wire, delta))
            with (
                watch("transfer"),
                self._engines.with_engine_errors(self._group),
                self._group.fail_together(),
                fails_with(outlet),
            ):
                self._send(outlet, packer, sent, watch)
            with watch("verify"):
                digest, proofs = self._verify(version, packer)
            with watch("decide"):
                self._group.first_rank_does(lambda: self._connection.way.commit(version, digest, proofs))
                if self._deltas is not None:
                    self._deltas.commit(version, proofs)
        except BaseException as error:
            if began:
                self._abort(version, error)
            raise
        with watch("commit"):
            outcomes, reports = self._commit(version)
        self._slot = 1 - self._slot
        with watch("report"):
            others = phases.of_other_ranks(watch.spans, self._group)
        return _Done(digest, delta, outcomes, reports, others)

    def _report(self, version: int, watches: Sequence[Stopwatch], done: _Done | None = None, error: str = "") -> SyncReport:
        """The record of a sync whose last attempt ended just now."""
        done = done or _Done(None, None, (), (), ())
        full_nbytes = sum(worker.payload_bytes for worker in self.route.workers)
        own = [span for watch in watches for span in watch.spans]
        of_engines = [span for index, engine in done.by_engine for span in of_engine(engine.get("spans", ()), index)]
        planning, self._planning = self._planning.spans, Stopwatch("")
        return SyncReport(
            version=version,
            tensors=len(self._meeting.spec.hf_shapes),
            nbytes=full_nbytes if done.delta is None else done.delta.nbytes,
            full_nbytes=full_nbytes,
            base=None if done.delta is None else done.delta.base,
            buckets=sum(len(worker.buckets) for worker in self.route.workers),
            digest=done.digest,
            verified=self.options.verify and not error,
            seconds=watches[-1].now() - watches[0].created,
            mode=self.options.mode,
            transport=self._connection.transport,
            attempts=len(watches),
            engines=[{name: value for name, value in engine.items() if name != "spans"} for engine in done.engines],
            outcomes=done.outcomes,
            error=error,
            started=watches[0].created,
            rank=self._group.rank,
            spans=[*planning, *own, *done.others, *of_engines],
        )

    def _begin(self, version: int, wire: Wire, delta: Delta | None) -> None:
        landing = {
            "store": self._store.name,
            "directory": str(self._store.directory),
            "temporary": self._store.temporary,
            "session": _session_of(os.getpid()),
            "token": f"{self._images}x{self._slot}",
            "fill": new_fill(),
            "version": version,
            "fingerprint": self.route.fingerprint,
            "sizes": [worker.nbytes for worker in self.route.workers],
        }
        if wire["kind"] == "store":
            landing = {}
        self._engines.begin(
            {
                "version": version,
                "fingerprint": self.route.fingerprint,
                "mode": self.options.mode,
                "wire": {**landing, **wire},
                "timeout": self.options.timeout,
                "requests": self.options.requests,
                "delta": None if delta is None else delta.told,
            }
        )

    def _examined(self) -> Packer:
        """What this rank sends, proven to be sendable: the model is the mapped one, and holds no NaN."""
        rank, looks = self._group.rank, self.options.nonfinite == "refuse"
        with self._group.fail_together():
            live, _ = live_side(self._model, self._bridge.spec, self._meeting.layout, rank)
            if looks and self.options.quantization is not None:  # quantized, values are others
                require_finite(live, rank)
        packer = Packer(self.route, rank, self._quantized(live), self._meeting.hf_dtypes)
        with self._group.fail_together():
            refuse_nonfinite(
                packer.examine(with_digests=self.options.verify, looks=looks and self.options.quantization is None), rank
            )
        return packer

    def _quantized(self, live: LiveParameters) -> Mapping[str, Tensor]:
        if self.options.quantization is None:
            return live
        side = megatron_side(self._meeting.spec, self._meeting.layout, self._group.rank)
        return QuantizedLive(self._meeting.spec, self.options.quantization, side, live, self._group)

    def _encoded(self, deltas: DeltaSender, packer: Packer) -> Delta | None:
        """What changed; `None` where an engine holds something else than the last version, or everything is not more."""
        held = self._group.first_rank_does(self._engines.proofs)
        base = deltas.base
        others = base is None or any(proofs != base[1] for proofs in held or ())
        if self._group.maximum(torch.tensor([int(others)])).item() or base is None:
            return None
        with self._group.fail_together():
            mine = deltas.encode(packer.pack)
        delta = Delta.of(self.route, *base, self._group.sum(mine).tolist())
        if delta.nbytes < sum(map(carried_bytes, self.route.workers)):
            return delta
        deltas.abort()
        return None

    def _send(self, outlet: Outlet, packer: Packer, sent: Route, watch: Stopwatch) -> None:
        """Packs and sends this rank's parts."""
        own = self.route.parts_of(self._group.rank)
        for (worker, index, part), (_, _, as_sent) in zip(own, sent.parts_of(self._group.rank), strict=True):
            changes = self._deltas.take(worker, index) if self._deltas is not None else None
            with watch("wire"):
                into = outlet.place(worker.rank, index, as_sent)
            with watch("pack"):
                if changes is not None:
                    into.copy_(changes)
                else:
                    packer.pack(worker, part, into)
                    if self._deltas is not None and part.pieces:
                        self._deltas.hold(worker, index, into)
            with watch("wire"):
                outlet.send(worker.rank, index, as_sent)
        with watch("wire"):
            outlet.finish()

    def _verify(self, version: int, packer: Packer) -> tuple[str | None, list[str]]:
        """What arrived is what the trainer holds; returns the digest of all weights, and the proofs of what the workers get."""
        with self._group.fail_together():
            self._connection.way.verify(self.options.verify)
        self._group.first_rank_does(lambda: self._engines.wait_for_arrival(self._timeout))
        return packer.proven(version, self._group) if self.options.verify else (None, [])

    def _commit(self, version: int) -> tuple[Sequence[EngineOutcome], list[dict[str, Any]]]:
        """Every engine's outcome, on all ranks; the reports of those that committed, on rank 0."""
        options, replicas = self.options, self._connection.replicas
        outcomes, reports = outcomes_of(
            self._group, version, replicas, lambda: self._engines.commit(version, options.requests, options.timeout)
        )
        for outcome in outcomes:
            if outcome.error is not None:
                _log.warning("engine %d did not commit version %d, and refuses: %s", outcome.engine, version, outcome.error)
        return outcomes, reports

    def _abort(self, version: int, error: BaseException) -> None:
        self._connection.way.abandon()
        if self._deltas is not None:
            self._deltas.abort()
        if self._group.rank == 0:
            self._engines.abort(f"version {version} was given up: {type(error).__name__}: {error}")

    def _connect_members(self) -> None:
        """Where engines joined or left, the transport is opened anew for those that are there."""
        generation = int(self._group.maximum(torch.tensor([self._engines.generation])).item())
        if generation == self._generation:
            return
        replicas, hosts = self._group.share_plain((len(self._engines.all), self._engines.hosts))
        if not replicas:
            raise SyncError("no engine takes part any more: add_engine comes first")
        self._connection.way.close()
        self._connection = self._connected(hosts, replicas)
        self._generation = generation

    def _connected(self, engine_hosts: AbstractSet[str], replicas: int) -> Connection:
        members = {"engine_hosts": engine_hosts, "replicas": replicas}
        return connect(self._meeting, self._model, self._store, self._group, self.options, **members)

    def _goes_on_without_lost(self, error: Exception) -> bool:
        """Whether the failure is of engines that died, and the others can go on."""
        if self.options.lost_engines == "raise" or not isinstance(error, SyncError) or isinstance(error, RanksUnreachable):
            return False
        if not self._group.on_first_rank(self._engines.dismiss_lost):
            return False
        self._connect_members()
        return True


@cache
def _session_of(pid: int) -> str:
    """Names this trainer to the stores that engines' workers fill on their own hosts (`writer_lock`). One name for all syncs of
    a process, since an engine that takes no part in the next one keeps its lock; by pid, since forked trainers are others."""
    return secrets.token_hex(16)
