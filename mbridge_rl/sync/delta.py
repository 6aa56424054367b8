"""Deltas: the bits that changed since the last committed version, from each source rank to each target rank of a plan.

A message is bytes, for whatever carries them: shared memory, a socket, an object store. It holds the differences of the
rectangles that one rank sends to another (`core.delta`), compressed with zstd, or the rectangles themselves where that is
smaller. Every message continues a chain: it states the digest of what it starts from and of what it leads to, and a hash over
all before it. A receiver checks the chain, the bytes and both digests before it changes anything.

Both ends keep no more than the last committed version: the sender a packed copy of what it sends, the receiver the weights that
it serves. Baselines advance on commit only; an aborted sync leaves them where they were.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core import delta
from mbridge_rl.core.delta import Difference, Kind
from mbridge_rl.core.digest import signed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import Copy, Plan, copy_digest
from mbridge_rl.sync.errors import DeltaRefused, SyncError

_MAGIC = b"MBD1"
_CHUNK_BYTES = 16 << 20  # of weights, compressed together
_LEVEL = 3
_FRAME = struct.Struct("<BQQ")  # kind, count, bytes of the planes
_WHOLE = 255

Pair = tuple[int, int]


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    Attributes:
        version, base: that it leads to and starts from; `base` is `None` for a full sync, which needs no baseline.
        plan: fingerprint of the plan.
        before, after: hash of the digests of all rectangles, at both versions.
        chain: hash of `after` and of the chain that it continues.
        chunks: bytes of each compressed chunk, in order.
        full_nbytes: of the rectangles themselves.
        checksum: of everything else.
    """

    version: int
    base: int | None
    plan: str
    source_rank: int
    target_rank: int
    before: str
    after: str
    chain: str
    chunks: tuple[int, ...]
    full_nbytes: int
    checksum: str = ""


class _Ends:
    """What both ends know of the rectangles of every pair of ranks."""

    def __init__(self, plan: Plan, dtypes: Mapping[str, torch.dtype]) -> None:
        self.plan = plan
        self.tensors = {
            hf_name: HFTensor(hf_name, dtypes[hf_name], shape, plan.word_elements(hf_name, dtypes[hf_name].itemsize))
            for hf_name, shape in plan.hf_shapes.items()
        }
        self.copies: dict[Pair, list[Copy]] = defaultdict(list)
        for copy in plan.copies:
            self.copies[copy.source_rank, copy.target_rank].append(copy)

    def digest(self, copy: Copy, values: Tensor) -> int:
        return copy_digest(copy, values, self.tensors[copy.hf_name])

    def nbytes(self, copy: Copy) -> int:
        return copy.numel * self.tensors[copy.hf_name].dtype.itemsize

    def chunks(self, pair: Pair) -> Iterator[list[int]]:
        """Runs of rectangles, by index, that are compressed together."""
        chunk: list[int] = []
        filled = 0
        for index, copy in enumerate(self.copies[pair]):
            chunk.append(index)
            filled += self.nbytes(copy)
            if filled >= _CHUNK_BYTES:
                yield chunk
                chunk, filled = [], 0
        if chunk:
            yield chunk


@dataclass
class _Baseline:
    """The last committed version of what goes from one rank to another."""

    version: int
    chain: str
    values: list[Tensor]
    digests: list[int]


