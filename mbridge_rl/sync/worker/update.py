"""One version on its way into an engine worker: received, proven, written into the parameters.

Staged: the image is completed and verified beside the live weights, and `load_staged` copies it over. Streaming: every bucket
goes straight into the parameters as it arrives. Nothing here knows the engine: it is reached through `Model`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, digest
from mbridge_rl.core.errors import DigestMismatch, SyncError, listed
from mbridge_rl.sync.options import Mode
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.fit import is_whole
from mbridge_rl.sync.payload.packing import Digests
from mbridge_rl.sync.payload.route import Bucket, Piece, WorkerRoute
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.weight_store import StorePart, WeightStore
from mbridge_rl.sync.transports import Inlet, Wire, open_inlet
from mbridge_rl.sync.transports.shared_memory import SlotInlet
from mbridge_rl.sync.transports.waiting import Timeout
from mbridge_rl.sync.worker.delta_inlet import DeltaInlet
from mbridge_rl.sync.worker.serving_state import Serving


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


class Update:
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
        self._wire = wire
        self.fill: str | None = wire.get("fill")  # names the update; its version may come again
        self._slot: SlotInlet | None = None
        self.error: BaseException | None = None
        self.expected: Digests | None = None  # the trainer's, once live weights were proven to be that
        self.finished = False
        self.opened = False
        self.received = 0  # bytes that came over the wire: parts as they travel, so with alignment and digests
        self.watch = Stopwatch(f"worker {route.rank}")
        self._stopping = threading.Event()
        self._tables: list[Tensor] = []
        self._whole: dict[str, tuple[Tensor, int]] = {}
        self._proven_received: Digests = {}
        self._live: dict[bool, Digests] = {}  # of what was written, by whether this worker counts it
        self._part: StorePart | None = None
        self._thread: threading.Thread | None = None
        self._timeout = Timeout(timeout, self._stopping)

    def start(self) -> None:
        if self.mode == "staged" and self._wire["kind"] == "store":
            if self._wire.get("committed"):  # perhaps long ago: nobody has verified the image just now
                self._open_slot(again=True)
            self.finished = True  # else trainer ranks fill and verify the slot, and it is opened at commit
            return
        if self.mode == "staged":
            assert self._store is not None
            self._part = self._store.part(self._wire["token"], self._route.rank, self._route.nbytes, self._wire["fill"])
        else:
            self._open()
        action, inlet = self._stage if self.mode == "staged" else self._write_all, self._open_inlet()
        self._thread = threading.Thread(target=self._guarded, args=(action, inlet), name="mbridge-receive", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until everything has arrived; raises what went wrong."""
        if self._thread is not None:
            self._thread.join(self._timeout.seconds)
            if self._thread.is_alive():
                raise SyncError(f"not everything arrived within {self._timeout.seconds:g} s")
        if self.error is not None:
            raise self.error

    def load_staged(self) -> None:
        """From the image into the parameters. The image is the one that was meant: asked before the first write, and after the
        last.

        Raises:
            StoreError, DigestMismatch: it is not.
        """
        with self.watch("load"):
            if self._part is not None:
                self._part.require_same(self._version)
                self._load(_ImageInlet(self._part.image, self._route))
                self._part.require_same(self._version)
                return
            slot = self._open_slot(again=False) if self._slot is None else self._slot
            self._load(_CountingInlet(slot, self._count))
            slot.require_same()

    def _load(self, inlet: Inlet) -> None:
        self._open()
        with torch.no_grad():
            self._write_all(inlet)

    def _open_slot(self, *, again: bool) -> SlotInlet:
        """The image in the weight store, which nobody fills anew until this update is closed."""
        self._slot = SlotInlet(self._wire, self._route, self._timeout)
        self._slot.require_version(self._version, verify=self._verify, again=again)
        return self._slot

    @property
    def _version(self) -> int:
        assert self._serving.updating is not None
        return self._serving.updating

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
            "bytes": self.received,
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
            self._thread.join(self._timeout.seconds)

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
        if self._slot is not None:
            self._slot.close()

    def _guarded(self, action: Callable[[Inlet], None], inlet: Inlet) -> None:
        with self.watch("receive"):
            try:
                with torch.no_grad():
                    action(inlet)
            except BaseException as error:  # it is raised where the update is joined, and told to whoever asks
                self.error = error
                inlet.fail()
            finally:
                inlet.close()
        self.finished = True

    def _open_inlet(self) -> Inlet:
        inlet = _CountingInlet(open_inlet(self._wire, self._arriving, self._timeout), self._count)
        return inlet if self._arriving is self._route else DeltaInlet(inlet, self._route, self._model.parameters())

    def _count(self, nbytes: int) -> None:
        self.received += nbytes

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


class _CountingInlet:
    """Tells what another inlet really hands over."""

    def __init__(self, inlet: Inlet, count: Callable[[int], None]) -> None:
        self._inlet, self._count = inlet, count
        self.give_back, self.fail, self.close = inlet.give_back, inlet.fail, inlet.close

    def take(self, index: int) -> Sequence[Tensor]:
        parts = self._inlet.take(index)
        self._count(sum(part.nbytes for part in parts))
        return parts


class _ImageInlet:
    """What has arrived already."""

    def __init__(self, image: Tensor, route: WorkerRoute) -> None:
        self._image, self._route = image, route

    def take(self, index: int) -> Sequence[Tensor]:
        return [self._image[part.start : part.start + part.nbytes] for part in self._route.buckets[index].parts]

    def give_back(self, index: int) -> None:
        """It stays."""

    def fail(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """The image is the update's."""
