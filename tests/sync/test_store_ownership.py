"""Whose a store is: one writer at a time, files of one user, and what is left of the dead."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mbridge_rl.core.errors import ArenaError, StoreError
from mbridge_rl.distributed.arena import Arena, allocate, remove_stale
from mbridge_rl.distributed.private_files import open_file
from mbridge_rl.sync.payload.route import Part
from mbridge_rl.sync.payload.wires import FilesWire
from mbridge_rl.sync.store.image import new_fill
from mbridge_rl.sync.store.weight_store import WeightStore, remove_stale_stores
from mbridge_rl.sync.store.writer_lock import Holder
from mbridge_rl.sync.transports.files import FilesOutlet, _make_folder
from mbridge_rl.sync.transports.waiting import Timeout

SIZES = (4096, 1000)
NOBODY = 65534


def commit(store: WeightStore, version: int) -> None:
    slot = store.begin(SIZES)
    store.describe("feed", {})
    store.commit(slot, version, "feed", None)


_children: set[int] = set()


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    """Also where a test fails: children wait to be told to go on."""
    yield
    for pid in list(_children):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _children.clear()


class Child:
    """A forked process that acts, reports that it has done so, and then waits until it may go on."""

    def __init__(self, act: Callable[[], object], then: Callable[[], object] = lambda: None) -> None:
        ready, self._go_on = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                result = act()
                os.write(ready[1], b"x")
                os.read(self._go_on[0], 1)
                then()
                del result
            finally:
                os._exit(0)
        _children.add(self.pid)
        os.read(ready[0], 1)

    def go_on(self) -> None:
        os.write(self._go_on[1], b"x")

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        os.waitpid(self.pid, 0)
        _children.discard(self.pid)


def writing(folder: Path) -> WeightStore:
    store = WeightStore("policy", folder)
    commit(store, 1)
    return store


def test_a_second_trainer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    first = Child(lambda: writing(tmp_path))
    second = WeightStore("policy", tmp_path)
    with pytest.raises(StoreError, match=f"'policy' in {tmp_path} is being written by process {first.pid} on host") as refused:
        second.hold(0.1)
    for detail in (os.uname().nodename, "which was started at 20", "give this one another store name"):
        assert detail in str(refused.value)
    head = second.head()
    assert head is not None
    assert head.version == 1  # reading is allowed
    first.end()
    commit(second, 2)  # the lock ended with its process


def test_a_successor_waits_for_one_who_is_about_to_end(tmp_path: Path) -> None:
    first = Child(lambda: writing(tmp_path), then=lambda: time.sleep(0.5))
    first.go_on()
    commit(WeightStore("policy", tmp_path), 2)
    first.wait()


def test_a_child_of_a_killed_trainer_does_not_keep_its_store(tmp_path: Path) -> None:
    """A data loader's worker, forked while the trainer held its locks."""
    reader, writer = os.pipe()

    def leave_a_child() -> object:
        store, arena = writing(tmp_path), Arena.create(4096, tmp_path)
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, str(pid).encode())
        return store, arena

    trainer = Child(leave_a_child)
    orphan = int(os.read(reader, 32))
    trainer.end()
    try:
        os.kill(orphan, 0)
        assert len(remove_stale(tmp_path)) == 1
        store = WeightStore("policy", tmp_path)
        store.hold(0.2)
        store.close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_one_process_has_one_writer_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbridge_rl.sync.store.writer_lock._IN_ONE_PROCESS_SECONDS", 0.1)
    first, second = WeightStore("policy", tmp_path), WeightStore("policy", tmp_path)
    commit(first, 1)
    with pytest.raises(StoreError, match=rf"written by process {os.getpid()} \(this one\)"):
        commit(second, 2)
    first.close()
    commit(second, 2)
    del second  # whoever drops it without closing it does not lock himself out
    commit(first, 3)


def test_workers_of_one_engine_write_together_and_those_of_another_trainer_do_not(tmp_path: Path) -> None:
    def part(session: str, worker: int) -> WeightStore:
        store = WeightStore("policy.0", tmp_path, session=session)
        store.part("ax0", worker, SIZES[worker], fill).close()
        return store

    fill = new_fill()
    ours = [part("one trainer", worker) for worker in range(2)]
    other = WeightStore("policy.0", tmp_path, session="another trainer")
    with pytest.raises(StoreError, match="two trainers cannot share one store"):
        other.hold(0)
    ours[0].stop_writing()  # as when another trainer introduces itself: to one worker after the other
    with pytest.raises(StoreError, match="two trainers cannot share one store"):
        other.hold(0)
    ours[1].stop_writing()
    other.hold(0)
    with pytest.raises(StoreError, match="two trainers cannot share one store"):
        ours[0].hold(0)


def test_a_part_that_was_filled_or_removed_meanwhile_does_not_become_live(tmp_path: Path) -> None:
    store = WeightStore("policy.0", tmp_path)
    part = store.part("ax0", 0, SIZES[0], new_fill())
    (path,) = tmp_path.glob("*.image")
    path.unlink()
    with pytest.raises(StoreError, match="does not hold version 1 any more"):
        part.commit(1, {"fingerprint": "feed"}, SIZES)
    assert store.head() is None


