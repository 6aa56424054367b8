"""What writers leave in a weight store when they die, and who removes it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_images import PLAN, SIZES, commit, die, fill, forked, held, images

from mbridge_rl.distributed.arena import Arena
from mbridge_rl.sync.store.weight_store import WeightStore, remove_stale_stores


def test_what_dead_processes_left_goes_when_somebody_writes(tmp_path: Path) -> None:
    def leave() -> None:
        arena = Arena.create(4096, tmp_path)
        assert Path(arena.path).exists()
        die()

    assert forked(leave) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.arena"))) == 1
    commit(WeightStore("policy", tmp_path), 1)
    assert not list(tmp_path.glob("*.arena"))


def test_unnamed_stores_go_as_soon_as_their_writer_has(tmp_path: Path) -> None:
    ready, go_on = os.pipe(), os.pipe()

    def write() -> None:
        store = WeightStore.unnamed(tmp_path)
        commit(store, 1)
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        die()

    ended: list[int] = []
    writer = threading.Thread(target=lambda: ended.append(forked(write)))
    writer.start()
    os.read(ready[0], 1)
    assert remove_stale_stores(tmp_path) == []
    there = set(tmp_path.iterdir())
    assert len(there) == len(SIZES) + 3  # the head, the plan, the lock
    os.write(go_on[1], b"x")
    writer.join()
    assert ended == [-signal.SIGKILL]
    assert set(remove_stale_stores(tmp_path)) == there
    assert not list(tmp_path.iterdir())


def test_an_unnamed_store_ends_with_its_writers_close(tmp_path: Path) -> None:
    store = WeightStore.unnamed(tmp_path)
    commit(store, 1)
    WeightStore(store.name, tmp_path).close()  # a reader's
    assert held(store) == 1
    store.close()
    assert not list(tmp_path.iterdir())


def age(folder: Path, seconds: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_named_stores_go_an_hour_after_their_last_writer(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    commit(store, 1)
    age(tmp_path, 4000)
    assert remove_stale_stores(tmp_path) == []  # its writer lives
    store.close()
    age(tmp_path, 3500)
    assert remove_stale_stores(tmp_path) == []
    assert held(store) == 1
    age(tmp_path, 3700)
    other = WeightStore("other", tmp_path)
    commit(other, 2)  # whoever writes clears up
    assert store.head() is None
    assert not list(tmp_path.glob("*policy*"))
    assert held(other) == 2


def test_durable_stores_stay(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path, durable=True)
    commit(store, 1)
    store.close()
    age(tmp_path, 1e6)
    commit(WeightStore("other", tmp_path), 2)
    assert held(WeightStore("policy", tmp_path)) == 1
    store.remove()
    assert not list(tmp_path.glob("*policy*"))


def test_a_writer_that_comes_amid_the_clean_up_is_known_to_the_next(tmp_path: Path) -> None:
    """It waits for a lock on a file that has no name any more when it gets it."""
    before = WeightStore("policy", tmp_path)
    commit(before, 1)
    before.close()
    (users,) = tmp_path.glob("*users.lock")
    cleaner = os.open(users, os.O_RDWR)
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    late = WeightStore("policy", tmp_path)
    coming = threading.Thread(target=late.describe, args=("feed", PLAN))
    coming.start()
    time.sleep(0.1)
    for path in tmp_path.iterdir():
        path.unlink()
    os.close(cleaner)
    coming.join(10)
    age(tmp_path, 4000)
    assert remove_stale_stores(tmp_path) == []
    late.close()
    age(tmp_path, 4000)
    assert len(remove_stale_stores(tmp_path)) == 2


def dying_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Of all that a commit to a disk does, this process does not live to see number `call`."""
    seen = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                die()
            return function(*args, **kwargs)

        return run

    def torn(descriptor: int, content: memoryview) -> int:
        nonlocal seen
        seen += 1
        if seen == call:
            write(descriptor, content[: len(content) // 2])
            die()
        return write(descriptor, content)

    write = os.write
    patch.setattr(os, "write", torn)
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(os, "posix_fallocate", counted(os.posix_fallocate))
    patch.setattr(torch.Tensor, "copy_", counted(torch.Tensor.copy_))


def test_a_writer_killed_amid_a_copy_to_disk_leaves_the_old_version(tmp_path: Path) -> None:
    """The writer is killed at each of its steps in turn, and never leaves a torn head."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    store, disk = WeightStore("policy", tmp_path / "memory"), WeightStore("policy", tmp_path / "disk", durable=True)
    commit(store, 1)
    store.copy_to(disk)
    disk.close()
    commit(store, 2)

    def copy(call: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            dying_at(call, patch)
            store.copy_to(WeightStore("policy", tmp_path / "disk", durable=True))

    versions = []
    for call in range(1, 100):
        ended = forked(lambda call=call: copy(call))
        assert ended in (0, -signal.SIGKILL)
        (head,) = (tmp_path / "disk").glob("*head.json")
        json.loads(head.read_text())
        versions.append(held(disk))
        if ended == 0:
            break
        if versions[-1] == 2:  # the next one starts from the old version again
            disk = WeightStore("policy", tmp_path / "disk", durable=True)
            commit(disk, 1)
            disk.close()
    assert versions[-1] == 2
    assert versions.count(1) >= 2 * len(SIZES) + 2  # allocated, copied and synced each image, and wrote the head
    assert versions[: versions.count(1)] == [1] * versions.count(1)  # at one step it becomes the new version
    assert len(images(tmp_path / "disk", disk)) <= 2  # what the killed writers began was removed


def test_on_a_disk_bytes_come_before_the_head_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = WeightStore("policy", tmp_path, durable=True)
    disk.describe("feed", PLAN)
    slot = disk.begin(SIZES)
    fill(slot, 1)
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removeprefix("mbridge_rl-store-policy-"))
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    disk.commit(slot, 1, "feed", None)
    partial = order[len(SIZES)]
    assert partial.startswith("head.json")
    assert order == [f"{slot.token}.{worker}.image" for worker in range(2)] + [partial, "replace", tmp_path.name]


def test_readers_of_a_busy_store_see_whole_versions(tmp_path: Path) -> None:
    """A reader beside a writer in another process that commits as fast as it can, and is killed amid it."""
    before = WeightStore("policy", tmp_path)
    commit(before, 1)
    before.close()

    def write() -> None:
        store = WeightStore("policy", tmp_path)
        for version in range(2, 80):
            commit(store, version)
        die()

    writer = threading.Thread(target=forked, args=(write,))
    writer.start()
    store, seen = WeightStore("policy", tmp_path), []
    while writer.is_alive():
        with store.read(0) as reading:
            assert reading.image.unique().tolist() == [reading.head.version]
            seen.append(reading.head.version)
    assert seen == sorted(seen)
    assert held(store) == 79
