"""The trainer ranks of a transfer, with the few collectives that a transfer needs; they also work in a single process.

Ranks fail together: if one of them raises, all of them raise in the same call, an error of the same type, with the message of
the rank that failed. So callers may decide by the type (to try again, to go on without an engine), and all ranks decide alike.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.errors import BridgeError, PeerFailed, RanksUnreachable, SyncError, TransferTimeout
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.distributed.plain import Types, dumped, loaded

T = TypeVar("T")
_SIZE_BYTES = 8
_TELL_SECONDS = 3.0  # the time in which ranks that time out a little later report it
_ON_ONE_MACHINE: weakref.WeakKeyDictionary[dist.ProcessGroup, bool] = weakref.WeakKeyDictionary()


class RankGroup:
    """All trainer ranks, or only this process if torch.distributed is not initialised.

    Every wait ends at the process group's own time-out (`init_process_group(timeout=...)`).

    Attributes:
        device: the device of the tensors that collectives take.
        rank: this process's rank.
        size: the number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._alone = not dist.is_initialized()
        on_gpu = not self._alone and "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    @property
    def identity(self) -> weakref.ref[dist.ProcessGroup] | None:
        """A value that is equal only for the same process group: nothing prepared for one group is used with another."""
        return None if self._alone else weakref.ref(self._group or dist.group.WORLD)

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks can share memory. The first access per process group is collective."""
        if self.size == 1:
            return True
        group = self._group or dist.group.WORLD
        if group not in _ON_ONE_MACHINE:
            _ON_ONE_MACHINE[group] = len(set(self.gather_plain(machine_id()))) == 1
        return _ON_ONE_MACHINE[group]

    def broadcast(self, payload: Tensor, source_rank: int) -> dist.Work | None:
        """Starts sending `payload` (uint8, of the same size on all ranks) from `source_rank` to all; `wait` on the result."""
        if self.size == 1:
            return None
        return dist.broadcast(payload, group_src=source_rank, group=self._group, async_op=True)

    def exchange(self, sends: Iterable[tuple[Tensor, int]], receives: Iterable[tuple[Tensor, int]]) -> list[dist.Work]:
        """Starts sending and receiving `(tensor, peer rank)`; each pair of ranks must list its tensors in the same order."""
        messages = [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for tensor, peer in sends]
        messages += [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for tensor, peer in receives]
        return dist.batch_isend_irecv(messages) if messages else []

    def wait(self, works: Iterable[dist.Work | None]) -> None:
        """Waits for started communication.

        Raises:
            RanksUnreachable: a rank is missing, died, or did not take part within the process group's time-out.
        """
        with self._explained():
            for work in works:
                if work is not None:
                    work.wait()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of int64 `values`, modulo 2^64; also a barrier.

        Raises:
            RanksUnreachable: as `wait`.
        """
        if self.size == 1:
            return values
        summed = values.to(self.device)
        with self._explained():
            dist.all_reduce(summed, group=self._group)
        return summed.cpu()

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all ranks' `values`, element by element; also a barrier.

        Raises:
            RanksUnreachable: as `wait`.
        """
        if self.size == 1:
            return values
        largest = values.to(self.device)
        with self._explained():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest.cpu()

    def all_same(self, number: int) -> bool:
        """Whether all ranks brought the same `number`, below 2^21; also a barrier."""
        total, squares = self.sum(torch.tensor([number, number * number])).tolist()
        return self.size * squares == total * total  # by Cauchy and Schwarz this holds only for equal numbers

    def barrier(self) -> None:
        self.sum(torch.zeros(1, dtype=torch.int64))

    def start_agreement(self, failure: Exception | None = None) -> Agreement:
        """Starts sending to all ranks whether this one failed; `wait` on the result, on all ranks."""
        failed = torch.tensor([int(failure is not None)], device=self.device)
        work = None if self.size == 1 else dist.all_reduce(failed, group=self._group, async_op=True)
        return Agreement(self, failure, failed, work)

    def agree(self, failure: Exception | None = None) -> None:
        """Returns on all ranks when all have called it, or raises on all ranks if any brought a `failure`. Also a barrier.

        Raises:
            BridgeError: on all ranks, of the type of one failure (SyncError if that is not a BridgeError). If several ranks
                failed, it is the failure of the lowest rank whose failure is not a consequence of another's. That rank raises
                its own error; the errors of the others name the rank and its error. RanksUnreachable: as `wait`.
        """
        self.start_agreement(failure).wait()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """If any rank raises inside the block, all ranks raise at its end (see `agree`); also a barrier."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # reported to the other ranks before it is raised, so that none of them waits
            failure = error
        self.agree(failure)

    def first_rank_does(self, function: Callable[[], T]) -> T | None:
        """Calls `function` on rank 0. Every rank returns when that is done, or raises its error (see `agree`).

        Returns:
            The result of `function` on rank 0, `None` on the other ranks.
        """
        result: T | None = None
        with self.fail_together():
            if self.rank == 0:
                result = function()
        return result

    def on_first_rank(self, function: Callable[[], T], types: Types = ()) -> T:
        """Calls `function` on rank 0, and returns its result, which must be plain data (see `gather_plain`), on every rank.

        Args:
            function: called on rank 0 only.
            types: the dataclasses that may be in the result.
        """
        return cast("T", self.share_plain(self.first_rank_does(function), types))

    def gather_plain(self, value: Any, types: Types = ()) -> list[Any]:
        """The values of all ranks, by rank. They must be plain data (`distributed.plain`); nothing that arrives is unpickled.

        This is for the one-time handshake and for failures, never for payload.

        Args:
            value: this rank's value.
            types: the dataclasses that may be in it.
        """
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(dumped(value, types)), dtype=torch.uint8)
        longest = int(self.maximum(torch.tensor([len(message)])).item())
        padded = torch.zeros(_SIZE_BYTES + longest, dtype=torch.uint8)
        padded[:_SIZE_BYTES] = torch.tensor([len(message)]).view(torch.uint8)
        padded[_SIZE_BYTES : _SIZE_BYTES + len(message)] = message
        own_message = padded.to(self.device)
        gathered = [torch.empty_like(own_message) for _ in range(self.size)]
        with self._explained():
            dist.all_gather(gathered, own_message, group=self._group)
        return [_value_of(message.cpu(), types) for message in gathered]

    def share_plain(self, value: Any, types: Types = ()) -> Any:
        """Rank 0's `value` on every rank, in two messages. It must be plain data (see `gather_plain`) and may be large."""
        if self.size == 1:
            return value
        message = torch.frombuffer(bytearray(dumped(value, types)), dtype=torch.uint8) if self.rank == 0 else torch.zeros(0)
        size = torch.tensor([len(message)], device=self.device)
        self.wait([self.broadcast(size.view(torch.uint8), 0)])
        content = (message if self.rank == 0 else torch.zeros(int(size), dtype=torch.uint8)).to(self.device)
        self.wait([self.broadcast(content, 0)])
        return value if self.rank == 0 else loaded(content.cpu().numpy().tobytes(), types)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            silent = self._silent_ranks() if "timed out" in str(error).lower() else []
            cause = f"ranks {silent} did not come" if silent else "one of them died, or failed outside of this call"
            message = f"rank {self.rank} of {self.size} cannot reach all others: {cause} (the backend: {error})"
            raise RanksUnreachable(message) from error

    def _silent_ranks(self) -> list[int]:
        """The ranks that did not report a time-out, after this rank timed out. Every rank that times out reports it in the
        store of all processes."""
        if self._group is not None:
            return []
        keys = [f"mbridge_rl/timed_out/{rank}" for rank in range(self.size)]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(keys[self.rank], "")
            deadline = time.monotonic() + _TELL_SECONDS
            while time.monotonic() < deadline and not store.check(keys):
                time.sleep(0.1)
            return [rank for rank, name in enumerate(keys) if not store.check([name])]
        except RuntimeError:  # the rank that served the store is gone
            return []


