"""An engine worker's end of a planned sync: the bytes of its image arrive, are proven, and become its parameters.

Staged: the image is completed and verified beside the live weights, and `commit` copies it over. Streaming: every bucket goes
straight into the parameters as it arrives, which needs least memory; a failure then loses the version that was served.
Nothing here knows the engine: it is reached through `Model`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, combine, digest
from mbridge_rl.core.errors import listed
from mbridge_rl.sync import packing
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.delta import DeltaInlet, carried_bytes, proof_of, shrunk
from mbridge_rl.sync.errors import DeltaRefused, DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.sync.packing import Digests
from mbridge_rl.sync.places import each_written_once, is_whole, require_place
from mbridge_rl.sync.route import Bucket, Piece, WorkerRoute, fingerprint_of
from mbridge_rl.sync.serving import Serving
from mbridge_rl.sync.store import StorePart, WeightStore
from mbridge_rl.sync.timeline import Stopwatch
from mbridge_rl.sync.transports import Inlet, Wire, open_inlet
from mbridge_rl.sync.waiting import Patience

logger = logging.getLogger(__name__)

Mode = Literal["staged", "streaming"]


class Model(Protocol):
    """The engine's model, as a worker changes it."""

    settles: bool  # whether `settle` may change, or move, what was written before it

    def parameters(self) -> Mapping[str, Tensor]:
        """The live parameters by name, as a loader fills them; between updates they may be read while the engine generates."""
        ...

    def plain(self) -> AbstractContextManager[object]:
        """A scope in which the parameters may be read as a loader fills them, between updates."""
        ...

    def open(self) -> None:
        """Called once before the first write of an update."""

    def load_whole(self, hf_name: str, tensor: Tensor) -> None:
        """Hands a whole HF tensor to the engine's own loader; the tensor is the loader's to keep."""

    def settle(self) -> None:
        """Called once after the last write: whatever the engine's own loader deferred is done."""

    def derive(self) -> None:
        """Called once after `settle`: the engine computes what it derives from its parameters."""


class ShardReceiver:
    """Receives what one worker keeps.

    Args:
        model: to be written.
        serving: the state of the worker.
    """

    def __init__(self, model: Model, serving: Serving) -> None:
        self._model, self.serving = model, serving
        self._route: WorkerRoute | None = None
        self._said: Mapping[str, Any] = {}
        self._update: _Update | None = None
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
        self.abort("another trainer introduced itself")
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
            self._update = _Update(self._model, self.serving, route, arriving, self._said, final, store, mode, wire, timeout)
            self._update.start()

    def status(self) -> dict[str, Any]:
        """`{"arrived": whether everything is there and, if staged, verified, "error": what went wrong, "proof": of the live
        weights}`."""
        update, error = self._update, None if self._update is None else self._update.error
        return {
            "arrived": update is not None and update.finished,
            "error": None if error is None else [type(error).__name__, str(error)],
            "proof": self.serving.proof,
        }

    def commit(self, version: int) -> dict[str, Any]:
        """Makes the live weights those that arrived, proves it, and serves them.

        Returns:
            A report in plain JSON types: `version`, `tensors`, `bytes` (received), `digests` (of what this worker holds, by HF
            name, in hex, where no other worker counts it), `whole` (those that the engine's own loader took), `seconds` by
            phase, `spans` (`sync.timeline.Span`).

        Raises:
            SyncError: as it arose while receiving; DigestMismatch: live weights are not bit for bit the trainer's.
        """
        update = self._update
        if update is None or self.serving.updating is None:
            raise SyncError("receive(version) has to come before commit(version)")
        if version != self.serving.updating:
            raise SyncError(f"version {version} cannot be committed: the open update is to version {self.serving.updating}")
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
        self._update = None
        update.close()
        self.serving.commit(None if update.expected is None else proof_of(version, update.expected))
        spans = [span.to_json() for span in update.watch.spans]
        return report | {"version": version, "rank": self.route.rank, "seconds": update.watch.seconds, "spans": spans}

    def abort(self, reason: str) -> None:
        """Drops an open update."""
        update, self._update = self._update, None
        if update is not None:
            update.stop()
            if update.opened:
                self._model.settle()
                self._model.derive()
            update.close()
        if self.serving.updating is not None:
            self.serving.abort(reason)

    def close(self) -> None:
        """Drops an open update, and shared memory that nobody else knows of."""
        self.abort("the engine is closed")
        if self._store is not None:
            self._store.close()
            self._store = None

    def _store_of(self, wire: Wire) -> WeightStore | None:
        if "store" not in wire:
            return None
        if self._store is None or self._store.name != wire["store"]:
            if self._store is not None:
                self._store.close()
            self._store = WeightStore(wire["store"], wire["directory"])
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
        found: Digests = {}
        with self._model.plain():
            parameters = self._model.parameters()
            for bucket in self.route.buckets:
                for part in bucket.parts:
                    target = into[part.start : part.start + part.nbytes]
                    packing.pack(part, target, lambda piece: packing.placed(piece.target, piece.shape, parameters), found)
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


