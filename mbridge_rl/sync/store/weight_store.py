"""The versioned weight store of a host: it holds the last committed version, in shared memory or on a disk, under a name.

A slot is one file per engine worker (its image, `sync.store.image`). A small JSON file, the head, names the live slot and its
fill. It is only replaced as a whole, by `rename`, so whichever process is killed at any time, the head names a fill that was
complete and verified. Writers fill a slot that the head does not name. Readers lock what they read; a slot that is still being
read is not written again but left to its readers, and a new one is made. Readers also compare the nonce of the fill in the head
with the one in the image's own label, before and after they read. Only a new writer waits, for the writer before it, and no
lock outlives its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.errors import StoreError
from mbridge_rl.distributed.arena import SHARED_MEMORY, allocate, remove_stale
from mbridge_rl.distributed.locks import keep, release, try_lock
from mbridge_rl.distributed.private_files import is_named, open_file, read_file, write_new_file
from mbridge_rl.sync.store.image import LABEL_BYTES, Label, new_fill
from mbridge_rl.sync.store.slots import Head, Reading, Slot, StorePart
from mbridge_rl.sync.store.stale_stores import remove_stale_stores, require_store_name
from mbridge_rl.sync.store.writer_lock import TAKE_OVER_SECONDS, Kind, WriterLock

__all__ = ["Head", "Reading", "Slot", "StorePart", "WeightStore", "remove_stale_stores"]

_READ_SECONDS = 10.0


class WeightStore:
    """A store by its name. Nothing is created before something is written.

    Args:
        name: letters, digits, `_` and `.`; the same in all processes that share the store.
        directory: shared memory, or a directory on a disk.
        durable: commits on a disk survive a power failure.
        temporary: the store ends with its writers (`unnamed` makes such a store with a name of its own).
        session: the session that may write (`writer_lock`), which several processes may share; by default this object alone.

    Raises:
        StoreError: the name cannot be part of a file name.
    """

    def __init__(
        self,
        name: str,
        directory: str | Path = SHARED_MEMORY,
        *,
        durable: bool = False,
        temporary: bool = False,
        session: str | None = None,
    ) -> None:
        require_store_name(name)
        self.name, self.directory, self.temporary, self._durable = name, Path(directory), temporary, durable
        self._prefix = f"mbridge_rl-store-{name}-"
        self._head = self.directory / f"{self._prefix}head.json"
        self._own_tokens: set[str] = set()  # the slots that this object made
        self._plans: dict[str, str] = {}  # fingerprint -> plan of the descriptions that this object wrote
        kind: Kind = "durable" if durable else "temporary" if temporary else "named"
        self._writer = WriterLock(self.directory / f"{self._prefix}users.lock", kind, session)

    @classmethod
    def unnamed(cls, directory: str | Path = SHARED_MEMORY) -> WeightStore:
        """A store that ends with its writers."""
        return cls(f"sync.{os.getpid()}.{secrets.token_hex(8)}", directory, temporary=True)

    @property
    def session(self) -> str:
        """The session that may write to the store."""
        return self._writer.session

    def hold(self, seconds: float = TAKE_OVER_SECONDS) -> None:
        """Makes sure that only this session writes until `close`.

        Raises:
            StoreError: another session writes and did not end within `seconds`; names its process.
        """
        self._writer.acquire(seconds)

    def head(self) -> Head | None:
        """The head, which names the live version; `None` if nothing was ever committed.

        Raises:
            StoreError: the file belongs to another user, was written by another version of this library, or is not a head.
        """
        try:
            content = read_file(self._head)
        except FileNotFoundError:
            return None
        return Head.from_json(self._head, content)

    def describe(self, fingerprint: str, description: Mapping[str, Any]) -> None:
        """Stores the description that readers need to understand images of this fingerprint, in JSON types. One call before the
        first commit is enough; later commits refer to it."""
        self.hold()
        content = json.dumps(description).encode()
        plan = hashlib.blake2b(content, digest_size=8).hexdigest()
        self._plans[fingerprint] = plan
        if not self._description(fingerprint, plan).exists():
            self._replace(self._description(fingerprint, plan), content)

    def description(self, fingerprint: str) -> dict[str, Any]:
        """The description of the live version or, if that has another fingerprint, the last one of `fingerprint`.

        Raises:
            StoreError: there is no description of this fingerprint.
        """
        head = self.head()
        try:
            if head is not None and head.fingerprint == fingerprint and head.plan is not None:
                path = self._description(fingerprint, head.plan)
            else:
                paths = self.directory.glob(f"{self._prefix}{fingerprint}.*.plan.json")
                path = max(paths, key=lambda path: path.stat().st_mtime_ns, default=self._description(fingerprint, "none"))
            return json.loads(read_file(path))
        except FileNotFoundError as error:
            raise StoreError(f"the weight store {self.name!r} does not know the plan {fingerprint}") from error

    def begin(self, sizes: Sequence[int]) -> Slot:
        """Returns a slot to fill, for images of `sizes` bytes: the idle one, or a new one if that does not fit or is still
        read. Its labels have the nonce of the new fill. Files that dead processes left in the directory are removed first.

        Raises:
            ArenaError: there is no room. StoreError: another session writes to this store.
        """
        self.hold()
        remove_stale_stores(self.directory)
        remove_stale(self.directory)
        live = self.head()
        slot = None
        for token in sorted(self._tokens() - {live.token if live else ""}):
            locks = self._locked(token)
            if locks is None:
                continue  # it is being read
            # A rank of a dead trainer may still write to the dead trainer's slot, so such a slot is only unlinked.
            expected = {path: LABEL_BYTES + size for path, size in zip(self._paths(token, len(sizes)), sizes, strict=True)}
            if (
                slot is None
                and token in self._own_tokens
                and {path: os.fstat(lock).st_size for path, lock in locks.items()} == expected
            ):
                slot = self._filled_anew(token, sizes, [locks[path] for path in expected])
                continue
            self._unlink(token)
            for lock in locks.values():
                release(lock)
        return slot or self._new_slot(sizes)

    def commit(
        self, slot: Slot, version: int, fingerprint: str, digest: str | None, proofs: Sequence[str] | None = None
    ) -> None:
        """Makes `slot` the live one, in one step. All its writers must be done, and what they wrote verified.

        Args:
            slot: from `begin`.
            version: the version that it holds.
            fingerprint: the fingerprint of the route of its images.
            digest: the digest of all weights together.
            proofs: the proof of every worker's image (`packing.proof_of`).

        Raises:
            StoreError: somebody removed the store or filled the slot meanwhile.
        """
        if not self._writer.is_held:
            raise StoreError(
                f"the weight store {self.name!r} was removed while version {version} was written to it: sync again"
            )
        for worker, (path, lock) in enumerate(zip(slot.paths, slot.locks, strict=True)):
            if not is_named(Path(path), lock) or Label.read(path, lock) != Label(slot.fill, worker, slot.sizes[worker]):
                raise StoreError(f"{path} is not the image any more that version {version} was written to: sync again")
            if self._durable:
                os.fsync(lock)
        plan = self._plans.get(fingerprint)
        worker_proofs = None if proofs is None else tuple(proofs)
        self.set_head(Head(version, fingerprint, slot.token, slot.fill, slot.sizes, digest, worker_proofs, plan))
        self.abort(slot)

    def set_head(self, head: Head) -> None:
        self._replace(self._head, head.to_json())

    def abort(self, slot: Slot) -> None:
        """Releases a slot. Its bytes stay, but no reader finds them."""
        while slot.locks:
            release(slot.locks.pop())

    def read(self, worker: int, fill: str | None = None) -> Reading:
        """Opens the live image of `worker`, without a copy. Nobody writes to it until the reading is closed.

        Args:
            worker: rank of the engine worker.
            fill: the fill that has to be live, so that all workers of an engine read the same; `None` for any.

        Raises:
            StoreError: nothing was committed, the engine of the store has no such worker, another fill is live, or the image is
                not the one that the head names.
        """
        deadline, complaint = time.monotonic() + _READ_SECONDS, "was the store removed?"
        while time.monotonic() < deadline:
            head = self.head()
            if head is None:
                raise StoreError(f"nothing was committed to the weight store {self.name!r} in {self.directory}")
            if fill is not None and head.fill != fill:
                raise StoreError(
                    f"the weight store {self.name!r} has moved on to version {head.version}, fill {head.fill}, and fill {fill} "
                    "was asked for: ask for its head again"
                )
            if worker >= len(head.sizes):
                raise StoreError(
                    f"the weight store {self.name!r} is of an engine of {len(head.sizes)} workers, asked for {worker}"
                )
            path = self._paths(head.token, len(head.sizes))[worker]
            try:
                lock = keep(open_file(path))
            except FileNotFoundError:
                continue  # two commits went by since the head was read
            try:
                label, expected = Label.read(path, lock), Label(head.fill, worker, head.sizes[worker])
                if try_lock(lock, shared=True) and self.head() == head:
                    if (label := Label.read(path, lock)) == expected:
                        return Reading(head, path, lock, label)
                    complaint = f"{path} has the label {label}, the head asks for {expected}"
            except BaseException:
                release(lock)
                raise
            release(lock)
        raise StoreError(f"the live slot of the weight store {self.name!r} cannot be opened: {complaint}")

    def close(self) -> None:
        """Stops writing to the store. A named store stays for at least an hour; an unnamed one is removed."""
        if self.temporary and self._writer.was_acquired:
            self._unlink_all()
        self._writer.release()

    def stop_writing(self) -> None:
        """Lets another session write. Everything stays."""
        self._writer.release()

    def part(self, token: str, worker: int, size: int, fill: str) -> StorePart:
        """Opens one worker's image of the slot `token`, which is not live, for the worker to fill.

        Args:
            token: the slot.
            worker: rank of the engine worker.
            size: bytes of the image.
            fill: nonce of the new fill.
        """
        self.hold()
        self._drop_parts_of_others(token, worker)
        path = self._paths(token, worker + 1)[worker]
        lock = _locked_file(path, LABEL_BYTES + size)
        if lock is None:  # it has another size or is still being read: its readers keep it
            path.unlink(missing_ok=True)
            lock = keep(allocate(path, LABEL_BYTES + size))
        label = Label(fill, worker, size)
        label.write(lock)
        return StorePart(self, token, label, path, lock)

    def commit_part(self, head: Head, description: Mapping[str, Any]) -> None:
        """Makes a slot live whose parts all workers of an engine have verified. Each of them calls it, with the same head."""
        self.describe(head.fingerprint, description)
        self.set_head(head.described_by(self._plans[head.fingerprint]))

    def remove(self) -> None:
        """Closes the store and unlinks its files, even if a trainer still writes to it. An open reading stays readable until it
        is closed."""
        self.close()
        self._unlink_all()

    def copy_to(self, other: WeightStore) -> None:
        """Copies the live version into another store (from shared memory to a disk, or back) and commits it there."""
        head = self.head()
        if head is None:
            raise StoreError(f"nothing was committed to the weight store {self.name!r}")
        with ExitStack() as opened:
            readings = [opened.enter_context(self.read(worker, head.fill)) for worker in range(len(head.sizes))]
            slot = other.begin(head.sizes)
            opened.callback(other.abort, slot)
            for reading, arena in zip(readings, slot.open(), strict=True):
                arena.view(0, (arena.nbytes,), torch.uint8).copy_(reading.image)
                reading.require_same()
            other.describe(head.fingerprint, self.description(head.fingerprint))
            other.commit(slot, head.version, head.fingerprint, head.digest, head.proofs)

    def _drop_parts_of_others(self, token: str, worker: int) -> None:
        """Removes this worker's images of earlier trainers (tokens are `<trainer>x<slot>`), except the live one."""
        live = self.head()
        for path in self.directory.glob(f"{self._prefix}*.{worker}.image"):
            other_token = path.name[len(self._prefix) :].split(".")[0]
            if other_token.split("x")[0] != token.split("x")[0] and (live is None or other_token != live.token):
                path.unlink(missing_ok=True)

    def _description(self, fingerprint: str, plan: str) -> Path:
        return self.directory / f"{self._prefix}{fingerprint}.{plan}.plan.json"

    def _paths(self, token: str, workers: int) -> list[Path]:
        return [self.directory / f"{self._prefix}{token}.{worker}.image" for worker in range(workers)]

    def _tokens(self) -> set[str]:
        return {path.name[len(self._prefix) :].split(".")[0] for path in self.directory.glob(f"{self._prefix}*.image")}

    def _locked(self, token: str) -> dict[Path, int] | None:
        """Descriptors of the slot's files, all locked; `None` if another process holds a lock on one of them."""
        locks: dict[Path, int] = {}
        for path in self.directory.glob(f"{self._prefix}{token}.*.image"):
            try:
                lock = locks[path] = keep(open_file(path, os.O_RDWR))
            except FileNotFoundError:
                continue
            if not try_lock(lock):
                for opened in locks.values():
                    release(opened)
                return None
        return locks

    def _new_slot(self, sizes: Sequence[int]) -> Slot:
        token = secrets.token_hex(8)
        self._own_tokens.add(token)
        locks: list[int] = []
        try:
            for path, size in zip(self._paths(token, len(sizes)), sizes, strict=True):
                locks.append(keep(allocate(path, LABEL_BYTES + size)))
        except BaseException:
            self._unlink(token)
            for lock in locks:
                release(lock)
            raise
        return self._filled_anew(token, sizes, locks)

    def _filled_anew(self, token: str, sizes: Sequence[int], locks: list[int]) -> Slot:
        fill = new_fill()
        for worker, (size, lock) in enumerate(zip(sizes, locks, strict=True)):
            Label(fill, worker, size).write(lock)
        return Slot(token, fill, tuple(map(str, self._paths(token, len(sizes)))), tuple(sizes), locks)

    def _unlink(self, token: str) -> None:
        for path in self.directory.glob(f"{self._prefix}{token}.*.image"):
            path.unlink(missing_ok=True)

    def _unlink_all(self) -> None:
        for path in self.directory.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)

    def _replace(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        write_new_file(partial, content)
        if self._durable:
            _sync_to_disk(partial)
        os.replace(partial, path)
        if self._durable:
            _sync_to_disk(self.directory)


def _locked_file(path: Path, size: int) -> int | None:
    """A descriptor of the file, locked; `None` if there is no file of this size, or another process holds its lock."""
    try:
        lock = keep(open_file(path, os.O_RDWR))
    except FileNotFoundError:
        return None
    if try_lock(lock) and os.fstat(lock).st_size == size:
        return lock
    release(lock)
    return None


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