class DeltaSender:
    """One source rank's end.

    Args:
        plan: of the sync.
        rank: this source rank.
        dtypes: of every HF tensor as it travels; live tensors of another dtype are cast.
    """

    def __init__(self, plan: Plan, rank: int, dtypes: Mapping[str, torch.dtype]) -> None:
        self._ends = _Ends(plan, dtypes)
        self._pairs = [pair for pair in self._ends.copies if pair[0] == rank]
        self._committed: dict[Pair, _Baseline] = {}
        self._pending: dict[Pair, tuple[_Baseline, list[Difference | Tensor]]] = {}
        self._version: int | None = None
        self._encoded: int | None = None

    @property
    def version(self) -> int | None:
        """The last committed one, which the next delta starts from."""
        return self._version

    def encode(self, live: Mapping[str, Tensor], version: int, *, full: bool = False) -> dict[int, bytes]:
        """One message for every target rank.

        Args:
            live: this rank's tensors, by the plan's source names.
            full: for receivers without the baseline: new, restarted, or lost.

        Raises:
            SyncError: an encoded version waits for `commit` or `abort`.
        """
        if self._encoded is not None:
            raise SyncError(f"version {self._encoded} was neither committed nor aborted")
        self._encoded = version
        return {pair[1]: self._message(pair, live, version, full) for pair in self._pairs}

    def commit(self, version: int) -> None:
        """All receivers have applied `version`: the next delta starts from it.

        Raises:
            SyncError: `version` was not encoded last.
        """
        if version != self._encoded:
            raise SyncError(f"version {version} cannot be committed: encoded last was {self._encoded}")
        for pair, (baseline, changes) in self._pending.items():
            for values, change in zip(baseline.values, changes, strict=True):
                if isinstance(change, Tensor):
                    values.copy_(change)
                else:
                    delta.apply_to(values, change)
            self._committed[pair] = baseline
        self._version = version
        self.abort()

    def abort(self) -> None:
        """Forgets what was encoded last; the baseline stays."""
        self._pending, self._encoded = {}, None

    def _message(self, pair: Pair, live: Mapping[str, Tensor], version: int, full: bool) -> bytes:
        copies = self._ends.copies[pair]
        stored = self._committed.get(pair)
        old = None if full else stored
        payload, changes, digests = [], [], []
        whole_bytes = sum(self._ends.nbytes(copy) for copy in copies)
        for chunk in self._ends.chunks(pair):
            news = [self._read(copies[index], live) for index in chunk]
            compressed = None if old is None else _compressed_differences([old.values[index] for index in chunk], news)
            if compressed is None:
                payload.append(_whole(news))
                changes += news
                digests += [self._ends.digest(copies[index], new) for index, new in zip(chunk, news, strict=True)]
                continue
            data, differences = compressed
            payload.append(data)
            changes += differences
            for index, new, found in zip(chunk, news, differences, strict=True):
                digests.append(old.digests[index] if found.kind is Kind.SAME else self._ends.digest(copies[index], new))
        after = _hash_of(digests)
        base = None if old is None else old.version
        chain = _continued(self._ends.plan.fingerprint if old is None else old.chain, version, after)
        values = stored.values if stored is not None else [torch.empty_like(change) for change in changes]
        self._pending[pair] = _Baseline(version, chain, values, digests), changes
        before = "" if old is None else _hash_of(old.digests)
        sizes = tuple(map(len, payload))
        header = Header(version, base, self._ends.plan.fingerprint, *pair, before, after, chain, sizes, whole_bytes)
        return _framed(header, b"".join(payload))

    def _read(self, copy: Copy, live: Mapping[str, Tensor]) -> Tensor:
        """The rectangle as it is now, contiguous and nobody else's."""
        part = copy.source.of(live[copy.source.name], copy.shape).to(self._ends.tensors[copy.hf_name].dtype)
        return part.cpu().clone(memory_format=torch.contiguous_format)


