"""Shared memory: bytes arrive, a reader cannot spoil them, and nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mbridge_rl.core.buckets import ALIGNMENT, aligned
from mbridge_rl.core.errors import ArenaError
from mbridge_rl.distributed import arena
from mbridge_rl.distributed.arena import Arena, remove_stale

_READ_AND_SPOIL = """
import sys, torch
from mbridge_rl.distributed.arena import Arena
arena = Arena.attach(sys.argv[1], int(sys.argv[2]))
tensor = arena.view(64, (3, 7), torch.bfloat16)
total = tensor.float().sum().item()
tensor.zero_()
print(total, tensor.float().sum().item())
"""


def test_another_process_reads_the_bytes_and_its_writes_stay_its_own(tmp_path: Path) -> None:
    values = torch.arange(21, dtype=torch.bfloat16).view(3, 7)
    with Arena.create(1003, tmp_path) as arena:
        arena.view(64, (3, 7), torch.bfloat16).copy_(values)
        command = [sys.executable, "-c", _READ_AND_SPOIL, arena.path, str(arena.nbytes)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert result.stdout.split() == ["210.0", "0.0"]
        assert torch.equal(arena.view(64, (3, 7), torch.bfloat16), values)


def test_a_reader_sees_what_is_written_after_it_attached(tmp_path: Path) -> None:
    with Arena.create(4096 * 3 + 5, tmp_path) as writer:
        reader = Arena.attach(writer.path, writer.nbytes)
        for value in (1.5, -2.25):
            writer.view(4096, (1000,), torch.float32).fill_(value)
            assert torch.equal(reader.view(4096, (1000,), torch.float32), torch.full((1000,), value))


def test_views_alias_the_arena_and_may_be_empty_or_scalar(tmp_path: Path) -> None:
    with Arena.create(128, tmp_path) as arena:
        arena.view(0, (), torch.float64).fill_(3.0)
        assert arena.view(0, (1, 1), torch.float64).item() == 3.0
        assert arena.view(128, (0, 5), torch.float32).shape == (0, 5)


@pytest.mark.parametrize(
    ("offset", "shape", "message"),
    [(100, (8,), "outside"), (-4, (1,), "outside"), (2, (1,), "not aligned")],
)
def test_a_view_that_does_not_fit_is_refused(tmp_path: Path, offset: int, shape: tuple[int, ...], message: str) -> None:
    with Arena.create(128, tmp_path) as arena, pytest.raises(ArenaError, match=message):
        arena.view(offset, shape, torch.float32)


def test_close_unlinks_the_writers_file_but_not_the_readers(tmp_path: Path) -> None:
    arena = Arena.create(64, tmp_path)
    reader = Arena.attach(arena.path, 64)
    view = arena.view(0, (16,), torch.float32).fill_(2.0)
    reader.close()
    assert Path(arena.path).exists()
    arena.close()
    arena.close()
    assert not Path(arena.path).exists()
    assert view.sum().item() == 32.0  # what was handed out stays mapped
    with pytest.raises(ArenaError, match="closed"):
        arena.view(0, (1,), torch.float32)


def test_a_dropped_arena_is_unlinked_and_a_forked_copy_leaves_it_alone(tmp_path: Path) -> None:
    arena = Arena.create(64, tmp_path)
    path = Path(arena.path)
    child = os.fork()
    if child == 0:
        arena.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path.exists()
    del arena
    assert not path.exists()


def test_arenas_of_dead_processes_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    pid = int(dead.stdout)
    left_behind = tmp_path / f"mbridge_rl-{pid}-00ff.arena"
    locked = tmp_path / f"mbridge_rl-{pid}-00aa.arena"  # same pid, seen from another container: its owner still holds it
    foreign = tmp_path / "mbridge_rl-notes.arena"
    for path in (left_behind, locked, foreign):
        path.write_bytes(b"x")
    with locked.open("rb+") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        again = tmp_path / f"mbridge_rl-{os.getpid()}-00bb.arena"  # its owner died, and another process has its pid now
        again.write_bytes(b"x")
        assert set(remove_stale(tmp_path)) == {left_behind, again}
        assert locked.exists()
        assert foreign.exists()


def test_creating_an_arena_removes_stale_ones(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    left_behind = tmp_path / f"mbridge_rl-{int(dead.stdout)}-0.arena"
    left_behind.write_bytes(b"x")
    with Arena.create(64, tmp_path):
        assert not left_behind.exists()


def test_too_much_or_nothing_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="positive"):
        Arena.create(0, tmp_path)
    shm = Path("/dev/shm")
    before = set(shm.iterdir())
    free = os.statvfs(shm)
    with pytest.raises(ArenaError, match="no room"):
        Arena.create(free.f_bavail * free.f_frsize + (1 << 40), shm)
    assert {path for path in set(shm.iterdir()) - before if path.name.startswith(f"mbridge_rl-{os.getpid()}-")} == set()


def test_attaching_to_nothing_or_to_too_little_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="no arena at"):
        Arena.attach(tmp_path / "gone", 64)
    with Arena.create(64, tmp_path) as arena, pytest.raises(ArenaError, match="holds 64 bytes, expected 65"):
        Arena.attach(arena.path, 65)


def test_aligned() -> None:
    assert [aligned(nbytes) for nbytes in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]


def test_attaching_writes_nothing_that_a_fellow_writer_could_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Arena.create(4096 * 3, tmp_path) as first:

        def changes() -> int:
            """In place, as torch counts them."""
            return Arena.attach(first.path, first.nbytes, writable=True).view(0, (1,), torch.uint8)._version

        touched = changes()
        monkeypatch.setattr(arena, "_touch", lambda data: None)
        assert touched == changes()