def test_an_arena_lives_by_its_lock_and_not_by_its_pid(tmp_path: Path) -> None:
    dead = tmp_path / f"mbridge_rl-{os.getpid()}-{new_fill()}.arena"  # a trainer in a container is pid 1 at every start
    os.close(allocate(dead, 4096))
    alive = Arena.create(4096, tmp_path)
    assert not dead.exists()
    assert Path(alive.path).exists()
    assert remove_stale(tmp_path) == []
    alive.close()


def test_an_arena_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbridge_rl.distributed import arena

    swept: list[Path] = []
    try_lock = arena.try_lock

    def late(descriptor: int) -> bool:
        if not swept:
            swept.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            swept[0].unlink()
        return try_lock(descriptor)

    monkeypatch.setattr(arena, "try_lock", late)
    path = tmp_path / "mbridge_rl-1-00ff.arena"
    lock = allocate(path, 4096)
    assert swept
    assert (os.fstat(lock).st_ino, os.fstat(lock).st_size) == (path.stat().st_ino, 4096)
    assert list(tmp_path.iterdir()) == [path]
    os.close(lock)


def test_what_a_store_is_does_not_hang_on_its_name(tmp_path: Path) -> None:
    named = WeightStore("sync.policy", tmp_path)
    commit(named, 1)
    named.close()
    assert remove_stale_stores(tmp_path) == []
    assert WeightStore("sync.policy", tmp_path).head() is not None
    unnamed = WeightStore("policy", tmp_path, temporary=True)
    commit(unnamed, 1)
    unnamed.close()
    assert WeightStore("policy", tmp_path).head() is None
    durable = WeightStore("kept", tmp_path, durable=True)
    commit(durable, 1)
    durable.close()
    again = WeightStore("kept", tmp_path)  # by a process that does not know that it is durable
    commit(again, 2)
    again.close()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    remove_stale_stores(tmp_path)
    assert WeightStore("kept", tmp_path).head() is not None


def test_everything_is_made_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = WeightStore("policy", tmp_path)
        commit(store, 1)
        store.part("ax0", 0, SIZES[0], new_fill()).close()
        arena = Arena.create(4096, tmp_path)
        folder = tmp_path / "files" / "1-00ff"
        from fsspec.implementations.local import LocalFileSystem

        _make_folder(LocalFileSystem(), str(folder))
        outlet = FilesOutlet(FilesWire(url=str(folder)), 64, Timeout(10.0))
        part = Part(0, 0, 64, ())
        outlet.place(0, 0, part).fill_(1)
        outlet.send(0, 0, part)
        outlet.finish()
        outlet.close()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(SIZES) + 1 + 3 + 1 + 1
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {path.name: "0o600" for path in files}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    arena.close()


def give_to_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> int:
    """Makes the files that match those of another user; returns the id of the user that this process seems to be."""
    if os.geteuid() == 0:
        for path in folder.glob(pattern):
            os.chown(path, NOBODY, NOBODY)
        return 0
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    return 4711


@pytest.mark.parametrize("part", ["head.json", "1.image", "users.lock", "plan.json"])
def test_what_another_user_wrote_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    before = WeightStore("policy", tmp_path)
    commit(before, 1)
    before.close()
    mine = give_to_another_user(tmp_path, monkeypatch, f"*{part}")
    (path,) = tmp_path.glob(f"*{part}")
    owner = path.stat().st_uid
    store = WeightStore("policy", tmp_path)
    uses = {
        "head.json": store.head,
        "1.image": lambda: store.read(1),
        "users.lock": lambda: store.begin(SIZES),
        "plan.json": lambda: store.description("feed"),
    }
    with pytest.raises(
        StoreError, match=rf"{path} belongs to user {owner}, this process is user {mine}: what another user wrote"
    ):
        uses[part]()


def test_an_arena_of_another_user_is_refused_and_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mbridge_rl-1-00ff.arena"
    os.close(allocate(path, 4096))
    give_to_another_user(tmp_path, monkeypatch, "*.arena")
    with pytest.raises(ArenaError, match="belongs to user"):
        Arena.attach(path, 4096)
    assert remove_stale(tmp_path) == []


def test_files_that_others_may_write_links_and_pipes_are_refused(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    commit(store, 1)
    head = tmp_path / "mbridge_rl-store-policy-head.json"
    head.chmod(0o620)
    with pytest.raises(StoreError, match=r"head\.json has mode 0620, so that other users may write to it, expected 0600"):
        store.head()
    head.chmod(0o600)
    head.rename(tmp_path / "elsewhere")
    head.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"head\.json cannot be opened"):
        store.head()
    head.unlink()
    os.mkfifo(head)
    with pytest.raises(StoreError, match=r"head\.json is no plain file"):
        store.head()  # and does not wait for anybody to write


def test_a_file_of_a_known_name_is_not_taken_over_by_a_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"x" * 5000)
    (tmp_path / "mbridge_rl-store-policy-users.lock").symlink_to(target)
    with pytest.raises(StoreError, match=r"users\.lock cannot be opened"):
        WeightStore("policy", tmp_path).hold(0)
    remove_stale_stores(tmp_path)
    assert target.read_bytes() == b"x" * 5000
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "gone")


def test_a_lock_file_says_who_holds_it(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path, durable=True)
    store.hold()
    descriptor = open_file(tmp_path / "mbridge_rl-store-policy-users.lock")
    holder = Holder.read(descriptor)
    os.close(descriptor)
    assert holder is not None
    assert (holder.kind, holder.session, holder.pid) == ("durable", store.session, os.getpid())
    assert holder.is_this_process