class DeltaReceiver:
    """One target rank's end.

    Args:
        plan: of the sync.
        rank: this target rank.
        dtypes: of every HF tensor as it travels, and of the tensors that it goes to.

    Raises:
        SyncError: the rank receives nothing.
    """

    def __init__(self, plan: Plan, rank: int, dtypes: Mapping[str, torch.dtype]) -> None:
        self._ends = _Ends(plan, dtypes)
        self._pairs = [pair for pair in self._ends.copies if pair[1] == rank]
        if not self._pairs:
            raise SyncError(f"target rank {rank} receives nothing in this plan")
        self.rank = rank
        self._chains: dict[Pair, str] = {}
        self.version: int | None = None

    def apply(self, messages: Iterable[bytes], tensors: Mapping[str, Tensor]) -> int:
        """Applies one version's messages, one from every source rank that has something for this one, all or none.

        Args:
            tensors: this rank's, by the plan's target names; contiguous. They hold the version before.

        Returns:
            The version that they hold now.

        Raises:
            DeltaRefused: a message is damaged, missing, of another plan, or does not follow on what is here. Nothing changed.
        """
        received = {}
        for message in messages:
            header, payload = unframed(message)
            received[header.source_rank, header.target_rank] = header, payload
        version = self._require_next(received)
        self._require_dtypes(tensors)
        changes = [(copy, change) for pair in self._pairs for copy, change in self._checked(pair, *received[pair], tensors)]
        for copy, change in changes:
            target = tensors[copy.target.name]
            if isinstance(change, Tensor):
                copy.target.of(target, copy.shape).copy_(change)
            else:
                delta.apply(change, copy.target, copy.shape, target)
        self._chains = {pair: header.chain for pair, (header, _) in received.items()}
        self.version = version
        return version

    def _require_dtypes(self, tensors: Mapping[str, Tensor]) -> None:
        for pair in self._pairs:
            for copy in self._ends.copies[pair]:
                dtype, found = self._ends.tensors[copy.hf_name].dtype, tensors[copy.target.name].dtype
                if dtype != found:
                    raise SyncError(
                        f"{copy.target.name} is {found}, and {copy.hf_name} travels as {dtype}: nothing was changed"
                    )

    def _require_next(self, received: Mapping[Pair, tuple[Header, bytes]]) -> int:
        """All messages are there, of one version, and follow on what is here."""
        if received.keys() != set(self._pairs):
            raise DeltaRefused(
                f"expected messages from source ranks {sorted(source for source, _ in self._pairs)} to {self._pairs[0][1]}, "
                f"found {sorted(received)}"
            )
        versions = {header.version for header, _ in received.values()}
        if len(versions) > 1:
            raise DeltaRefused(f"messages of different versions came together: {sorted(versions)}")
        for pair, (header, _) in received.items():
            if header.plan != self._ends.plan.fingerprint:
                raise DeltaRefused(f"the delta from rank {pair[0]} is of plan {header.plan}, not {self._ends.plan.fingerprint}")
            if header.base is None:
                expected = _continued(header.plan, header.version, header.after)
            else:
                expected = _continued(self._chains.get(pair, ""), header.version, header.after)
                if header.base != self.version:
                    raise DeltaRefused(
                        f"the delta from rank {pair[0]} leads from version {header.base} to {header.version}, and version "
                        f"{self.version} is here: ask for a full sync"
                    )
            if header.chain != expected:
                raise DeltaRefused(
                    f"the delta from rank {pair[0]} to version {header.version} continues another history: ask for a full sync"
                )
        return versions.pop()

    def _checked(
        self, pair: Pair, header: Header, payload: bytes, tensors: Mapping[str, Tensor]
    ) -> list[tuple[Copy, Difference | Tensor]]:
        """The changes of one message, which lead from the weights that are here to the digest that the header states."""
        copies = self._ends.copies[pair]
        changes: list[tuple[Copy, Difference | Tensor]] = []
        before, after, start = [], [], 0
        try:
            for chunk, size in zip(self._ends.chunks(pair), header.chunks, strict=True):
                data = payload[start : start + size]
                start += size
                of_chunk = [copies[index] for index in chunk]
                shapes = [(copy.shape, self._ends.tensors[copy.hf_name].dtype) for copy in of_chunk]
                for copy, change in zip(of_chunk, _opened(data, shapes), strict=True):
                    here = copy.target.of(tensors[copy.target.name], copy.shape).contiguous()
                    if header.base is not None:
                        before.append(self._ends.digest(copy, here))
                    if isinstance(change, Difference):
                        unchanged = change.kind is Kind.SAME and before
                        after.append(before[-1] if unchanged else self._ends.digest(copy, delta.apply_to(here.clone(), change)))
                    else:
                        after.append(self._ends.digest(copy, change))
                    changes.append((copy, change))
        except (ValueError, struct.error) as error:
            raise DeltaRefused(f"the delta from rank {pair[0]} to version {header.version} is damaged: {error}") from error
        if header.base is not None and _hash_of(before) != header.before:
            raise DeltaRefused(
                f"the weights here are not version {header.base} as rank {pair[0]} knows it: ask for a full sync"
            )
        if _hash_of(after) != header.after:
            raise DeltaRefused(f"the delta from rank {pair[0]} does not lead to version {header.version}: it is damaged")
        return changes


