"""Streams tensors through torch.distributed: one packed payload per contributing rank and bucket, some buckets ahead.

While a bucket is consumed the next ones are under way, so that packing, sending and consuming overlap. The number of messages
grows with the bytes, not with the number of parameters. Besides the payload there is one flag per bucket: a rank that fails, or
stops reading, goes on taking part until all ranks have received its flag, so that all of them raise and the process group stays
usable.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.errors import BridgeError, PeerFailed
from mbridge_rl.distributed.assembly import Assembly, use_huge_pages
from mbridge_rl.distributed.group import Agreement, RankGroup
from mbridge_rl.distributed.schedule import StreamBucket, StreamPiece, StreamSpan


@dataclass(frozen=True)
class _UnderWay:
    """A bucket whose transfer was started.

    Attributes:
        payloads: the packed bytes (uint8) of each contributing rank.
        works: the communication to wait for.
        agreement: the failure flag of the bucket.
    """

    payloads: Mapping[int, Tensor]
    works: Sequence[dist.Work | None]
    agreement: Agreement


class CollectiveExchange:
    """Runs one schedule through the collectives of `group`, any number of times, on all its ranks together.

    Args:
        group: the ranks.
        buckets: the schedule.
        receivers: the ranks that get the tensors: by broadcasts if these are all ranks, else by messages between pairs.
        depth: number of buckets that are staged at once: one that is consumed, the others under way.
    """

    def __init__(self, group: RankGroup, buckets: Sequence[StreamBucket], receivers: Sequence[int], depth: int) -> None:
        self._group, self._buckets, self._receivers, self._depth = group, buckets, receivers, depth
        self._receives = group.rank in receivers
        self._to_all = len(receivers) == group.size
        self._slot_nbytes = max((sum(self._staged(bucket).values()) for bucket in buckets), default=0)

    def run(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields `(hf_name, tensor)` on the ranks that receive, and nothing on the others."""
        under_way = _Pipeline(self, self._group, live)
        assembly = Assembly(self._group.device)
        for bucket in self._buckets:
            payloads = under_way.next_payloads()
            if not self._receives:
                continue
            try:
                yield from assembly.completed(bucket, partial(_unpack, payloads))
            except GeneratorExit:
                under_way.leave()
                raise

    def close(self) -> None:
        """Does nothing: nothing outlives a run."""

    def staging(self) -> list[Tensor]:
        """The staging memory: one slot (uint8) for every bucket that is staged at once."""
        staging = torch.empty(self._depth * self._slot_nbytes, dtype=torch.uint8, device=self._group.device)
        if staging.is_cpu:
            use_huge_pages(staging)
        return list(staging.split(self._slot_nbytes)) if self._slot_nbytes else [staging] * self._depth

    def start(self, index: int, slot: Tensor, live: Mapping[str, Tensor], failure: Exception | None) -> _UnderWay:
        """Packs and starts bucket `index`. A rank that fails to pack sends the bytes that the slot holds, and its flag."""
        bucket = self._buckets[index]
        payloads, end = {}, 0
        for rank, nbytes in self._staged(bucket).items():
            payloads[rank] = slot[end : end + nbytes]
            end += nbytes
        if failure is None and self._group.rank in payloads:
            try:
                _pack(bucket, self._group.rank, payloads[self._group.rank], live)
            except Exception as error:  # the flag reports it to all ranks
                failure = error
        agreement = self._group.start_agreement(failure)
        return _UnderWay(payloads, self._send(bucket, payloads), agreement)

    def _staged(self, bucket: StreamBucket) -> dict[int, int]:
        """The bytes of each payload that this rank holds, by rank: all payloads if it receives, else only its own."""
        return {rank: nbytes for rank, nbytes in bucket.packed_nbytes.items() if self._receives or rank == self._group.rank}

    def _send(self, bucket: StreamBucket, payloads: Mapping[int, Tensor]) -> list[dist.Work | None]:
        me = self._group.rank
        if self._to_all:
            return [self._group.broadcast(payloads[rank], rank) for rank in bucket.packed_nbytes]
        sends = [(payloads[me], receiver) for receiver in self._receivers if me in payloads and receiver != me]
        receives = [(payload, rank) for rank, payload in payloads.items() if rank != me]
        return [*self._group.exchange(sends, receives)]

    def __len__(self) -> int:
        return len(self._buckets)


class _Pipeline:
    """The staged buckets of one run: as many as there are slots; the first of them is being consumed."""

    def __init__(self, exchange: CollectiveExchange, group: RankGroup, live: Mapping[str, Tensor]) -> None:
        self._exchange, self._group, self._live = exchange, group, live
        self._slots = exchange.staging()
        self._started = 0
        self._pending: deque[_UnderWay] = deque()
        self._failure: Exception | None = None

    def next_payloads(self) -> Mapping[int, Tensor]:
        """The payloads of the next bucket. The bucket before has been consumed, so its slot is filled again.

        Raises:
            BridgeError: on all ranks, if any rank failed at this bucket. All ranks have started the same buckets by then, and
                wait for them first, so that the process group stays usable.
        """
        while self._started < len(self._exchange) and len(self._pending) < len(self._slots):
            slot = self._slots[self._started % len(self._slots)]
            self._pending.append(self._exchange.start(self._started, slot, self._live, self._failure))
            self._started += 1
        current = self._pending.popleft()
        self._group.wait(current.works)
        try:
            current.agreement.wait()
        except Exception:
            for later in self._pending:
                self._group.wait(later.works)
                self._group.wait([later.agreement.work])
            raise
        return current.payloads

    def leave(self) -> None:
        """Takes part until all other ranks have received the flag that this rank stopped reading."""
        self._failure = PeerFailed("it stopped reading before the end of the stream")
        with contextlib.suppress(BridgeError):
            while self._pending or self._started < len(self._exchange):
                self.next_payloads()


def _pack(bucket: StreamBucket, rank: int, payload: Tensor, live: Mapping[str, Tensor]) -> None:
    for span in bucket.spans:
        for piece in span.pieces:
            if piece.source_rank == rank:
                _packed(payload, piece, span).copy_(piece.source.of(live[piece.source.name], piece.shape))


def _unpack(payloads: Mapping[int, Tensor], span: StreamSpan, tensor: Tensor) -> None:
    for piece in span.pieces:
        piece.target.of(tensor, piece.shape).copy_(_packed(payloads[piece.source_rank], piece, span))


def _packed(payload: Tensor, piece: StreamPiece, span: StreamSpan) -> Tensor:
    """The values of `piece`, `[*shape]`, as a view of the payload of its rank."""
    dtype = span.tensor.dtype
    return payload[piece.start : piece.start + piece.numel * dtype.itemsize].view(dtype).view(piece.shape)
