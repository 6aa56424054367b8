"""Streams tensors between ranks of one machine: every rank writes its rectangles straight into shared memory, in HF layout, and
the ranks that receive copy full tensors out of it. No collective carries weights.

Two slots alternate. The one small all-reduce per bucket shows that a slot is full, and also that the other slot has been read.
The one before the first bucket of a run shows that every rank has read the last bucket of the run before, which may lie in the
slot that the first bucket is written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mbridge_rl.core.errors import BridgeError, PeerFailed
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.assembly import Assembly
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.schedule import StreamBucket, StreamPiece, StreamSpan


class HostMemoryExchange:
    """Runs one schedule through shared memory, any number of times. All ranks of `group` make it and run it together.

    Args:
        group: the ranks.
        buckets: the schedule.
        receives: whether this rank gets the tensors; otherwise it only contributes.

    Raises:
        ArenaError: on all ranks, if shared memory is too small or is not shared by all ranks.
    """

    def __init__(self, group: RankGroup, buckets: Sequence[StreamBucket], receives: bool) -> None:
        self._group, self._buckets, self._receives = group, buckets, receives
        self._own = [_pieces_of(group.rank, bucket) for bucket in buckets]
        self._slot_nbytes = max((bucket.nbytes for bucket in buckets), default=0)
        self._arena = shared_arena(group, max(1, 2 * self._slot_nbytes))
        self._bytes = self._arena.view(0, (self._arena.nbytes,), torch.uint8)

    def run(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields `(hf_name, tensor)` on the ranks that receive, and nothing on the others."""
        assembly = Assembly(torch.device("cpu"))
        self._group.barrier()
        for index, bucket in enumerate(self._buckets):
            with self._group.fail_together():
                self._write(index, live)
            if not self._receives:
                continue
            try:
                yield from assembly.completed(bucket, partial(self._read, self._slot(index)))
            except GeneratorExit:
                if index + 1 < len(self._buckets):
                    with contextlib.suppress(BridgeError):  # another rank may have left or failed as well
                        self._group.agree(PeerFailed("it stopped reading before the end of the stream"))
                raise

    def close(self) -> None:
        self._arena.close()

    def _slot(self, index: int) -> int:
        return index % 2 * self._slot_nbytes

    def _write(self, index: int, live: Mapping[str, Tensor]) -> None:
        slot = self._slot(index)
        for span, piece in self._own[index]:
            dtype = span.tensor.dtype
            offset = (slot + span.offset) // dtype.itemsize - span.first + piece.target.offset
            target = self._bytes.view(dtype).as_strided(piece.shape, piece.target.strides, offset)
            target.copy_(piece.source.of(live[piece.source.name], piece.shape))

    def _read(self, slot: int, span: StreamSpan, tensor: Tensor) -> None:
        start = slot + span.offset
        arrived = self._bytes[start : start + span.nbytes].view(span.tensor.dtype)
        tensor.view(-1)[span.first : span.last].copy_(arrived)


def shared_arena(group: RankGroup, nbytes: int) -> Arena:
    """An arena that rank 0 owns and to which all ranks of `group` write.

    Raises:
        ArenaError: on all ranks, if any of them could not create or map it.
    """
    created = group.first_rank_does(lambda: Arena.create(nbytes))
    path = group.share_plain(None if created is None else created.path)
    with group.fail_together():
        return Arena.attach(path, nbytes, writable=True) if created is None else created


def _pieces_of(rank: int, bucket: StreamBucket) -> list[tuple[StreamSpan, StreamPiece]]:
    return [(span, piece) for span in bucket.spans for piece in span.pieces if piece.source_rank == rank]
