"""What a run left behind, looked at before anything is cleaned up: processes, shared memory, files."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mbridge_rl.sync.store.weight_store import WeightStore

_SHARED_MEMORY = Path("/dev/shm")
_PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """Inside, a process whose parent dies becomes this one's child, so that `children` sees it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)  # other tests expect `init` to wait for theirs


def children() -> set[int]:
    """This process's, dead ones that nobody has waited for included."""
    return children_of(os.getpid())


def children_of(pid: int) -> set[int]:
    """The process ids of the children of process `pid`."""
    parent = str(pid)
    pids = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rpartition(")")[2].split()[1] == parent:
                pids.add(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return pids


def arenas(pids: Collection[int]) -> list[str]:
    """Shared memory of these processes that belongs to no store."""
    owners = "|".join(map(str, pids))
    return sorted(path.name for path in _SHARED_MEMORY.glob("mbridge_rl-*") if re.match(rf"mbridge_rl-({owners})-", path.name))


def files_of(stores: str) -> list[Path]:
    """All files of the stores whose names begin so."""
    return sorted(_SHARED_MEMORY.glob(f"mbridge_rl-store-{stores}*"))


def remove(stores: str) -> None:
    """As `WeightStore.remove` does, of all stores whose names begin so: each replica's has a number more."""
    for path in files_of(stores):
        path.unlink(missing_ok=True)


def age(paths: Iterable[Path], seconds: float) -> None:
    """Nobody has written to them for so long."""
    for path in paths:
        moment = path.stat().st_mtime - seconds
        os.utime(path, (moment, moment))


def unexpected(store: str, *, partial: bool = False) -> list[str]:
    """Files of a store beyond those that docs/sync.md lets it keep: the head, the live slot and one more, plans and a lock.

    Args:
        partial: a writer was killed, who may just have been writing the head.
    """
    head = WeightStore(store).head()
    prefix, expected = f"mbridge_rl-store-{store}-", re.compile(r"head\.json|users\.lock|[0-9a-f]+\.[0-9a-f]+\.plan\.json")
    names = [path.name.removeprefix(prefix) for path in _SHARED_MEMORY.glob(f"{prefix}*")]
    images: dict[str, list[str]] = {}
    wrong = []
    for name in names:
        if name.endswith(".image"):
            images.setdefault(name.split(".")[0], []).append(name)
        elif not expected.fullmatch(name) and not (partial and name.endswith(".partial")):
            wrong.append(name)
    idle = sorted(set(images) - {head.token if head else ""})
    return sorted(wrong + [name for token in idle[1:] for name in images[token]])
