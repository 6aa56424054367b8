"""Sends a stream of named tensors from one process to several others, over their own process group.

It is for frameworks in which the two ends know only the stream; if both know the plan, `sync.weight_sync` sends less. Tensors
are in buckets, 64-byte aligned; a tensor that is larger than a bucket is sent in chunks. A bucket is two broadcasts: the sizes,
then a header with the payload and its digest. While a bucket is sent, the next one is filled, or the last one read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.buckets import aligned
from mbridge_rl.core.digest import digest
from mbridge_rl.core.errors import DigestMismatch, IncompleteSync, SyncError, listed
from mbridge_rl.distributed.rendezvous import GroupAddress
from mbridge_rl.sync.transports.process_group import device_of, explained, join, leave

_ROW_BYTES = 8192  # bytes of a row of the payload in the digest
_ABSENT = "the sender and the receivers of this broadcast did not all come"


@dataclass
class Sent:
    """Attributes:
    nbytes: bytes of all tensors.
    """

    tensors: int = 0
    nbytes: int = 0
    buckets: int = 0


@dataclass
class _Bucket:
    """A bucket that is being filled; `payload` is uint8 `[capacity]`."""

    payload: Tensor
    entries: list[dict[str, Any]] = field(default_factory=list)
    end: int = 0

    def has_room_for(self, nbytes: int) -> bool:
        """Whether all these bytes fit, or some of them if the tensor is larger than a bucket."""
        room = len(self.payload) - self.end
        return not self.entries or nbytes <= room or (nbytes > len(self.payload) and room > 0)

    def add(self, name: str, tensor: Tensor, data: Tensor, first: int) -> int:
        """Adds as much of `data`, the bytes of `tensor`, from byte `first` on as fits; returns the end of the added part."""
        part = data[first : first + len(self.payload) - self.end]
        description = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        self.payload[self.end : self.end + len(part)].copy_(part)
        self.entries.append({**description, "first": first, "start": self.end, "size": len(part)})
        self.end = min(aligned(self.end + len(part)), len(self.payload))
        return first + len(part)


@dataclass
class _Partial:
    """A tensor of which some bytes have arrived."""

    name: str
    tensor: Tensor
    arrived: int = 0


class Broadcast:
    """One end of a broadcast: rank 0 of the group sends, all others receive. The group ends if a member fails, or if the others
    wait for it longer than the time-out; the next group needs another id.

    Args:
        address: where the members of the group meet.
        rank: this member's rank in the group.
        bucket_bytes: bytes of one bucket; two are staged at once.
        verify: whether buckets carry digests; the sender's choice applies.
        timeout: seconds, for every single wait.

    Raises:
        TransferTimeout: not all members joined.
    """

    def __init__(self, address: GroupAddress, rank: int, *, bucket_bytes: int, verify: bool, timeout: float) -> None:
        if bucket_bytes < 1:
            raise SyncError(f"bucket_bytes must be positive, found {bucket_bytes}")
        self._address, self._rank = address, rank
        self._capacity = -(-bucket_bytes // _ROW_BYTES) * _ROW_BYTES
        self._verify, self._device = verify, device_of(address)
        self._group = join(address, rank, timeout)

    async def send(self, tensors: Iterable[tuple[str, Tensor]], version: int | None = None) -> Sent:
        """Sends all `tensors`, which may be an asynchronous iterable, too.

        Raises:
            TransferTimeout: a receiver did not take part.
            Exception: whatever `tensors` raises, which is also sent to the receivers.
        """
        sent, bucket = Sent(), self._empty()
        under_way: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        under_way.set_result(None)
        try:
            async for name, tensor in _asynchronous(tensors):
                data = tensor.detach().contiguous().view(-1).view(torch.uint8)
                sent.tensors, sent.nbytes = sent.tensors + 1, sent.nbytes + len(data)
                done = 0
                while True:
                    if not bucket.has_room_for(len(data)):
                        await under_way
                        under_way, bucket = self._start(bucket, version, sent), self._empty()
                    done = bucket.add(name, tensor, data, done)
                    if done == len(data):
                        break
            await under_way
            await self._start(bucket, version, sent, last=True)
        except BaseException as error:
            with contextlib.suppress(SyncError):  # a receiver that cannot be reached notices it by the time-out
                await under_way
                await self._start(self._empty(), version, sent, error=f"the sender failed: {type(error).__name__}: {error}")
            leave(self._address, self._rank)
            raise
        return sent

    async def receive(self, version: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        """Yields the sent tensors in order; the consumer may keep each of them. After an error all yielded tensors belong to an
        incomplete version.

        Raises:
            DigestMismatch: other bytes arrived than were sent.
            SyncError: the sender failed, sends another version than `version`, or a tensor is incomplete.
            TransferTimeout: the sender or another receiver did not take part.
        """
        partial: _Partial | None = None
        try:
            next_bucket = asyncio.ensure_future(asyncio.to_thread(self._receive))
            while True:
                header, payload = await next_bucket
                self._check(header, payload, version)
                if not header["last"]:
                    next_bucket = asyncio.ensure_future(asyncio.to_thread(self._receive))
                for entry in header["entries"]:
                    partial = _placed(entry, payload, partial)
                    if partial.arrived == partial.tensor.nbytes:
                        complete, partial = partial, None
                        yield complete.name, complete.tensor
                if header["last"]:
                    if partial is not None:
                        raise IncompleteSync(f"the stream ended within {partial.name}")
                    return
        except BaseException:
            leave(self._address, self._rank)
            raise

    def _empty(self) -> _Bucket:
        return _Bucket(torch.zeros(self._capacity, dtype=torch.uint8, device=self._device))

    def _start(
        self, bucket: _Bucket, version: int | None, sent: Sent, *, last: bool = False, error: str = ""
    ) -> asyncio.Future[None]:
        """Begins to send a bucket, after the one before has been sent."""
        sent.buckets += 1
        payload = bucket.payload[: -(-bucket.end // _ROW_BYTES) * _ROW_BYTES]
        proof = _proof(payload) if self._verify else ""
        header = {"version": version, "entries": bucket.entries, "last": last, "error": error, "digest": proof}
        return asyncio.ensure_future(asyncio.to_thread(self._send, json.dumps(header).encode(), payload))

    def _send(self, header: bytes, payload: Tensor) -> None:
        header_bytes = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(self._device)
        padding = torch.zeros(aligned(len(header_bytes)) - len(header_bytes), dtype=torch.uint8, device=self._device)
        self._cast(torch.tensor([len(header_bytes), len(payload)], device=self._device))
        self._cast(torch.cat([header_bytes, padding, payload]))

    def _receive(self) -> tuple[dict[str, Any], Tensor]:
        sizes = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._cast(sizes)
        header_size, payload_size = sizes.tolist()
        start = aligned(header_size)
        data = torch.empty(start + payload_size, dtype=torch.uint8, device=self._device)
        self._cast(data)
        return json.loads(bytes(data[:header_size].cpu().numpy())), data[start:]

    def _cast(self, tensor: Tensor) -> None:
        device = torch.cuda.device(self._device) if tensor.is_cuda else contextlib.nullcontext()  # new threads use device 0
        with device, explained(_ABSENT):
            self._group.broadcast(tensor, 0).wait()
            if tensor.is_cuda:
                torch.cuda.current_stream().synchronize()

    def _check(self, header: Mapping[str, Any], payload: Tensor, version: int | None) -> None:
        if header["error"]:
            raise SyncError(header["error"])
        if version is not None and header["version"] is not None and header["version"] != version:
            raise SyncError(f"the sender sends version {header['version']}, this receiver waits for version {version}")
        if header["digest"] and _proof(payload) != header["digest"]:
            names = listed(entry["name"] for entry in header["entries"])
            raise DigestMismatch(f"a bucket of version {header['version']} arrived with other bytes: {names}")


def _proof(payload: Tensor) -> str:
    words = payload.view(torch.int64).view(len(payload) // _ROW_BYTES, _ROW_BYTES // 8)
    return f"{digest(words):016x}"


def _placed(entry: Mapping[str, Any], payload: Tensor, partial: _Partial | None) -> _Partial:
    """The tensor of an entry, with the entry's bytes copied into it. A complete tensor is not copied but stays in the
    payload."""
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    data = payload[entry["start"] : entry["start"] + entry["size"]]
    if partial is None:
        if entry["first"] == 0 and len(data) == torch.Size(shape).numel() * dtype.itemsize:
            return _Partial(entry["name"], data.view(dtype).view(shape), len(data))
        partial = _Partial(entry["name"], torch.empty(shape, dtype=dtype, device=payload.device))
    if (partial.name, partial.arrived) != (entry["name"], entry["first"]):
        following = f"bytes from {entry['first']} of {entry['name']}"
        raise IncompleteSync(f"{partial.name}: {partial.arrived} of its bytes have arrived, and what comes next is {following}")
    partial.tensor.view(-1).view(torch.uint8)[partial.arrived : partial.arrived + len(data)].copy_(data)
    return _Partial(partial.name, partial.tensor, partial.arrived + len(data))


async def _asynchronous(items: Any) -> AsyncIterator[Any]:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