class Agreement:
    """A failure flag that is under way to all ranks (`RankGroup.start_agreement`)."""

    def __init__(self, group: RankGroup, failure: Exception | None, failed: Tensor, work: dist.Work | None) -> None:
        self._group, self._failure, self._failed, self.work = group, failure, failed, work

    def wait(self) -> None:
        """Returns, or raises, on all ranks (see `RankGroup.agree`)."""
        self._group.wait([self.work])
        if not self._failed.item():
            return
        failure = None if self._failure is None else Failure.of(self._failure)
        rank, cause = _cause(self._group.gather_plain(failure, (Failure,)))
        if rank == self._group.rank and isinstance(self._failure, BridgeError):
            raise self._failure
        error_class = cause.error_class
        if error_class is None or not issubclass(error_class, BridgeError):
            error_class = SyncError
        raise error_class(f"rank {self._group.rank}: rank {rank} failed: {cause}") from self._failure


def _value_of(message: Tensor, types: Types) -> Any:
    size = int(message[:_SIZE_BYTES].clone().view(torch.int64).item())
    return loaded(message[_SIZE_BYTES : _SIZE_BYTES + size].numpy().tobytes(), types)


def _cause(failures: Sequence[Failure | None]) -> tuple[int, Failure]:
    """The failure that all ranks raise, and the rank that it happened on. A time-out may be the consequence of another rank's
    failure, and a `PeerFailed` always is."""
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    return min(failed, key=lambda item: (item[1].error_class is PeerFailed, item[1].error_class is TransferTimeout))
