"""Refit: moves the trainer's weights into running engines, as one versioned transaction per sync.

    begin(version) -> transfer -> verify -> commit | abort

One static plan says which rectangle of which trainer rank each engine worker keeps; every worker receives those bytes and no
others. In mode `staged` the bytes arrive beside the weights that are served, are verified there, and replace them in one short
pause. In mode `streaming` they replace the served weights as they arrive.

This file reads in that order: the public methods of `WeightSync`, then the steps of one attempt, then what holds between syncs.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import EngineMismatch, RanksUnreachable, SyncError
from mbridge_rl.core.finite import refuse_nonfinite, require_finite
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.distributed.live_fp8 import QuantizedLive
from mbridge_rl.megatron.parameters import LiveParameters, live_side
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.sync.payload.delta import Delta, carried_bytes
from mbridge_rl.sync.payload.messages import CommitReport, HostStore, UpdateRequest
from mbridge_rl.sync.payload.route import Route
from mbridge_rl.sync.payload.wires import StoreWire, Wire
from mbridge_rl.sync.pull import published, restore
from mbridge_rl.sync.record import phases
from mbridge_rl.sync.record.report import EngineOutcome, SyncReport
from mbridge_rl.sync.record.sinks import Sink
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.image import new_fill
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.committed import Committed, report_of
from mbridge_rl.sync.trainer.delta_sender import DeltaSender
from mbridge_rl.sync.trainer.engines import Engine, Engines, outcomes_of
from mbridge_rl.sync.trainer.joining import introduce, load_committed
from mbridge_rl.sync.trainer.meeting import ON_ONE_HOST, Connection, connect, held_store, meet, session_of
from mbridge_rl.sync.trainer.packer import Packer
from mbridge_rl.sync.trainer.retries import with_retries
from mbridge_rl.sync.trainer.sending import send_parts
from mbridge_rl.sync.transports import fails_with
from mbridge_rl.sync.transports.waiting import Timeout

_log = logging.getLogger(__name__)


class WeightSync:
    """Keeps the weights of engines equal to those of a live Megatron model. All trainer ranks make it together, once; `sync` is
    collective.

    Example, for a trainer of one process (`torchrun` runs the same lines on every rank, with the engine on rank 0 only):

        bridge = AutoBridge.from_pretrained(checkpoint)
        initialize_parallel(ParallelLayout())
        model = bridge.build_model()
        bridge.load_weights(model)
        engine = InProcessEngine(checkpoint, max_model_len=64)  # or another engine of `sync.vllm`
        weight_sync = WeightSync(bridge, model, engine, mode="staged")
        report = weight_sync.sync(version=1)  # after a training step; then again with version=2, ...
        print(f"{report.nbytes} bytes, digest {report.digest}, {report.seconds:.3f} s")
        weight_sync.close()

    Args:
        bridge: the bridge of the model.
        model: this rank's model chunks (`AutoBridge.build_model`); adapters are merged into what is sent.
        client: the client of the engine, or of several engines of equal layout, on rank 0; `None` on the other ranks.
        dtype: the dtype of the policy in the engines; `None` means the model's dtype.
        sinks: get the report of every sync from rank 0, of failed ones too (`sync.record.sinks`); the log has them anyway.
        options: the options; alternatively fields of `SyncOptions` by keyword.

    Raises:
        SyncError: no engine was given. EngineMismatch: an engine's model is not the bridge's. PlanError: the trainer does not
            hold something that an engine needs. StoreError: another trainer of this host writes to a store of this name. No
            weight is changed.
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
        self._membership = 0  # the membership of the engines that the connection reaches
        self._slot = 0  # workers on other hosts fill two slots in turn: the index of the next one
        self._images = secrets.token_hex(8)  # prefix of the tokens of those slots, unique to this object
        self._planning = Stopwatch(phases.lane(self._group.rank))
        self._store = held_store(self.options, self._group)
        try:
            with self._planning(phases.PLAN):
                self._meeting = meet(bridge, model, self._engines, self._group, self.options, dtype)
                self._group.first_rank_does(
                    lambda: self._store.describe(self.route.fingerprint, self._meeting.introduction.as_json)
                )
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
            NonFiniteWeights, StateMismatchError: the weights must not be sent; nothing was sent.
            SyncError: on every rank, if a step failed on any rank before the commit, or if the commit of every engine failed.
                The engines then serve the old version or, if live weights were written already, refuse to generate and name
                the version that they lost. If only some engines fail to commit, the others serve the new version, and the
                report names the failed ones.
        """
        with self._engines.turn:
            self._connect_members()
            return self._sync(version)

    def add_engine(self, engine: Engine) -> int | None:
        """Adds an engine, which takes part from the next sync on. Call it on rank 0 only, from any thread; it waits for a
        running sync to end.

        Returns:
            The version that the engine serves now: the one committed last, if the weight store of its host holds it; otherwise
            `None`, and the engine gets its first version from the next sync.

        Raises:
            EngineMismatch: the engine's model or layout differs from the others', or the chosen transport does not reach it.
        """
        hosts = {worker.host for worker in introduce(engine, self._meeting.introduction)}
        is_local = hosts == {machine_id()}
        if not is_local and self.options.transport in ON_ONE_HOST:
            raise EngineMismatch(
                f"the engine that joins is on {sorted(hosts)}, where the transport {self.options.transport!r} does not reach"
            )
        version = None
        with self._engines.turn:
            head = self._store.head() if is_local else None
            if head is not None and head.fingerprint == self.route.fingerprint:
                version = load_committed(engine, self._store, head, self.options.requests, self.options.timeout).version
            self._engines.admit(engine, hosts)
        return version

    def remove_engine(self, engine: Engine) -> None:
        """Removes an engine, which keeps its weights. Call it on rank 0 only, from any thread; it waits for a running sync to
        end.

        Raises:
            SyncError: the engine takes no part.
        """
        with self._engines.turn:
            self._engines.dismiss(engine)

    def pull(self, engine: int = 0) -> None:
        """Copies the weights that an engine serves into the trainer's live model, whatever its layout, and proves them by
        digest. All ranks call it together. The engine must be on the trainer's host (`sync.pull.restore_from_store` needs no
        engine).

        Args:
            engine: index of the engine in `engines`.

        Raises:
            SyncError: the engine holds no version, quantized weights, or tensors that only its own loader can place.
            DigestMismatch: the bytes that arrived are not those that the engine serves.
        """
        if self.options.quantization is not None:
            raise SyncError("the engines hold quantized weights, which a trainer cannot go on from: restore a checkpoint")

        def publish(paths: Sequence[str]) -> None:
            self._engines.all[engine].publish(paths)

        with published(self.route.workers, publish, self._group) as images:
            restore(self._bridge, self._model, self.route.workers, images, self._group)

    def close(self) -> None:
        """Frees shared memory; a store with a name stays. The engines keep their weights."""
        self._connection.transport.close()
        self._engines.close()
        if self._group.rank == 0:
            self._store.close()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that take part, on rank 0 (empty on the other ranks)."""
        return self._engines.all

    @property
    def route(self) -> Route:
        """What each engine worker receives."""
        return self._meeting.route

    @property
    def store(self) -> WeightStore:
        """The weight store from which engines catch up (with the transport `shared_memory` in mode `staged`)."""
        return self._store

    def _sync(self, version: int) -> SyncReport:
        return with_retries(
            version,
            lambda watch, is_first: self._attempt(version, watch, can_be_delta=is_first),
            partial(self._report, version),
            lane=phases.lane(self._group.rank),
            retries=self.options.retries,
            sinks=self._sinks,
            goes_on=self._goes_on_without_lost,
        )

    def _attempt(self, version: int, watch: Stopwatch, *, can_be_delta: bool) -> Committed:
        """One transaction: begin, transfer, verify, and commit or abort."""
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
                wire, outlet = self._connection.transport.open(version, sent)
                began = True
                self._group.first_rank_does(lambda: self._begin(version, wire, delta))
            with (
                watch("transfer"),
                self._engines.with_engine_errors(self._group),
                self._group.fail_together(),
                fails_with(outlet),
            ):
                send_parts(self._group.rank, self.route, sent, outlet, packer, self._deltas, watch)
            with watch("verify"):
                digest, proofs = self._verify(version, packer)
            with watch("decide"):
                self._group.first_rank_does(lambda: self._connection.transport.commit(version, digest, proofs))
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
            other_spans = phases.of_other_ranks(watch.spans, self._group)
        return Committed(digest, delta, outcomes, reports, other_spans)

    def _examined(self) -> Packer:
        """The packer of this rank, after its checks: the model is the one that the bridge maps and holds no NaN or infinity."""
        rank, check_finite = self._group.rank, self.options.nonfinite == "refuse"
        with self._group.fail_together():
            live, _ = live_side(self._model, self._bridge.spec, self._meeting.layout, rank)
            if check_finite and self.options.quantization is not None:
                require_finite(live, rank)  # here, because the packer sees the quantized values
                check_finite = False
        packer = Packer(self.route, rank, self._quantized(live), self._meeting.hf_dtypes)
        with self._group.fail_together():
            refuse_nonfinite(packer.examine(with_digests=self.options.verify, check_finite=check_finite), rank)
        return packer

    def _quantized(self, live: LiveParameters) -> Mapping[str, Tensor]:
        if self.options.quantization is None:
            return live
        side = megatron_side(self._meeting.spec, self._meeting.layout, self._group.rank)
        return QuantizedLive(self._meeting.spec, self.options.quantization, side, live, self._group)

    def _encoded(self, deltas: DeltaSender, packer: Packer) -> Delta | None:
        """The changes since the last version; `None` if an engine holds other weights than that version, or if the changes are
        not smaller than everything."""
        engine_proofs = self._group.first_rank_does(self._engines.proofs)
        base = deltas.base
        has_other_base = base is None or any(proofs != base[1] for proofs in engine_proofs or ())
        if self._group.maximum(torch.tensor([int(has_other_base)])).item() or base is None:
            return None
        with self._group.fail_together():
            own_sizes = deltas.encode(packer.pack)
        delta = Delta.of(self.route, *base, self._group.sum(own_sizes).tolist())
        if delta.nbytes < sum(map(carried_bytes, self.route.workers)):
            return delta
        deltas.abort()
        return None

    def _begin(self, version: int, wire: Wire, delta: Delta | None) -> None:
        """Opens the update in all engines. It is called on rank 0 only."""
        request = UpdateRequest(
            version=version,
            fill=wire.fill if isinstance(wire, StoreWire) else new_fill(),
            fingerprint=self.route.fingerprint,
            mode=self.options.mode,
            wire=wire,
            timeout=self.options.timeout,
            requests=self.options.requests,
            store=None if isinstance(wire, StoreWire) else self._store_on_other_hosts(),
            delta=None if delta is None else delta.message,
        )
        self._engines.begin(request)

    def _store_on_other_hosts(self) -> HostStore:
        return HostStore(
            name=self._store.name,
            directory=str(self._store.directory),
            temporary=self._store.temporary,
            session=session_of(os.getpid()),
            token=f"{self._images}x{self._slot}",
            sizes=tuple(worker.nbytes for worker in self.route.workers),
        )

    def _verify(self, version: int, packer: Packer) -> tuple[str | None, list[str]]:
        """Waits until the weights have arrived and are verified.

        Returns:
            The digest of all weights, and the proof of every worker's weights; `(None, [])` without verification.
        """
        with self._group.fail_together():
            self._connection.transport.verify(self.options.verify)
        self._group.first_rank_does(lambda: self._engines.wait_for_arrival(self._timeout))
        return packer.proven(version, self._group) if self.options.verify else (None, [])

    def _commit(self, version: int) -> tuple[Sequence[EngineOutcome], list[CommitReport]]:
        """Commits in every engine. Returns the outcome of every engine on all ranks, and the reports of the engines that
        committed on rank 0."""
        options, replicas = self.options, self._connection.replicas
        outcomes, reports = outcomes_of(
            self._group, version, replicas, lambda: self._engines.commit(version, options.requests, options.timeout)
        )
        for outcome in outcomes:
            if outcome.error is not None:
                _log.warning("engine %d did not commit version %d, and refuses: %s", outcome.engine, version, outcome.error)
        return outcomes, reports

    def _abort(self, version: int, error: BaseException) -> None:
        """Gives the update up on this rank and, on rank 0, in all engines."""
        self._connection.transport.abort()
        if self._deltas is not None:
            self._deltas.abort()
        if self._group.rank == 0:
            self._engines.abort(f"version {version} was given up: {type(error).__name__}: {error}")

    def _report(self, version: int, watches: Sequence[Stopwatch], committed: Committed | None, error: str) -> SyncReport:
        """The report of a sync whose last attempt ended just now; `committed` is `None` if that failed with `error`."""
        planning, self._planning = self._planning.spans, Stopwatch("")
        return report_of(
            version,
            watches,
            committed or Committed(),
            error,
            options=self.options,
            route=self.route,
            transport=self._connection.name,
            tensors=len(self._meeting.spec.hf_shapes),
            rank=self._group.rank,
            planning=planning,
        )

    def _connect_members(self) -> None:
        """Opens the transport anew if engines joined or left since it was opened. All ranks call it together."""
        membership = int(self._group.maximum(torch.tensor([self._engines.membership])).item())
        if membership == self._membership:
            return
        replicas, hosts = self._group.share_plain((len(self._engines.all), self._engines.hosts))
        if not replicas:
            raise SyncError("no engine takes part any more: add_engine comes first")
        self._connection.transport.close()
        self._connection = self._connected(hosts, replicas)
        self._membership = membership

    def _connected(self, engine_hosts: AbstractSet[str], replicas: int) -> Connection:
        meeting, store, group = self._meeting, self._store, self._group
        return connect(meeting, self._model, store, group, self.options, engine_hosts=engine_hosts, replicas=replicas)

    def _goes_on_without_lost(self, error: Exception) -> bool:
        """Whether the sync failed because engines died, and can go on with the others. Removes the dead ones."""
        if self.options.lost_engines == "raise" or not isinstance(error, SyncError) or isinstance(error, RanksUnreachable):
            return False
        if not self._group.on_first_rank(self._engines.dismiss_lost):
            return False
        self._connect_members()
        return True
