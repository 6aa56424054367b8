"""An engine worker's end of a planned sync: the bytes of its image arrive, are proven, and become its parameters.

In mode `staged` the image is completed and verified beside the live weights, and `commit` copies it over. In mode `streaming`
every bucket goes straight into the parameters as it arrives, which needs the least memory; a failure then loses the version
that was served. This module does not know the engine: it changes the engine's model through `Model`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, combine
from mbridge_rl.core.digest_kernel import compile_ahead
from mbridge_rl.core.errors import DeltaRefused, EngineMismatch, SyncError, listed
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.delta import shrunk
from mbridge_rl.sync.payload.fit import each_written_once, goes_unsplit, require_place
from mbridge_rl.sync.payload.messages import CommitReport, HostStore, Introduction, UpdateRequest, WorkerReport, WorkerStatus
from mbridge_rl.sync.payload.packing import Digests, proof_of
from mbridge_rl.sync.payload.route import WorkerRoute, fingerprint_of
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.worker.serving_state import Serving
from mbridge_rl.sync.worker.update import Adopted, Model, Update


class PayloadReceiver:
    """Receives the weights of one worker.

    Args:
        model: the model that is written.
        serving: the state of the worker.
    """

    def __init__(self, model: Model, serving: Serving) -> None:
        self._model, self.serving = model, serving
        self._adopted: Adopted | None = None
        self._update: Update | None = None
        self._error: BaseException | None = None  # the error of a dropped update, for a status that is asked for later
        self._store: WeightStore | None = None  # holds images that come from other hosts

    @property
    def route(self) -> WorkerRoute:
        return self._require_adopted().route

    @property
    def fingerprint(self) -> str:
        return "" if self._adopted is None else self._adopted.introduction.fingerprint

    @property
    def is_open(self) -> bool:
        """Whether a planned update is under way."""
        return self._update is not None

    def adopt(self, rank: int, introduction: Introduction) -> None:
        """Learns what every later sync brings to worker `rank`. No weight is changed.

        Raises:
            EngineMismatch: the introduction was damaged on its way, or a piece does not fit its parameter.
        """
        if (fingerprint := fingerprint_of(introduction.routes)) != introduction.fingerprint:
            raise EngineMismatch(
                f"the trainer's plan has fingerprint {fingerprint} as it arrived, {introduction.fingerprint} as it was sent"
            )
        route = introduction.routes[rank]
        with self._model.plain():
            parameters = self._model.parameters()
            for piece in route.pieces:
                require_place(piece, parameters)
            final = not self._model.settles and each_written_once(route, parameters)
        if introduction.verify:
            compile_ahead()
        self.abort("another trainer introduced itself")
        if self._store is not None:
            self._store.stop_writing()  # it has the last trainer's images; the new trainer may bring others of the same name
        self._adopted = Adopted(introduction, route, writes_are_final=final)

    def begin(self, request: UpdateRequest) -> None:
        """Starts to receive a version and returns; `status` reports the progress.

        Raises:
            EngineMismatch: the sender has another route. DeltaRefused: the changes do not start from this worker's weights.
        """
        if self.serving.updating is not None:
            self.abort(f"the update to version {request.version} began before it was committed")
        adopted, version, delta = self._require_adopted(), request.version, request.delta
        route = adopted.route
        if request.fingerprint != self.fingerprint:
            raise EngineMismatch(
                f"the sender's plan has fingerprint {request.fingerprint!r}, this worker was given {self.fingerprint!r}: "
                "make a new WeightSync for this engine"
            )
        if delta is not None and delta.proofs[route.rank] != self.serving.proof:
            raise DeltaRefused(
                f"the changes to version {version} do not start from what worker {route.rank} holds ({self.serving.name}): a "
                "full sync has to come"
            )
        self.serving.begin(version, serves_on=request.mode == "staged")
        with self.serving.failing(self.abort, f"the update to version {version} could not begin"):
            arriving = route if delta is None else shrunk(route, delta.sizes[route.rank])
            store = None if request.store is None else self._opened_store(request.store)
            self._update = Update(self._model, self.serving, adopted, arriving, request, store)
            self._update.start()

    def status(self) -> WorkerStatus:
        """The progress of the update, and what the worker serves."""
        update, error = self._update, self._error if self._update is None else self._update.error
        return WorkerStatus(
            arrived=update is not None and update.finished,
            failure=None if error is None else Failure.of(error),
            proof=self.serving.proof,
            fill=self.serving.fill,
        )

    def commit(self, version: int, fill: str | None = None) -> WorkerReport:
        """Makes the weights that arrived the live weights, proves that they are, and serves them.

        Args:
            version: the version of the open update.
            fill: the fill of the update that is meant, if its sender named one: another update of the same version may be open.

        Raises:
            SyncError: no such update is open, or receiving it failed. DigestMismatch: the live weights are not bit for bit the
                trainer's.
        """
        update = self._update
        if update is None or self.serving.updating is None:
            raise SyncError("begin has to come before commit")
        if version != self.serving.updating:
            raise SyncError(f"version {version} cannot be committed: the open update is to version {self.serving.updating}")
        if fill is not None and fill != update.fill:
            raise SyncError(f"fill {fill} of version {version} cannot be committed: the open update brings fill {update.fill}")
        self.serving.written = (
            True  # decided: whatever fails now, this worker must not serve the old version beside the new one
        )
        with self.serving.failing(self.abort, f"the update to version {version} failed at commit"):
            update.join()
            if update.mode == "staged":
                self.serving.block()
                update.load_staged()
            with update.watch("settle"):
                self._model.settle()
            proven = update.prove()
            with update.watch("derive"):
                self._model.derive()
            update.opened = False
            update.keep()
        self._update = self._error = None
        update.close()
        self.serving.commit(None if update.expected is None else proof_of(version, update.expected), update.fill)
        return WorkerReport(
            version=version,
            fill=update.fill,
            rank=self.route.rank,
            bytes=update.received,
            digests={hf_name: f"{value:016x}" for hf_name, value in proven.items()},
            unsplit=update.unsplit_names,
            seconds=update.watch.seconds,
            spans=tuple(update.watch.spans),
        )

    def abort(self, reason: str) -> None:
        """Drops an open update."""
        update, self._update = self._update, None
        if update is not None:
            self._error = update.error  # taken before the stop, which causes errors of its own
            update.stop()
            if update.opened:
                self._model.settle()
                self._model.derive()
            update.close()
        if self.serving.updating is not None:
            self.serving.abort(reason)

    def lose(self, version: int, reason: str, fill: str | None) -> None:
        """Blocks this worker because the commit of `version` failed in some worker of the engine: then none of them serves.

        Args:
            version: the version that was lost.
            reason: why.
            fill: the fill of the update, which is dropped if it is still open.
        """
        if self._update is not None and self._update.fill == fill:
            self.abort(reason)
        self.serving.lose(version, reason)

    def close(self, reason: str = "the engine is closed") -> None:
        """Drops an open update, and frees shared memory that only this worker uses."""
        self.abort(reason)
        if self._store is not None:
            self._store.close()
            self._store = None

    def _require_adopted(self) -> Adopted:
        if self._adopted is None:
            raise SyncError("this worker was given no route: the trainer has to introduce itself first")
        return self._adopted

    def _opened_store(self, named: HostStore) -> WeightStore:
        """The store of this host that keeps the images."""
        if self._store is None or (self._store.name, self._store.session) != (named.name, named.session):
            if self._store is not None:
                self._store.close()
            self._store = WeightStore(named.name, named.directory, temporary=named.temporary, session=named.session)
        return self._store

    def publish(self, into: Tensor) -> None:
        """Packs the live parameters as an image, with their digests, for a trainer that reads them.

        Args:
            into: uint8 `[route.nbytes]`.

        Raises:
            SyncError: the worker holds weights of no version, or tensors that only its own loader can place.
        """
        if self.serving.guard.reason is not None:
            raise SyncError(f"this worker has no weights to give: {self.serving.guard.reason}")
        if unreadable := {piece.hf_name for piece in self.route.pieces if goes_unsplit(piece)}:
            raise SyncError(f"{listed(unreadable)} cannot be read back: only its own loader knows where this worker keeps them")
        with self._model.plain():
            parameters = self._model.parameters()
            digests = packing.live_digests(self.route.pieces, parameters)
            for bucket in self.route.buckets:
                for part in bucket.parts:
                    target = into[part.start : part.start + part.nbytes]
                    packing.pack(part, target, lambda piece: packing.placed(piece.target, piece.shape, parameters))
        for position, part in enumerate(self.route.digest_parts):
            into_part = into[part.start : part.start + part.nbytes]
            packing.write_digests(self.route, digests if position == 0 else {}, into_part)

    def publish_to(self, path: str) -> None:
        """Calls `publish` on an arena that exists already at `path`."""
        arena = Arena.attach(path, self.route.nbytes, writable=True)
        try:
            self.publish(arena.view(0, (self.route.nbytes,), torch.uint8))
        finally:
            arena.close()

    def live_digests(self) -> Digests:
        """The digests of what the parameters hold now, by HF name, over the pieces that this worker counts."""
        counted = (piece for piece in self.route.pieces if piece.counted and not goes_unsplit(piece))
        with self._model.plain():
            return packing.live_digests(counted, self._model.parameters())


def merged_report(reports: Sequence[WorkerReport]) -> CommitReport:
    """The report of an engine's commit, made of its workers' reports. It has the digest of all weights together.

    Raises:
        SyncError: the workers did not all commit the same version and fill.
    """
    committed = [(report.version, report.fill) for report in reports]
    if len(set(committed)) > 1:
        raise SyncError(f"the workers of one engine committed different versions: {committed} (version and fill, by worker)")
    digests: Digests = {}
    for report in reports:
        for hf_name, value in report.digests.items():
            digests[hf_name] = add(digests.get(hf_name, 0), int(value, 16))
    loader_names = {hf_name for report in reports for hf_name in report.unsplit}
    phases = {phase for report in reports for phase in report.seconds}
    return CommitReport(
        version=reports[0].version,
        fill=reports[0].fill,
        workers=len(reports),
        bytes=sum(report.bytes for report in reports),
        bytes_per_worker=tuple(report.bytes for report in reports),
        digest=combine(digests) if digests else None,
        proven_live=len(digests.keys() - loader_names),
        proven_received=len(digests.keys() & loader_names),
        seconds={phase: max(report.seconds.get(phase, 0.0) for report in reports) for phase in sorted(phases)},
        spans=tuple(span for report in reports for span in report.spans),
    )
