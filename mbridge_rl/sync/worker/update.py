"""An update of an engine worker to one version, which is received, proven and written into the parameters.

In mode `staged` the image is completed and verified beside the live weights, and `load_staged` copies it over. In mode
`streaming` every bucket goes straight into the parameters as it arrives. This module does not know the engine: it changes the
engine's model through `Model`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from mbridge_rl.core.digest import add, digest
from mbridge_rl.core.errors import DigestMismatch, SyncError, listed
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.fit import goes_unsplit
from mbridge_rl.sync.payload.messages import Introduction, UpdateRequest
from mbridge_rl.sync.payload.packing import Digests
from mbridge_rl.sync.payload.route import Bucket, Piece, WorkerRoute
from mbridge_rl.sync.payload.wires import StoreWire
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.weight_store import StorePart, WeightStore
from mbridge_rl.sync.transports import Inlet, open_inlet
from mbridge_rl.sync.transports.shared_memory import SlotInlet
from mbridge_rl.sync.transports.waiting import Timeout
from mbridge_rl.sync.worker.delta_inlet import DeltaInlet
from mbridge_rl.sync.worker.serving_state import Serving


class Model(Protocol):
    """The engine's model, as a worker changes it."""

    settles: bool  # whether `settle` may change, or move, what was written before it

    def parameters(self) -> Mapping[str, Tensor]:
        """The live parameters by name, as a loader fills them. Between updates they may be read while the engine generates."""
        ...

    def plain(self) -> AbstractContextManager[object]:
        """A scope in which the parameters may be read as a loader fills them, between updates."""
        ...

    def open(self) -> None:
        """Prepares the parameters for writing; called once, before the first write of an update."""

    def load_unsplit(self, hf_name: str, tensor: Tensor) -> None:
        """Hands a complete HF tensor to the engine's own loader, which may keep it."""

    def settle(self) -> None:
        """Finishes what the engine's own loader deferred; called once, after the last write."""

    def derive(self) -> None:
        """Lets the engine compute what it derives from its parameters; called once, after `settle`."""


@dataclass(frozen=True)
class Adopted:
    """What a worker keeps of the trainer that introduced itself.

    Attributes:
        introduction: the trainer's introduction.
        route: the route of this worker.
        writes_are_final: whether nothing changes what was written, so that it may be digested as it is written.
    """

    introduction: Introduction
    route: WorkerRoute
    writes_are_final: bool


