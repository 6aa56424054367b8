"""Streams HF tensors from a sharded model to some or all of its ranks, in checkpoint order and bounded memory.

The schedule is made once (`schedule`). The tensors travel through shared memory if all ranks are on one machine
(`host_memory`), otherwise through torch.distributed (`collective`), and not at all if there is only one rank.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from mbridge_rl.core.errors import ArenaError, SyncError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Plan
from mbridge_rl.distributed.assembly import Assembly
from mbridge_rl.distributed.collective import CollectiveExchange
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.host_memory import HostMemoryExchange
from mbridge_rl.distributed.schedule import StreamBucket, StreamSpan, schedule

_log = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES = 32 << 20
Transport = Literal["auto", "shared_memory", "collective"]

# Slots that stay in the processor's cache are read faster than larger ones; two of them fit into a container's 64 MiB.
_SLOT_BYTES = 24 << 20

# The staging memory, of the size of two buckets, has so many parts. Small parts let receiving, sending and consuming overlap.
_DEPTH = 4


class Exchange(Protocol):
    """Runs a schedule any number of times, on all ranks together."""

    def run(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]: ...
    def close(self) -> None: ...


class TensorStream:
    """A prepared export. All ranks of `group` make it together, once, and run it any number of times.

    Args:
        plan: the copies from the ranks of `group` to HF tensors.
        dtypes: the dtypes of the yielded tensors, by `hf_name`; parameters of another dtype are cast when they are packed.
        group: the ranks.
        device: the device of this rank's parameters.
        bucket_bytes: bytes of a bucket; at most two buckets are staged beside the tensor that is yielded, and larger tensors
            travel in chunks.
        ranks: the ranks that receive; `None` means all. The others only contribute.
        transport: `"auto"` is shared memory if all ranks share a machine and hold their parameters on the CPU.

    Raises:
        SyncError: on all ranks, if they disagree about the plan or the arguments, or `ranks` are not ranks of the group.
        ArenaError: on all ranks, if `transport` is shared memory and there is none, or too little.
    """

    def __init__(
        self,
        plan: Plan,
        dtypes: Mapping[str, torch.dtype],
        group: RankGroup,
        *,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        ranks: Sequence[int] | None = None,
        transport: Transport = "auto",
    ) -> None:
        self._group, self._plan, self._running = group, plan, False
        self._tensors = [HFTensor(hf_name, dtypes[hf_name], shape) for hf_name, shape in plan.hf_shapes.items()]
        receivers = list(range(group.size)) if ranks is None else sorted(set(ranks))
        with group.fail_together():
            _check(bucket_bytes, receivers, group.size, transport)
        on_one_machine = self._handshake((bucket_bytes, receivers, transport), device)
        self.transport, self._exchange = self._choose(transport, on_one_machine, bucket_bytes, receivers)
        _log.debug("rank %d of %d streams %d tensors by %s", group.rank, group.size, len(self._tensors), self.transport)

    def run(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields `(hf_name, tensor)` in checkpoint order on the ranks that receive; the consumer may keep each tensor.

        All ranks iterate to the end, also those that receive nothing. A rank that stops earlier makes the others raise.

        Args:
            live: this rank's tensors, by the plan's source names.

        Raises:
            SyncError: a rank failed, left, or is missing; or this stream is being read already.
        """
        if self._running:
            raise SyncError("this export is being read already: read it to its end, or close it, before the next one")
        self._running = True
        try:
            yield from self._exchange.run(live)
        finally:
            self._running = False

    def close(self) -> None:
        """Frees shared memory. The stream cannot be run again."""
        self._exchange.close()

    def _handshake(self, arguments: tuple[object, ...], device: torch.device) -> bool:
        """Checks, once, that all ranks have the same plan and arguments. Returns whether they can use shared memory."""
        dtypes = hashlib.blake2b(repr(self._tensors).encode(), digest_size=8).hexdigest()
        by_rank = self._group.gather_plain(((self._plan.fingerprint, dtypes), arguments, device.type))
        for rank, (fingerprints, rank_arguments, _) in enumerate(by_rank):
            if (fingerprints, rank_arguments) != by_rank[0][:2]:
                raise SyncError(
                    f"ranks disagree about the export: rank {rank} has plan and dtypes {fingerprints}, (bucket_bytes, ranks, "
                    f"transport) = {rank_arguments}; rank 0 has {by_rank[0][0]}, {by_rank[0][1]}. Give every rank the same "
                    f"model, layout and arguments"
                )
        return self._group.on_one_machine and all(device_type == "cpu" for *_, device_type in by_rank)

    def _choose(
        self, transport: Transport, on_one_machine: bool, bucket_bytes: int, receivers: Sequence[int]
    ) -> tuple[str, Exchange]:
        if self._group.size == 1:
            return "local", _LocalCopies(self._schedule(1 << 62), self._group.device)
        if transport == "shared_memory" or (transport == "auto" and on_one_machine):
            try:
                buckets = self._schedule(min(bucket_bytes, _SLOT_BYTES))
                return "shared_memory", HostMemoryExchange(self._group, buckets, self._group.rank in receivers)
            except ArenaError as error:  # on all ranks alike
                if transport == "shared_memory":
                    raise
                _log.warning("streaming through torch.distributed, not through shared memory: %s", error)
        buckets = self._schedule(2 * bucket_bytes // _DEPTH)
        return "collective", CollectiveExchange(self._group, buckets, receivers, _DEPTH)

    def _schedule(self, bucket_bytes: int) -> list[StreamBucket]:
        return schedule(self._tensors, self._plan.by_hf_name, bucket_bytes)


class _LocalCopies:
    """The exchange of a single rank, which holds everything and stages nothing."""

    def __init__(self, buckets: Sequence[StreamBucket], device: torch.device) -> None:
        self._buckets, self._device = buckets, device

    def run(self, live: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        def fill(span: StreamSpan, tensor: Tensor) -> None:
            for piece in span.pieces:
                piece.target.of(tensor, piece.shape).copy_(piece.source.of(live[piece.source.name], piece.shape))

        for bucket in self._buckets:
            yield from Assembly(self._device).completed(bucket, fill)

    def close(self) -> None:
        """Does nothing: nothing outlives a run."""


def _check(bucket_bytes: int, receivers: Sequence[int], size: int, transport: str) -> None:
    if bucket_bytes < 1:
        raise SyncError(f"bucket_bytes must be positive, found {bucket_bytes}")
    if not receivers or not set(receivers) <= set(range(size)):
        raise SyncError(f"ranks must be some of 0..{size - 1}, found {receivers}")
    if transport not in get_args(Transport):
        raise SyncError(f"transport must be one of {get_args(Transport)}, found {transport!r}")