def unframed(message: bytes) -> tuple[Header, bytes]:
    """A message's header and payload.

    Raises:
        DeltaRefused: it is damaged.
    """
    try:
        length = int.from_bytes(message[4:8], "little")
        said = json.loads(message[8 : 8 + length])
        header = Header(**{**said, "chunks": tuple(said["chunks"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DeltaRefused(f"a message of {len(message)} bytes is no delta, or damaged: {error}") from error
    payload = message[8 + length :]
    if message[:4] != _MAGIC or _checksum(header, payload) != header.checksum or sum(header.chunks) != len(payload):
        raise DeltaRefused(f"the delta to version {header.version} is damaged: its checksum is another")
    return header, payload


def _framed(header: Header, payload: bytes) -> bytes:
    text = json.dumps(asdict(replace(header, checksum=_checksum(header, payload)))).encode()
    return _MAGIC + len(text).to_bytes(4, "little") + text + payload


def _checksum(header: Header, payload: bytes) -> str:
    state = hashlib.blake2b(json.dumps(asdict(replace(header, checksum=""))).encode(), digest_size=16)
    state.update(payload)
    return state.hexdigest()


def _continued(chain: str, version: int, after: str) -> str:
    return hashlib.blake2b(f"{chain} {version} {after}".encode(), digest_size=16).hexdigest()


def _hash_of(digests: Sequence[int]) -> str:
    numbers = torch.tensor([signed(value) for value in digests], dtype=torch.int64)
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).hexdigest()


def _compressed_differences(olds: Sequence[Tensor], news: Sequence[Tensor]) -> tuple[bytes, list[Difference]] | None:
    """One chunk; `None` where the rectangles themselves are not larger."""
    differences = [delta.difference(old, new) for old, new in zip(olds, news, strict=True)]
    frames = b"".join(_FRAME.pack(found.kind, found.count, len(found.planes)) + found.planes for found in differences)
    data = bytes([0]) + len(frames).to_bytes(8, "little") + _zstandard().ZstdCompressor(level=_LEVEL).compress(frames)
    return (data, differences) if len(data) < sum(new.nbytes for new in news) else None


def _whole(news: Sequence[Tensor]) -> bytes:
    return bytes([_WHOLE]) + b"".join(delta.integers(new).flatten().view(torch.uint8).numpy().tobytes() for new in news)


def _opened(data: bytes, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Iterator[Difference | Tensor]:
    """A chunk's changes. Raises ValueError, struct.error where it is none."""
    if data[:1] == bytes([_WHOLE]):
        yield from _opened_whole(data[1:], shapes)
        return
    zstandard, length = _zstandard(), int.from_bytes(data[1:9], "little")
    try:
        frames = zstandard.ZstdDecompressor().decompress(data[9:], max_output_size=length)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    start = 0
    for _ in shapes:
        kind, count, nbytes = _FRAME.unpack_from(frames, start)
        start += _FRAME.size
        yield Difference(Kind(kind), count, frames[start : start + nbytes])
        start += nbytes
    if start != len(frames):
        raise ValueError(f"a chunk has {len(frames) - start} bytes too many")


def _opened_whole(data: bytes, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Iterator[Tensor]:
    start = 0
    for shape, dtype in shapes:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if start + nbytes > len(data):
            raise ValueError(f"{len(data)} bytes of whole rectangles end too early")
        yield torch.frombuffer(bytearray(data[start : start + nbytes]), dtype=torch.uint8).view(dtype).view(shape)
        start += nbytes


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("deltas are compressed with zstd: pip install 'mbridge-rl[delta]'") from error
    return zstandard