class Update:
    """Receives one version and writes it into the parameters.

    Args:
        model: the model that is written.
        serving: the state of the worker.
        adopted: the trainer whose version arrives.
        arriving: the route that arrives: the worker's route, or the shrunk route of a delta.
        request: the request that began the update.
        store: the store that keeps the image, if it comes from another host.

    Attributes:
        fill: the name of the update; its version may come again.
        error: what failed while receiving.
        expected: the trainer's digests, set when the live weights were proven to have them.
        finished: whether receiving has ended.
        opened: whether the model was opened for writing.
        received: bytes that came over the wire, with alignment and digests.
        watch: the stopwatch of the update.
    """

    def __init__(
        self,
        model: Model,
        serving: Serving,
        adopted: Adopted,
        arriving: WorkerRoute,
        request: UpdateRequest,
        store: WeightStore | None,
    ) -> None:
        self._model, self._serving, self._route, self._arriving = model, serving, adopted.route, arriving
        self._introduction, self._verify, self._store = adopted.introduction, adopted.introduction.verify, store
        self._verify_at_once = self._verify and adopted.writes_are_final
        self._request, self._wire = request, request.wire
        self.mode, self.fill = request.mode, request.fill
        self._slot: SlotInlet | None = None
        self.error: BaseException | None = None
        self.expected: Digests | None = None
        self.finished = False
        self.opened = False
        self.received = 0
        self.watch = Stopwatch(f"worker {adopted.route.rank}")
        self._stopping = threading.Event()
        self._tables: list[Tensor] = []
        self._collected: dict[str, tuple[Tensor, int]] = {}  # tensors for the engine's loader, and the elements they lack
        self._proven_received: Digests = {}
        self._live: dict[bool, Digests] = {}  # digests of what was written, by whether this worker counts it
        self._part: StorePart | None = None
        self._thread: threading.Thread | None = None
        self._timeout = Timeout(request.timeout, self._stopping)

    def start(self) -> None:
        """Starts to receive, in a thread of its own; does nothing if the image is in a store of this host."""
        if self.mode == "staged" and isinstance(self._wire, StoreWire):
            if self._wire.committed:  # it may be old: nobody has verified the image just now
                self._open_slot(again=True)
            self.finished = True  # otherwise trainer ranks fill and verify the slot, and it is opened at commit
            return
        if self.mode == "staged":
            assert self._store is not None
            assert self._request.store is not None
            self._part = self._store.part(self._request.store.token, self._route.rank, self._route.nbytes, self.fill)
        else:
            self._open()
        action, inlet = self._stage if self.mode == "staged" else self._write_all, self._open_inlet()
        self._thread = threading.Thread(target=self._guarded, args=(action, inlet), name="mbridge-receive", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until everything has arrived; raises the error of receiving."""
        if self._thread is not None:
            self._thread.join(self._timeout.seconds)
            if self._thread.is_alive():
                raise SyncError(f"not everything arrived within {self._timeout.seconds:g} s")
        if self.error is not None:
            raise self.error

    def load_staged(self) -> None:
        """Copies the image into the parameters. Checks before the first write and after the last that it is the right image.

        Raises:
            StoreError, DigestMismatch: it is another image, or was damaged.
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
        assert isinstance(self._wire, StoreWire)
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

    @property
    def unsplit_names(self) -> tuple[str, ...]:
        """The names of the tensors that only the engine's own loader can place."""
        return tuple(sorted({piece.hf_name for piece in self._route.pieces if goes_unsplit(piece)}))

    def prove(self) -> Digests:
        """Compares the live weights with the trainer's digests.

        Returns:
            The digests, by `hf_name`, of what this worker holds and no other worker counts; none without verification.

        Raises:
            DigestMismatch: they differ.
        """
        with self.watch("verify"):
            return self._proven()

    def _proven(self) -> Digests:
        expected = packing.read_digests(self._route, self._tables)
        counted: Digests = {}
        if self._verify:
            self.expected = expected
            if not self._verify_at_once:
                self._digest_again()
            counted, uncounted = self._live[True], self._live[False]
            digests = self._proven_received | {
                hf_name: add(counted.get(hf_name, 0), uncounted.get(hf_name, 0))
                for hf_name in counted.keys() | uncounted.keys()
            }
            wrong_names = [hf_name for hf_name, value in expected.items() if digests.get(hf_name) != value]
            if wrong_names:
                raise DigestMismatch(
                    f"{len(wrong_names)} tensors of worker {self._route.rank} are not in the live weights as they were sent: "
                    f"{listed(f'{hf_name} (in {listed(self._parameter_names(hf_name))})' for hf_name in wrong_names)}"
                )
            counted_by_loader = {piece.hf_name for piece in self._route.pieces if goes_unsplit(piece) and piece.counted}
            counted |= {hf_name: self._proven_received[hf_name] for hf_name in counted_by_loader}
        return counted

    def _digest_again(self) -> None:
        """Computes the digests from the parameters, because a loader may have changed them after they were written."""
        parameters = self._model.parameters()
        traced = [piece for piece in self._route.pieces if not goes_unsplit(piece)]
        for counts in (True, False):
            self._live[counts] = packing.live_digests((piece for piece in traced if piece.counted == counts), parameters)

    def keep(self) -> None:
        """Makes the image live in this host's weight store, if this update brought one."""
        if self._part is not None:
            assert self._request.store is not None
            self._part.commit(self._request.version, self._introduction.as_json, self._request.store.sizes)

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
            except BaseException as error:  # `join` raises it, and the worker's status reports it
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
            part_data = self._take(inlet, index)
            with self.watch("stage"):
                for part, data in zip(bucket.parts, part_data, strict=True):
                    image[part.start : part.start + part.nbytes].copy_(data)
            inlet.give_back(index)
        if self._verify:
            with self.watch("verify"):
                packing.require_expected(self._route, image)

    def _write_all(self, inlet: Inlet) -> None:
        parameters = self._model.parameters()
        self._tables, self._collected, self._live = [], {}, {True: {}, False: {}}
        for index, bucket in enumerate(self._route.buckets):
            part_data = self._take(inlet, index)
            self._serving.written = True
            with self.watch("write"):
                self._write(bucket, part_data, parameters)
            inlet.give_back(index)

    def _take(self, inlet: Inlet, index: int) -> Sequence[Tensor]:
        if self._stopping.is_set():
            raise SyncError("the update was given up")
        with self.watch("wire"):
            return inlet.take(index)

    def _write(self, bucket: Bucket, part_data: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        for part, data in zip(bucket.parts, part_data, strict=True):
            if not part.pieces:
                self._tables.append(data.cpu().clone())
            for piece in part.pieces:
                values = packing.rectangle(piece, data, part.start)
                if goes_unsplit(piece):
                    self._collect(piece, values)
                else:
                    place = packing.placed(piece.target, piece.shape, parameters)
                    share = packing.move(piece, values, place, self._verify_at_once)
                    live = self._live[piece.counted]
                    live[piece.hf_name] = add(live.get(piece.hf_name, 0), share)

    def _collect(self, piece: Piece, values: Tensor) -> None:
        """Adds a piece of a tensor that only the engine's loader can place; the last piece hands the tensor over."""
        hf_name = piece.hf_name
        if hf_name not in self._collected:
            total = sum(prod(other.shape) for other in self._route.pieces if other.target.name == piece.target.name)
            self._collected[hf_name] = torch.empty(total, dtype=piece.dtype), total
        tensor, missing = self._collected[hf_name]
        piece.target.of(tensor, piece.shape).copy_(values)
        self._collected[hf_name] = tensor, missing - prod(piece.shape)
        if missing == prod(piece.shape):
            del self._collected[hf_name]
            shape = (tensor.numel() // piece.columns, piece.columns)
            self._proven_received[hf_name] = digest(tensor.view(shape))
            self._model.load_unsplit(hf_name, tensor)

    def _parameter_names(self, hf_name: str) -> set[str]:
        return {piece.target.name for piece in self._route.pieces if piece.hf_name == hf_name}


class _CountingInlet:
    """Counts the bytes that another inlet hands over."""

    def __init__(self, inlet: Inlet, count: Callable[[int], None]) -> None:
        self._inlet, self._count = inlet, count
        self.give_back, self.fail, self.close = inlet.give_back, inlet.fail, inlet.close

    def take(self, index: int) -> Sequence[Tensor]:
        parts = self._inlet.take(index)
        self._count(sum(part.nbytes for part in parts))
        return parts


class _ImageInlet:
    """An inlet that hands over an image which has arrived already."""

    def __init__(self, image: Tensor, route: WorkerRoute) -> None:
        self._image, self._route = image, route

    def take(self, index: int) -> Sequence[Tensor]:
        return [self._image[part.start : part.start + part.nbytes] for part in self._route.buckets[index].parts]

    def give_back(self, index: int) -> None:
        """Does nothing: the image stays."""

    def fail(self) -> None:
        """Does nothing: nobody waits for this inlet."""

    def close(self) -> None:
        """Does nothing: the update owns the image."""
