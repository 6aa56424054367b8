"""What a weight store gives to its writers and readers: a slot, a part of a slot, a reading, and the head, which names the live
version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mbridge_rl.core.errors import StoreError
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.locks import release
from mbridge_rl.distributed.private_files import is_named
from mbridge_rl.sync.store.image import Label, map_image

FORMAT = 2


@dataclass(frozen=True)
class Head:
    """The live version of a store.

    Attributes:
        version: the version that was committed.
        fingerprint: the fingerprint of the route that its images follow.
        token: the token of its slot.
        fill: nonce of the fill of that slot, which is in the images' labels as well. It identifies the version: numbers of
            versions and slots may come again, a fill never does.
        sizes: bytes of every worker's image.
        digest: the digest of all weights together; `None` without verification.
        proofs: the proof of every worker's image (`packing.proof_of`); `None` if the trainer made none.
        plan: identifies the description, among those of the same fingerprint, that belongs to the version.
    """

    version: int
    fingerprint: str
    token: str
    fill: str
    sizes: tuple[int, ...]
    digest: str | None
    proofs: tuple[str, ...] | None = None
    plan: str | None = None

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, path: Path, content: bytes) -> Head:
        """Reads the content of the file `path`.

        Raises:
            StoreError: it is of another format, or not a head.
        """
        try:
            fields = json.loads(content)
            file_format = fields.pop("format")
            if file_format != FORMAT:
                raise StoreError(
                    f"the weight store of {path} has format {file_format}, this mbridge_rl reads and writes format {FORMAT}: "
                    "read it with the version that wrote it, or remove it (WeightStore(name).remove()) and sync again"
                )
            proofs = fields.pop("proofs")
            return cls(sizes=tuple(fields.pop("sizes")), proofs=None if proofs is None else tuple(proofs), **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(
                f"{path} is no head of a weight store ({type(error).__name__}: {error}): remove the store"
            ) from error

    def described_by(self, plan: str) -> Head:
        return replace(self, plan=plan)


@dataclass
class Slot:
    """A slot that is being filled, on the side of its writers.

    Attributes:
        token: identifies the slot in its store.
        fill: nonce of this fill.
        paths: the files of the images, by worker.
        sizes: bytes of the images, by worker.
        locks: descriptors of the files, which are locked; empty on processes that do not hold the store.
    """

    token: str
    fill: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    locks: list[int]

    def open(self) -> list[Arena]:
        """The images, writable."""
        return [map_image(path, size, writable=True) for path, size in zip(self.paths, self.sizes, strict=True)]


class Reading:
    """One worker's live image. It is read-only by convention, and readable until `close`.

    Attributes:
        head: the head that named the image.
        image: the bytes, uint8 `[nbytes]`.
    """

    def __init__(self, head: Head, path: Path, lock: int, label: Label) -> None:
        self.head = head
        self._path, self._label = path, label
        self._lock: int | None = lock
        self._arena = map_image(path, label.nbytes, writable=False, descriptor=lock)
        self.image: Tensor = self._arena.view(0, (label.nbytes,), torch.uint8)

    def require_same(self) -> None:
        """Checks, after everything was read, that all of it belonged to the fill that the reading was opened for.

        Raises:
            StoreError: somebody filled the slot anew in spite of the lock.
        """
        if self._lock is None:
            raise StoreError(f"the reading of {self._path} is closed")
        if (label := Label.read(self._path, self._lock)) != self._label:
            raise StoreError(
                f"{self._path} was filled anew while it was read: it has fill {label.fill}, expected {self._label.fill} "
                f"(version {self.head.version})"
            )

    def close(self) -> None:
        if self._lock is not None:
            release(self._lock)
            self._lock = None
            self._arena.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PartStore(Protocol):
    """The store to which a `StorePart` belongs."""

    def commit_part(self, head: Head, description: Mapping[str, Any]) -> None: ...


class StorePart:
    """One worker's image of a slot, which the worker fills itself, on its own host.

    Attributes:
        image: the bytes, uint8 `[nbytes]`, writable.
    """

    def __init__(self, store: PartStore, token: str, label: Label, path: Path, lock: int) -> None:
        self._store, self._token, self._label, self._path = store, token, label, path
        self._lock: int | None = lock
        self._arena = map_image(path, label.nbytes, writable=True, descriptor=lock)
        self.image: Tensor = self._arena.view(0, (label.nbytes,), torch.uint8)

    def commit(self, version: int, description: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """Makes the slot live. All workers of the engine have verified their images; each of them commits, with the same head.

        Args:
            version: the version of the images.
            description: the trainer's introduction, which readers of the images need.
            sizes: bytes of the images of all workers.

        Raises:
            StoreError: the image does not belong to the store any more.
        """
        self.require_same(version)
        fingerprint, fill = description["fingerprint"], self._label.fill
        self._store.commit_part(Head(version, fingerprint, self._token, fill, tuple(sizes), None), description)
        self.close()

    def require_same(self, version: int) -> None:
        """Checks that the image still holds what this worker wrote.

        Raises:
            StoreError: somebody else filled or removed the part, or it was closed.
        """
        lock = self._lock
        if lock is None or not is_named(self._path, lock) or Label.read(self._path, lock) != self._label:
            raise StoreError(
                f"{self._path} does not hold version {version} any more, expected fill {self._label.fill}: sync again"
            )

    def close(self) -> None:
        if self._lock is not None:
            release(self._lock)
            self._lock = None
            self._arena.close()
