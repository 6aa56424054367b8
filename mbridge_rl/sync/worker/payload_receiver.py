"""An engine worker's end of a planned sync: the bytes of its image arrive, are proven, and become its parameters.

In mode `staged` the image is completed and verified beside the live weights, and `commit` copies it over. In mode `streaming`
every bucket goes straight into the parameters as it arrives, which needs the least memory; a failure then loses the version
that was served. This module does not know the engine: it changes the engine's model through `Model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, combine
from mbridge_rl.core.digest_kernel import compile_ahead
from mbridge_rl.core.errors import DeltaRefused, EngineMismatch, SyncError, listed
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.sync.options import Mode
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.delta import shrunk
from mbridge_rl.sync.payload.fit import each_written_once, is_whole, require_place
from mbridge_rl.sync.payload.packing import Digests, proof_of
from mbridge_rl.sync.payload.route import WorkerRoute, fingerprint_of
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.transports import Wire
from mbridge_rl.sync.worker.serving_state import Serving
from mbridge_rl.sync.worker.update import Model, Update


class PayloadReceiver:
    """Receives the weights of one worker.

    Args:
        model: the model that is written.
        serving: the state of the worker.
    """

    def __init__(self, model: Model, serving: Serving) -> None:
        self._model, self.serving = model, serving
        self._route: WorkerRoute | None = None
        self._introduction: Mapping[str, Any] = {}
        self._update: Update | None = None
        self._error: BaseException | None = None  # the error of a dropped update, for a status that is asked for later
        self._store: WeightStore | None = None  # holds images that come from other hosts

    @property
    def route(self) -> WorkerRoute:
        if self._route is None:
            raise SyncError("this worker was given no route: the trainer has to introduce itself first")
        return self._route

    @property
    def fingerprint(self) -> str:
        return self._introduction.get("fingerprint", "")

    @property
    def is_open(self) -> bool:
        """Whether a planned update is under way."""
        return self._update is not None

    def adopt(self, rank: int, introduction: Mapping[str, Any]) -> None:
        """Learns what every later sync brings to worker `rank`. No weight is changed.

        Args:
            introduction: the trainer's introduction (`trainer.meeting.Meeting`): the routes of all workers, and what the weight
                store keeps with them.

        Raises:
            EngineMismatch: the introduction was damaged on its way, or a piece does not fit its parameter.
        """
        if (fingerprint := fingerprint_of(introduction["route"])) != introduction["fingerprint"]:
            raise EngineMismatch(
                f"the trainer's plan has fingerprint {fingerprint} as it arrived, {introduction['fingerprint']} as it was sent"
            )
        route = WorkerRoute.from_json(introduction["route"][rank])
        with self._model.plain():
            parameters = self._model.parameters()
            for piece in route.pieces:
                require_place(piece, parameters)
            final = not self._model.settles and each_written_once(route, parameters)
        if introduction["verify"]:
            compile_ahead()
        self.abort("another trainer introduced itself")
        if self._store is not None:
            self._store.stop_writing()  # it has the last trainer's images; the new trainer may bring others of the same name
        self._route, self._introduction, self._writes_are_final = route, introduction, final

    def receive(
        self,
        version: int,
        fingerprint: str,
        mode: Mode,
        wire: Wire,
        timeout: float,
        delta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to receive `version` and returns; `status` reports the progress.

        Args:
            version: the version that arrives.
            fingerprint: the fingerprint of the sender's route.
            mode: how the bytes replace the live weights.
            wire: what the inlet needs to find the sender.
            timeout: seconds, for every single wait.
            delta: if the version arrives as changes: for every worker the proof of the weights that the changes start from
                (`base`), and the sizes that `shrunk` takes (`sizes`).

        Raises:
            EngineMismatch: the sender has another route. DeltaRefused: the changes do not start from this worker's weights.
        """
        if self.serving.updating is not None:
            self.abort(f"the update to version {version} began before it was committed")
        route = self.route
        if fingerprint != self.fingerprint:
            raise EngineMismatch(
                f"the sender's plan has fingerprint {fingerprint!r}, this worker was given {self.fingerprint!r}: "
                "make a new WeightSync for this engine"
            )
        if delta is not None and delta["base"][route.rank] != self.serving.proof:
            raise DeltaRefused(
                f"the changes to version {version} do not start from what worker {route.rank} holds ({self.serving.name}): a "
                "full sync has to come"
            )
        self.serving.begin(version, serves_on=mode == "staged")
        with self.serving.failing(self.abort, f"the update to version {version} could not begin"):
            arriving = route if delta is None else shrunk(route, delta["sizes"][route.rank])
            store, final = self._store_of(wire), self._writes_are_final
            introduction = self._introduction
            self._update = Update(self._model, self.serving, route, arriving, introduction, final, store, mode, wire, timeout)
            self._update.start()

    def status(self) -> dict[str, Any]:
        """The progress of the update.

        Returns:
            `arrived` (whether everything has arrived and, in mode `staged`, was verified), `error` (a `Failure` as JSON, or
            `None`), and `proof` and `fill` of the live weights.
        """
        update, error = self._update, self._error if self._update is None else self._update.error
        return {
            "arrived": update is not None and update.finished,
            "error": None if error is None else Failure.of(error).to_json(),
            "proof": self.serving.proof,
            "fill": self.serving.fill,
        }

    def commit(self, version: int, fill: str | None = None) -> dict[str, Any]:
        """Makes the weights that arrived the live weights, proves that they are, and serves them.

        Args:
            version: the version of the open update.
            fill: the fill of the update that is meant, if its sender named one: another update of the same version may be open.

        Returns:
            A report in plain JSON types: `version`, `fill`, `rank`, `tensors`, `bytes` (the bytes that came over the wire, with
            alignment and digests), `digests` (by HF name, in hex, of what this worker holds and no other worker counts),
            `whole` (the names of the tensors that the engine's own loader took), `seconds` by phase, `spans`
            (`sync.record.timeline.Span`).

        Raises:
            SyncError: no such update is open, or receiving it failed. DigestMismatch: the live weights are not bit for bit the
                trainer's.
        """
        update = self._update
        if update is None or self.serving.updating is None:
            raise SyncError("receive(version) has to come before commit(version)")
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
            report = update.prove()
            with update.watch("derive"):
                self._model.derive()
            update.opened = False
            update.keep()
        self._update = self._error = None
        update.close()
        self.serving.commit(None if update.expected is None else proof_of(version, update.expected), update.fill)
        spans = [span.to_json() for span in update.watch.spans]
        identity = {"version": version, "fill": update.fill, "rank": self.route.rank}
        return report | identity | {"seconds": update.watch.seconds, "spans": spans}

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

    def close(self) -> None:
        """Drops an open update, and frees shared memory that only this worker uses."""
        self.abort("the engine is closed")
        if self._store is not None:
            self._store.close()
            self._store = None

    def _store_of(self, wire: Wire) -> WeightStore | None:
        """The store that keeps the images which come by `wire`; `None` if it names none."""
        if "store" not in wire:
            return None
        if self._store is None or (self._store.name, self._store.session) != (wire["store"], wire["session"]):
            if self._store is not None:
                self._store.close()
            directory, temporary = wire["directory"], wire["temporary"]
            self._store = WeightStore(wire["store"], directory, temporary=temporary, session=wire["session"])
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
        if unreadable := {piece.hf_name for piece in self.route.pieces if is_whole(piece)}:
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
        counted = (piece for piece in self.route.pieces if piece.counted and not is_whole(piece))
        with self._model.plain():
            return packing.live_digests(counted, self._model.parameters())


def merged_report(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of an engine's commit, made of its workers' reports. It has the digest of all weights together.

    Raises:
        SyncError: the workers did not all commit the same version and fill.
    """
    committed = [(report["version"], report["fill"]) for report in reports]
    if len(set(committed)) > 1:
        raise SyncError(f"the workers of one engine committed different versions: {committed} (version and fill, by worker)")
    digests: Digests = {}
    for report in reports:
        for hf_name, value in report["digests"].items():
            digests[hf_name] = add(digests.get(hf_name, 0), int(value, 16))
    loader_names = {hf_name for report in reports for hf_name in report["whole"]}
    phases = {phase for report in reports for phase in report["seconds"]}
    return {
        "version": reports[0]["version"],
        "fill": reports[0]["fill"],
        "workers": len(reports),
        "bytes": sum(report["bytes"] for report in reports),
        "bytes_per_worker": [report["bytes"] for report in reports],
        "digest": combine(digests) if digests else None,
        "proven_live": len(digests.keys() - loader_names),
        "proven_received": len(digests.keys() & loader_names),
        "seconds": {phase: max(report["seconds"].get(phase, 0.0) for report in reports) for phase in sorted(phases)},
        "spans": [span for report in reports for span in report["spans"]],
    }
