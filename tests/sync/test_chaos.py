"""A sample of the runs of `chaos.py` (`python tests/support/chaos.py 200` runs more), and what is left where processes are
killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import leftovers
import pytest
import torch
from chaos import run
from chaos_trainer import FAULTS, WAYS, Case
from children import fork

from mbridge_rl.distributed.arena import Arena, remove_stale
from mbridge_rl.sync.store.weight_store import WeightStore, remove_stale_stores

OWNERS = 12
TWO_HOURS = 7200.0  # after one, a named store without a writer goes


@pytest.mark.slow
@pytest.mark.parametrize("index", range(10))
def test_whatever_is_hit_no_mixture_is_served(index: int) -> None:
    way, fault = WAYS[index % len(WAYS)], FAULTS[index % len(FAULTS)]
    run(Case(*way, fault, 0.07 + index * 0.09, delta=index % 3 > 0, seed=index, engines=1 + index % 2, copied=index > 5))


def test_a_killed_driver_leaves_no_process_and_what_it_leaves_in_memory_is_swept(tmp_path: Path) -> None:
    """A run whose driver is killed amid the second sync: ranks and engines end with it, and nobody is there to clean up."""

    def drive() -> None:
        tempfile.tempdir = str(tmp_path)
        run(Case("staged", "shared_memory", "stall", 0.5, delta=False, seed=0, engines=2))

    pids: list[int] = []
    driver = fork(drive, pids.append)
    wait_for(lambda: list(tmp_path.glob("*/at-2-0")), "the second sync")
    scene = leftovers.children_of(driver)
    assert len(scene) == 4
    os.kill(driver, signal.SIGKILL)
    os.waitpid(driver, 0)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in scene), "the end of the ranks and engines")

    stores = {path.name.removeprefix("mbridge_rl-store-").rpartition("-")[0] for path in leftovers.files_of(f"chaos.{driver}.")}
    assert stores
    assert not [left for store in stores for left in leftovers.unexpected(store, partial=True)]
    leftovers.age(leftovers.files_of(f"chaos.{driver}."), TWO_HOURS)
    remove_stale()
    remove_stale_stores()
    assert not leftovers.files_of(f"chaos.{driver}.")
    assert not leftovers.arenas(scene)


def test_many_killed_owners_leave_what_docs_say_and_the_next_one_sweeps_it() -> None:
    """One arena, since each owner sweeps those before it; and of each store its head, its plans, a lock and two slots, for an
    hour."""
    name = f"chaos.{os.getpid()}.owner"

    def own(number: int) -> None:
        arena = Arena.create(1 << 12)
        store = WeightStore(f"{name}{number}")
        for version in range(3):
            slot = store.begin([1 << 12, 1 << 12])
            for image in slot.open():
                image.view(0, (1 << 12,), torch.uint8).fill_(version)
            store.describe("f", {"of": "a test"})
            store.commit(slot, version, "f", None)
        store.begin([1 << 12, 1 << 12])
        assert arena.path
        os.kill(os.getpid(), signal.SIGKILL)

    pids: list[int] = []
    for number in range(OWNERS):
        pid = fork(lambda number=number: own(number), pids.append)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(leftovers.arenas(pids)) <= 1
    files = leftovers.files_of(name)
    assert len([path for path in files if path.name.endswith(".image")]) == OWNERS * 2 * 2
    assert len(files) == OWNERS * (2 * 2 + 3)
    leftovers.age(files, TWO_HOURS)

    with Arena.create(1 << 12):
        assert not leftovers.arenas(pids)
    other = WeightStore(f"chaos.{os.getpid()}.next")
    other.abort(other.begin([1 << 12]))
    other.remove()
    assert not leftovers.files_of(name)


def wait_for(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300.0
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)
