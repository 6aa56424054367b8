"""Streaming HF tensors from a sharded model: one payload per contributing rank and bucket, packed, one bucket ahead.

The number of broadcasts grows with bytes, not with parameters. Peak extra memory is two buckets (or two of the largest tensor,
where that is larger) and what the consumer keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.buckets import Bucket, offsets, pack
from mbridge_rl.core.plan import Copy, Plan
from mbridge_rl.sync.group import RankGroup

DEFAULT_BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class _Payload:
    """What one rank contributes to a bucket."""

    buffer: Tensor
    copies: list[Copy]
    starts: list[int]
    work: dist.Work | None


def stream_tensors(
    plan: Plan, live: Mapping[str, Tensor], group: RankGroup, dtype: torch.dtype, bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yields every HF tensor of `plan`, whole, on every rank, in checkpoint order. All ranks must iterate in lockstep.

    Args:
        plan: from all ranks of `group` to whole HF tensors.
        live: this rank's tensors.
        dtype: of the yielded tensors; parameters of another dtype are cast before they travel.
    """
    buckets = pack(plan.hf_shapes, dtype, bucket_bytes)
    ahead = _start(buckets[0], plan, live, group, dtype) if buckets else []
    for index, bucket in enumerate(buckets):
        payloads = ahead
        if index + 1 < len(buckets):
            ahead = _start(buckets[index + 1], plan, live, group, dtype)
        yield from _unpack(bucket, payloads, group, dtype)


def _start(bucket: Bucket, plan: Plan, live: Mapping[str, Tensor], group: RankGroup, dtype: torch.dtype) -> list[_Payload]:
    by_source: dict[int, list[Copy]] = {}
    for slot in bucket.slots:
        for copy in plan.by_hf_name[slot.hf_name]:
            by_source.setdefault(copy.source_rank, []).append(copy)
    payloads = []
    for source_rank, copies in sorted(by_source.items()):
        starts, nbytes = offsets(copy.numel * dtype.itemsize for copy in copies)
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=group.device)
        if source_rank == group.rank:
            for copy, start in zip(copies, starts, strict=True):
                _rectangle(buffer, copy, start, dtype).copy_(copy.source.of(live[copy.source.name], copy.shape))
        payloads.append(_Payload(buffer, copies, starts, group.broadcast(buffer, source_rank)))
    return payloads


def _unpack(bucket: Bucket, payloads: list[_Payload], group: RankGroup, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    tensors = {slot.hf_name: torch.empty(slot.shape, dtype=dtype, device=group.device) for slot in bucket.slots}
    for payload in payloads:
        if payload.work is not None:
            payload.work.wait()
        for copy, start in zip(payload.copies, payload.starts, strict=True):
            copy.target.of(tensors[copy.hf_name], copy.shape).copy_(_rectangle(payload.buffer, copy, start, dtype))
    payloads.clear()
    for slot in bucket.slots:
        yield slot.hf_name, tensors.pop(slot.hf_name)


def _rectangle(buffer: Tensor, copy: Copy, start: int, dtype: torch.dtype) -> Tensor:
    return buffer[start : start + copy.numel * dtype.itemsize].view(dtype).view(copy.shape)
