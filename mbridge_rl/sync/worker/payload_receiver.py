"""An engine worker's end of a planned sync: the bytes of its image arrive, are proven, and become its parameters.

Staged: the image is completed and verified beside the live weights, and `commit` copies it over. Streaming: every bucket goes
straight into the parameters as it arrives, which needs least memory; a failure then loses the version that was served.
Nothing here knows the engine: it is reached through `Model`.
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
    """Receives what one worker keeps.

    Args:
        model: to be written.
        serving: the state of the worker.
    """

    def __init__(self, model: Model, serving: Serving) -> None:
        self._model, self.serving = model, serving
        self._route: WorkerRoute | None = None
        self._said: Mapping[str, Any] = {}
        self._update: Update | None = None
        self._error: BaseException | None = None  # of an update that was dropped; whoever asks late must find it
        self._store: WeightStore | None = None  # where images go that come from other hosts

    @property
    def route(self) -> WorkerRoute:
        if self._route is None:
            raise SyncError("this worker was given no route: the trainer has to introduce itself first")
        return self._route

    @property
    def fingerprint(self) -> str:
        return self._said.get("fingerprint", "")

    @property
    def is_open(self) -> bool:
        """A planned update is under way."""
        return self._update is not None

    def adopt(self, rank: int, said: Mapping[str, Any]) -> None:
        """What every later sync brings to worker `rank`. No weight is changed.

        Args:
            said: `introduction` of the trainer: the routes of all workers, and what a store keeps of them.

        Raises:
            EngineMismatch: it did not come as it was sent, or a piece does not fit the parameter that it is meant for.
        """
        if (found := fingerprint_of(said["route"])) != said["fingerprint"]:
            raise EngineMismatch(
                f"the trainer's plan has fingerprint {found} as it arrived, {said['fingerprint']} as it was sent"
            )
        route = WorkerRoute.from_json(said["route"][rank])
        with self._model.plain():
            parameters = self._model.parameters()
            for piece in route.pieces:
                require_place(piece, parameters)
            final = not self._model.settles and each_written_once(route, parameters)
        if said["verify"]:
            compile_ahead()
        self.abort("another trainer introduced itself")
        if self._store is not None:
            self._store.stop_writing()  # its images are the trainer's before; this one may bring others under the same name
        self._route, self._said, self._writes_are_final = route, said, final

    def receive(
        self,
        version: int,
        fingerprint: str,
        mode: Mode,
        wire: Wire,
        timeout: float,
        delta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to receive `version` and returns; `status` says how far it is.

        Args:
            delta: where it comes as changes: for every worker the proof of the weights that they start from (`base`), and what
                `shrunk` takes (`sizes`).

        Raises:
            EngineMismatch: the sender has another route. DeltaRefused: these weights are not what the changes start from.
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
            self._update = Update(self._model, self.serving, route, arriving, self._said, final, store, mode, wire, timeout)
            self._update.start()

    def status(self) -> dict[str, Any]:
        """`{"arrived": whether everything is there and, if staged, verified, "error": what went wrong, "proof" and "fill": of
        the live weights}`."""
        update, error = self._update, self._error if self._update is None else self._update.error
        return {
            "arrived": update is not None and update.finished,
            "error": None if error is None else Failure.of(error).to_json(),
            "proof": self.serving.proof,
            "fill": self.serving.fill,
        }

    def commit(self, version: int, fill: str | None = None) -> dict[str, Any]:
        """Makes the live weights those that arrived, proves it, and serves them.

        Args:
            fill: of the update that is meant, where its sender named it: another one of the same version may be open.

        Returns:
            A report in plain JSON types: `version`, `fill`, `tensors`, `bytes` (that the wire handed over, counted as they
            came: with alignment and digests), `digests` (of what this worker holds, by HF name, in hex, where no other worker
            counts it), `whole` (those that the engine's own loader took), `seconds` by
            phase, `spans` (`sync.record.timeline.Span`).

        Raises:
            SyncError: as it arose while receiving; DigestMismatch: live weights are not bit for bit the trainer's.
        """
        update = self._update
        if update is None or self.serving.updating is None:
            raise SyncError("receive(version) has to come before commit(version)")
        if version != self.serving.updating:
            raise SyncError(f"version {version} cannot be committed: the open update is to version {self.serving.updating}")
        if fill is not None and fill != update.fill:
            raise SyncError(f"fill {fill} of version {version} cannot be committed: the open update brings fill {update.fill}")
        self.serving.written = True  # it is decided: whatever fails now, the old version is not served beside others' new one
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
        names = {"version": version, "fill": update.fill, "rank": self.route.rank}
        return report | names | {"seconds": update.watch.seconds, "spans": spans}

    def abort(self, reason: str) -> None:
        """Drops an open update."""
        update, self._update = self._update, None
        if update is not None:
            self._error = update.error  # not what comes of the stop
            update.stop()
            if update.opened:
                self._model.settle()
                self._model.derive()
            update.close()
        if self.serving.updating is not None:
            self.serving.abort(reason)

    def lose(self, version: int, reason: str, fill: str | None) -> None:
        """The commit of `version` failed in some worker of the engine: none of them serves, whatever it holds.

        Args:
            fill: of the update, which is dropped where it is still open.
        """
        if self._update is not None and self._update.fill == fill:
            self.abort(reason)
        self.serving.lose(version, reason)

    def close(self) -> None:
        """Drops an open update, and shared memory that nobody else knows of."""
        self.abort("the engine is closed")
        if self._store is not None:
            self._store.close()
            self._store = None

    def _store_of(self, wire: Wire) -> WeightStore | None:
        if "store" not in wire:
            return None
        if self._store is None or (self._store.name, self._store.session) != (wire["store"], wire["session"]):
            if self._store is not None:
                self._store.close()
            directory, temporary = wire["directory"], wire["temporary"]
            self._store = WeightStore(wire["store"], directory, temporary=temporary, session=wire["session"])
        return self._store

    def publish(self, into: Tensor) -> None:
        """The way back: packs the live parameters as an image (uint8 `[route.nbytes]`), with their digests.

        Raises:
            SyncError: the worker holds weights of no version, or tensors that only its own loader can place.
        """
        if self.serving.guard.reason is not None:
            raise SyncError(f"this worker has no weights to give: {self.serving.guard.reason}")
        if whole := {piece.hf_name for piece in self.route.pieces if is_whole(piece)}:
            raise SyncError(f"where this worker keeps {listed(whole)} only its own loader knows: they cannot be read back")
        with self._model.plain():
            parameters = self._model.parameters()
            found = packing.live_digests(self.route.pieces, parameters)
            for bucket in self.route.buckets:
                for part in bucket.parts:
                    target = into[part.start : part.start + part.nbytes]
                    packing.pack(part, target, lambda piece: packing.placed(piece.target, piece.shape, parameters))
        for position, part in enumerate(self.route.digest_parts):
            into_part = into[part.start : part.start + part.nbytes]
            packing.write_digests(self.route, found if position == 0 else {}, into_part)

    def publish_to(self, path: str) -> None:
        """`publish` into a file of shared memory that exists already."""
        arena = Arena.attach(path, self.route.nbytes, writable=True)
        try:
            self.publish(arena.view(0, (self.route.nbytes,), torch.uint8))
        finally:
            arena.close()

    def live_digests(self) -> Digests:
        """What the parameters hold now, by HF name, of the pieces that this worker counts."""
        counted = (piece for piece in self.route.pieces if piece.counted and not is_whole(piece))
        with self._model.plain():
            return packing.live_digests(counted, self._model.parameters())


def merged_report(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an engine says of a commit, from its workers' reports: with the digest of all weights together.

    Raises:
        SyncError: they did not all commit the same.
    """
    committed = [(report["version"], report["fill"]) for report in reports]
    if len(set(committed)) > 1:
        raise SyncError(f"the workers of one engine committed different versions: {committed} (version and fill, by worker)")
    digests: Digests = {}
    for report in reports:
        for hf_name, value in report["digests"].items():
            digests[hf_name] = add(digests.get(hf_name, 0), int(value, 16))
    whole = {hf_name for report in reports for hf_name in report["whole"]}
    phases = {phase for report in reports for phase in report["seconds"]}
    return {
        "version": reports[0]["version"],
        "fill": reports[0]["fill"],
        "workers": len(reports),
        "bytes": sum(report["bytes"] for report in reports),
        "bytes_per_worker": [report["bytes"] for report in reports],
        "digest": combine(digests) if digests else None,
        "proven_live": len(digests.keys() - whole),
        "proven_received": len(digests.keys() & whole),
        "seconds": {phase: max(report["seconds"].get(phase, 0.0) for report in reports) for phase in sorted(phases)},
        "spans": [span for report in reports for span in report["spans"]],
    }