class _Update:
    """One version on its way in."""

    def __init__(
        self,
        model: Model,
        serving: Serving,
        route: WorkerRoute,
        arriving: WorkerRoute,
        said: Mapping[str, Any],
        writes_are_final: bool,
        store: WeightStore | None,
        mode: Mode,
        wire: Wire,
        timeout: float,
    ) -> None:
        self._model, self._serving, self._route, self._arriving, self.mode = model, serving, route, arriving, mode
        self._said, self._verify, self._store = said, said["verify"], store
        self._verify_at_once = self._verify and writes_are_final
        self._wire, self._timeout = wire, timeout
        self.error: BaseException | None = None
        self.expected: Digests | None = None  # the trainer's, once live weights were proven to be that
        self.finished = False
        self.opened = False
        self.watch = Stopwatch(f"worker {route.rank}")
        self._stopping = threading.Event()
        self._tables: list[Tensor] = []
        self._whole: dict[str, tuple[Tensor, int]] = {}
        self._proven_received: Digests = {}
        self._live: dict[bool, Digests] = {}  # of what was written, by whether this worker counts it
        self._part: StorePart | None = None
        self._thread: threading.Thread | None = None
        self._patience = Patience(timeout, self._stopping)

    def start(self) -> None:
        if self.mode == "staged" and self._wire["kind"] == "store":
            self.finished = True  # trainer ranks fill and verify the slot; it is read at commit
            return
        if self.mode == "staged":
            assert self._store is not None
            self._part = self._store.part(self._wire["token"], self._route.rank, self._route.nbytes)
        else:
            self._open()
        action = self._stage if self.mode == "staged" else self._write_all
        self._thread = threading.Thread(target=self._guarded, args=(action,), name="mbridge-receive", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until everything has arrived; raises what went wrong."""
        if self._thread is not None:
            self._thread.join(self._timeout)
            if self._thread.is_alive():
                raise SyncError(f"not everything arrived within {self._timeout:g} s")
        if self.error is not None:
            raise self.error

    def load_staged(self) -> None:
        """From the image into the parameters."""
        with self.watch("load"):
            inlet = open_inlet(self._wire, self._route, self._patience) if self._part is None else self._arrived()
            try:
                self._open()
                with torch.no_grad():
                    self._write_all(inlet)
            finally:
                inlet.close()

    def _arrived(self) -> Inlet:
        assert self._part is not None
        return _ImageInlet(self._part.image, self._route)

    def _open(self) -> None:
        self.opened = True
        self._model.open()

    def prove(self) -> dict[str, Any]:
        """Live weights against the trainer's digests."""
        with self.watch("verify"):
            return self._proven()

    def _proven(self) -> dict[str, Any]:
        expected = packing.read_digests(self._route, self._tables)
        whole = {piece.hf_name for piece in self._route.pieces if is_whole(piece)}
        counted: Digests = {}
        if self._verify:
            self.expected = expected
            if not self._verify_at_once:
                self._digest_again()
            counted, rest = self._live[True], self._live[False]
            found = self._proven_received | {
                name: add(counted.get(name, 0), rest.get(name, 0)) for name in counted.keys() | rest.keys()
            }
            wrong = [hf_name for hf_name, value in expected.items() if found.get(hf_name) != value]
            if wrong:
                raise DigestMismatch(
                    f"{len(wrong)} tensors of worker {self._route.rank} are not in the live weights as they were sent: "
                    f"{listed(f'{name} (in {listed(self._places(name))})' for name in wrong)}"
                )
            first = {piece.hf_name for piece in self._route.pieces if is_whole(piece) and piece.counted}
            counted |= {name: self._proven_received[name] for name in first}
        return {
            "tensors": len(self._route.hf_names),
            "bytes": self._route.payload_bytes if self._arriving is self._route else carried_bytes(self._arriving),
            "digests": {hf_name: f"{value:016x}" for hf_name, value in counted.items()},
            "whole": sorted(whole),
        }

    def _digest_again(self) -> None:
        """Where a loader had its own way with the parameters after they were written."""
        parameters = self._model.parameters()
        traced = [piece for piece in self._route.pieces if not is_whole(piece)]
        for counts in (True, False):
            self._live[counts] = packing.live_digests((piece for piece in traced if piece.counted == counts), parameters)

    def keep(self) -> None:
        """The image of this host's weight store becomes live, if this update brought one."""
        if self._part is not None:
            self._part.commit(self._wire["version"], self._said, self._wire["sizes"])

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._timeout)

    def close(self) -> None:
        if self._part is not None:
            self._part.close()

    def _guarded(self, action: Callable[[Inlet], None]) -> None:
        try:
            with self.watch("receive"):
                inlet = self._open_inlet()
                try:
                    with torch.no_grad():
                        action(inlet)
                finally:
                    inlet.close()
        except BaseException as error:  # it is raised where the update is joined
            self.error = error
        self.finished = True

    def _open_inlet(self) -> Inlet:
        inlet = open_inlet(self._wire, self._arriving, self._patience)
        return inlet if self._arriving is self._route else DeltaInlet(inlet, self._route, self._model.parameters())

    def _stage(self, inlet: Inlet) -> None:
        assert self._part is not None
        image = self._part.image
        for index, bucket in enumerate(self._route.buckets):
            taken = self._taken(inlet, index)
            with self.watch("stage"):
                for part, data in zip(bucket.parts, taken, strict=True):
                    image[part.start : part.start + part.nbytes].copy_(data)
            inlet.give_back(index)
        if self._verify:
            with self.watch("verify"):
                packing.require_expected(self._route, image)

    def _write_all(self, inlet: Inlet) -> None:
        parameters = self._model.parameters()
        self._tables, self._whole, self._live = [], {}, {True: {}, False: {}}
        for index, bucket in enumerate(self._route.buckets):
            data = self._taken(inlet, index)
            self._serving.written = True
            with self.watch("write"):
                self._write(bucket, data, parameters)
            inlet.give_back(index)

    def _taken(self, inlet: Inlet, index: int) -> Sequence[Tensor]:
        if self._stopping.is_set():
            raise SyncError("the update was given up")
        with self.watch("wire"):
            return inlet.take(index)

    def _write(self, bucket: Bucket, data: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        for part, of_part in zip(bucket.parts, data, strict=True):
            if not part.pieces:
                self._tables.append(of_part.cpu().clone())
            for piece in part.pieces:
                values = packing.rectangle(piece, of_part, part.start)
                if is_whole(piece):
                    self._collect(piece, values)
                else:
                    place = packing.placed(piece.target, piece.shape, parameters)
                    share = packing.move(piece, values, place, self._verify_at_once)
                    live = self._live[piece.counted]
                    live[piece.hf_name] = add(live.get(piece.hf_name, 0), share)

    def _collect(self, piece: Piece, values: Tensor) -> None:
        """Part of a tensor that the engine's loader takes whole; the last part hands it over."""
        hf_name = piece.hf_name
        if hf_name not in self._whole:
            total = sum(prod(other.shape) for other in self._route.pieces if other.target.name == piece.target.name)
            self._whole[hf_name] = torch.empty(total, dtype=piece.dtype), total
        tensor, missing = self._whole[hf_name]
        piece.target.of(tensor, piece.shape).copy_(values)
        self._whole[hf_name] = tensor, missing - prod(piece.shape)
        if missing == prod(piece.shape):
            del self._whole[hf_name]
            shape = (tensor.numel() // piece.columns, piece.columns)
            self._proven_received[hf_name] = digest(tensor.view(shape))
            self._model.load_whole(hf_name, tensor)

    def _places(self, hf_name: str) -> set[str]:
        return {piece.target.name for piece in self._route.pieces if piece.hf_name == hf_name}


class _ImageInlet:
    """What has arrived already."""

    def __init__(self, image: Tensor, route: WorkerRoute) -> None:
        self._image, self._route = image, route

    def take(self, index: int) -> Sequence[Tensor]:
        return [self._image[part.start : part.start + part.nbytes] for part in self._route.buckets[index].parts]

    def give_back(self, index: int) -> None:
        """It stays."""

    def close(self) -> None:
        """The image is the update's."""


def merged_report(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an engine says of a commit, from its workers' reports: with the digest of all weights together."""
    digests: Digests = {}
    for report in reports:
        for hf_name, value in report["digests"].items():
            digests[hf_name] = add(digests.get(hf_name, 0), int(value, 16))
    whole = {hf_name for report in reports for hf_name in report["whole"]}
    phases = {phase for report in reports for phase in report["seconds"]}
    return {
        "version": reports[0]["version"],
        "workers": len(reports),
        "bytes": sum(report["bytes"] for report in reports),
        "bytes_per_worker": [report["bytes"] for report in reports],
        "digest": combine(digests) if digests else None,
        "proven_live": len(digests.keys() - whole),
        "proven_received": len(digests.keys() & whole),
        "seconds": {phase: max(report["seconds"].get(phase, 0.0) for report in reports) for phase in sorted(phases)},
        "spans": [span for report in reports for span in report["spans"]],
    }


def load_from_store(receiver: ShardReceiver, store: WeightStore, token: str) -> dict[str, Any]:
    """Brings one worker to the live version of a store, as a sync would: a restarted or late engine catches up.

    Raises:
        SyncError: see `WeightStore.read` and `ShardReceiver.commit`.
    """
    head = store.head()
    if head is None:
        raise SyncError(f"nothing was committed to the weight store {store.name!r}")
    wire = {"kind": "store", "name": store.name, "directory": str(store.directory), "token": token}
    receiver.receive(head.version, head.fingerprint, "staged", wire, timeout=60.0)
    return receiver.commit(head.version)


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, as plain tensors that may be written."""
    return {name: tensor.data for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
