"""The versioned weight store of a node: the last committed version, in shared memory or on a disk, for whoever comes by name.

A slot is one file per engine worker (its image, `sync.route`). A small JSON file, the head, says which slot is live and is
only ever replaced whole, by `rename`: whatever is killed whenever, the head names a slot that was complete and verified.
Writers fill a slot that the head does not name; readers hold a lock on what they read, and a slot that someone still reads is
not written again but left to them, and another one made. Nobody waits for anybody, and no lock outlives its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.sync.arena import SHARED_MEMORY, Arena, allocate, remove_stale
from mbridge_rl.sync.errors import StoreError

logger = logging.getLogger(__name__)

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_ABANDONED_SECONDS = 3600.0
_UNNAMED = "sync."


@dataclass(frozen=True)
class Head:
    """What is live.

    Attributes:
        version: that was committed.
        fingerprint: of the route that its images follow.
        token: of the slot.
        sizes: bytes of every worker's image.
        digest: of all weights together.
    """

    version: int
    fingerprint: str
    token: str
    sizes: tuple[int, ...]
    digest: str | None


@dataclass
class Slot:
    """A slot that is being filled, on the side of its writers."""

    token: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    locks: list[int]

    def open(self) -> list[Arena]:
        """The images, writable."""
        return [Arena(Path(path), size, writable=True) for path, size in zip(self.paths, self.sizes, strict=True)]


class Reading:
    """One worker's live image, read-only by convention and for as long as this is not closed."""

    def __init__(self, head: Head, path: Path, lock: int, size: int) -> None:
        self.head = head
        self._lock: int | None = lock
        self._arena = Arena(path, size, writable=False)
        self.image: Tensor = self._arena.view(0, (size,), torch.uint8)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            self._arena.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StorePart:
    """One worker's image of a slot that the worker itself fills, on its own host."""

    def __init__(self, store: WeightStore, token: str, worker: int, arena: Arena, lock: int) -> None:
        self._store, self._token, self._worker, self._arena = store, token, worker, arena
        self._lock: int | None = lock
        self.image: Tensor = arena.view(0, (arena.nbytes,), torch.uint8)

    def commit(self, version: int, description: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """All workers of the engine have verified theirs: any of them may say so, and each says the same."""
        self.close()
        self._store.describe(description["fingerprint"], description)
        self._store.set_head(Head(version, description["fingerprint"], self._token, tuple(sizes), None))

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            self._arena.close()


class WeightStore:
    """A store by its name. Nothing is created before something is written.

    Args:
        name: letters, digits, `_` and `.`; the same on all processes that share it.
        directory: shared memory, or a directory on a disk (then `durable` makes commits survive a power failure).

    Raises:
        StoreError: the name cannot be part of a file's.
    """

    def __init__(self, name: str, directory: str | Path = SHARED_MEMORY, *, durable: bool = False) -> None:
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} cannot name a weight store: use letters, digits, '_' and '.'")
        self.name, self.directory, self._durable = name, Path(directory), durable
        self._prefix = f"mbridge_rl-store-{name}-"
        self._head = self.directory / f"{self._prefix}head.json"
        self._mine: set[str] = set()  # slots that this object made
        self._user: int | None = None

    @classmethod
    def unnamed(cls) -> str:
        """A name for a store that ends with its users."""
        return f"{_UNNAMED}{os.getpid()}.{secrets.token_hex(4)}"

    @property
    def ends_with_its_users(self) -> bool:
        return self.name.startswith(_UNNAMED)

    def head(self) -> Head | None:
        """What is live now; `None` if nothing was ever committed."""
        try:
            said = json.loads(self._head.read_text())
        except FileNotFoundError:
            return None
        if said["format"] != _FORMAT:
            raise StoreError(f"the weight store {self._head} has format {said['format']}, this library reads {_FORMAT}")
        return Head(said["version"], said["fingerprint"], said["token"], tuple(said["sizes"]), said["digest"])

    def describe(self, fingerprint: str, description: Mapping[str, Any]) -> None:
        """Keeps what readers need to understand images of this fingerprint, in JSON types. Done once is enough."""
        self._hold()
        if not self._description(fingerprint).exists():
            self._replace(self._description(fingerprint), description)

    def description(self, fingerprint: str) -> dict[str, Any]:
        """What `describe` kept.

        Raises:
            StoreError: nothing was kept under this fingerprint.
        """
        try:
            return json.loads(self._description(fingerprint).read_text())
        except FileNotFoundError as error:
            raise StoreError(f"the weight store {self.name!r} does not know the plan {fingerprint}") from error

    def begin(self, sizes: Sequence[int]) -> Slot:
        """A slot to fill, for images of `sizes` bytes: the idle one, or a new one where it does not fit or is still read. What
        dead processes left in the directory goes first.

        Raises:
            ArenaError: there is no room.
        """
        self._hold()
        remove_stale_stores(self.directory)
        remove_stale(self.directory)
        live = self.head()
        slot = None
        for token in sorted(self._tokens() - {live.token if live else ""}):
            locks = self._locked(token)
            if locks is None:
                continue  # someone reads it, or another writer fills it
            paths = self._paths(token, len(sizes))
            # A rank of a dead trainer may still write to the dead trainer's slot: it is left to it, without its name.
            found = [path.stat().st_size if path.exists() else -1 for path in paths]
            if slot is None and token in self._mine and found == list(sizes):
                slot = Slot(token, tuple(map(str, paths)), tuple(sizes), locks)
                continue
            self._unlink(token)
            for lock in locks:
                os.close(lock)
        return slot or self._new_slot(sizes)

    def commit(self, slot: Slot, version: int, fingerprint: str, digest: str | None) -> None:
        """Makes `slot` the live one, in one step. All its writers are done, and what they wrote was verified."""
        if self._durable:
            for path in slot.paths:
                _sync_to_disk(path)
        self.set_head(Head(version, fingerprint, slot.token, slot.sizes, digest))
        self.abandon(slot)

    def set_head(self, head: Head) -> None:
        self._replace(self._head, {"format": _FORMAT, **asdict(head)})

    def abandon(self, slot: Slot) -> None:
        """Lets go of a slot; what was written stays where no reader looks."""
        while slot.locks:
            os.close(slot.locks.pop())

    def read(self, worker: int, token: str | None = None) -> Reading:
        """The live image of `worker`; zero copy, and nobody writes to it until the reading is closed.

        Args:
            token: of the slot that has to be live still, so that all workers of an engine read the same version.

        Raises:
            StoreError: nothing was committed, the engine of the store has no such worker, or another slot is live.
        """
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            head = self.head()
            if head is None:
                raise StoreError(f"nothing was committed to the weight store {self.name!r} in {self.directory}")
            if token is not None and head.token != token:
                raise StoreError(
                    f"the weight store {self.name!r} has moved on to version {head.version}; ask for its head again"
                )
            if worker >= len(head.sizes):
                raise StoreError(
                    f"the weight store {self.name!r} is of an engine of {len(head.sizes)} workers, asked for {worker}"
                )
            path = self._paths(head.token, len(head.sizes))[worker]
            try:
                lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # two commits went by since the head was read
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                now = self.head()
                if now is not None and now.token == head.token:
                    return Reading(now, path, lock, head.sizes[worker])
            os.close(lock)
        raise StoreError(f"the live slot of the weight store {self.name!r} cannot be opened; was the store removed?")

    def close(self) -> None:
        """This process writes to the store no longer. A named one stays, an hour at least; an unnamed one ends with it."""
        if self.ends_with_its_users and self._user is not None:
            for path in self.directory.glob(f"{self._prefix}*"):
                path.unlink(missing_ok=True)
        if self._user is not None:
            os.close(self._user)
            self._user = None

    def part(self, token: str, worker: int, size: int) -> StorePart:
        """One worker's image of the slot `token`, which is not live, for the worker to fill."""
        self._hold()
        self._drop_parts_of_others(token, worker)
        path = self.directory / f"{self._prefix}{token}.{worker}.image"
        lock = _locked_file(path, size)
        if lock is None:  # of another size, or still read: it stays with its readers
            path.unlink(missing_ok=True)
            lock = allocate(path, size)
        return StorePart(self, token, worker, Arena(path, size, writable=True), lock)

    def remove(self) -> None:
        """Closes it and unlinks everything. What is being read stays readable until it is closed."""
        self.close()
        for path in self.directory.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)

    def copy_to(self, other: WeightStore) -> None:
        """The live version into another store (from shared memory to a disk, or back), as a commit of its own."""
        head = self.head()
        if head is None:
            raise StoreError(f"nothing was committed to the weight store {self.name!r}")
        slot = other.begin(head.sizes)
        for worker, arena in enumerate(slot.open()):
            with self.read(worker, head.token) as reading:
                arena.view(0, (arena.nbytes,), torch.uint8).copy_(reading.image)
        other.describe(head.fingerprint, self.description(head.fingerprint))
        other.commit(slot, head.version, head.fingerprint, head.digest)

    def _drop_parts_of_others(self, token: str, worker: int) -> None:
        """This worker's images of trainers before this one (`<trainer>x<slot>`), but for the live one."""
        live = self.head()
        for path in self.directory.glob(f"{self._prefix}*.{worker}.image"):
            other = path.name[len(self._prefix) :].split(".")[0]
            if other.split("x")[0] != token.split("x")[0] and (live is None or other != live.token):
                path.unlink(missing_ok=True)

    def _hold(self) -> None:
        path = self.directory / f"{self._prefix}{'kept' if self._durable else 'users'}.lock"
        while self._user is None:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                self._user = lock
            else:  # `remove_stale_stores` took its name away meanwhile
                os.close(lock)

    def _description(self, fingerprint: str) -> Path:
        return self.directory / f"{self._prefix}{fingerprint}.plan.json"

    def _paths(self, token: str, workers: int) -> list[Path]:
        return [self.directory / f"{self._prefix}{token}.{worker}.image" for worker in range(workers)]

    def _tokens(self) -> set[str]:
        return {path.name[len(self._prefix) :].split(".")[0] for path in self.directory.glob(f"{self._prefix}*.image")}

    def _locked(self, token: str) -> list[int] | None:
        """Descriptors of the slot's files, all locked; `None` where another process holds one."""
        locks: list[int] = []
        for path in sorted(self.directory.glob(f"{self._prefix}{token}.*.image")):
            try:
                lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            locks.append(lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                for held in locks:
                    os.close(held)
                return None
        return locks

    def _new_slot(self, sizes: Sequence[int]) -> Slot:
        token = secrets.token_hex(8)
        self._mine.add(token)
        paths, locks = self._paths(token, len(sizes)), []
        try:
            for path, size in zip(paths, sizes, strict=True):
                locks.append(allocate(path, size))
        except BaseException:
            self._unlink(token)
            for lock in locks:
                os.close(lock)
            raise
        return Slot(token, tuple(map(str, paths)), tuple(sizes), locks)

    def _unlink(self, token: str) -> None:
        for path in self.directory.glob(f"{self._prefix}{token}.*.image"):
            path.unlink(missing_ok=True)

    def _replace(self, path: Path, content: Mapping[str, Any]) -> None:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        partial.write_text(json.dumps(content))
        if self._durable:
            _sync_to_disk(str(partial))
        os.replace(partial, path)
        if self._durable:
            _sync_to_disk(str(self.directory))


def remove_stale_stores(directory: Path = SHARED_MEMORY, older_than: float = _ABANDONED_SECONDS) -> list[Path]:
    """Removes stores without a writer: unnamed ones at once, others when nobody has written to them for `older_than` seconds;
    durable ones stay.

    Returns:
        The paths that were unlinked.
    """
    removed: list[Path] = []
    for users in directory.glob("mbridge_rl-store-*-users.lock"):
        files = list(directory.glob(f"{users.name.removesuffix('users.lock')}*"))
        with contextlib.suppress(OSError):  # locked by a user, or gone by now
            named = not users.name.startswith(f"mbridge_rl-store-{_UNNAMED}")
            if named and time.time() - max(path.stat().st_mtime for path in files) < older_than:
                continue
            lock = os.open(users, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in files:
                    path.unlink(missing_ok=True)
                removed += files
            finally:
                os.close(lock)
    if removed:
        logger.info("removed %d files of abandoned weight stores from %s", len(removed), directory)
    return removed


def _locked_file(path: Path, size: int) -> int | None:
    """A descriptor of the file, locked; `None` if there is none of this size, or another process holds it."""
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_size == size:
                return lock
        os.close(lock)
    return None


def _sync_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
