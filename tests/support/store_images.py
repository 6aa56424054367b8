"""Small weight stores for tests: fills, commits, what a reader holds, and writers in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from mbridge_rl.distributed.arena import Arena
from mbridge_rl.sync.store.weight_store import Slot, WeightStore

SIZES = (4096, 1000)
PLAN = {"plan": "of a test"}


def fill(slot: Slot, value: int) -> list[Arena]:
    arenas = slot.open()
    for arena in arenas:
        arena.view(0, (arena.nbytes,), torch.uint8).fill_(value)
    return arenas


def commit(store: WeightStore, version: int) -> str:
    """A version whose bytes all are its number; returns the slot's token."""
    slot = store.begin(SIZES)
    fill(slot, version)
    store.describe("feed", PLAN)
    store.commit(slot, version, "feed", None)
    return slot.token


def live_fill(store: WeightStore) -> str:
    head = store.head()
    assert head is not None
    return head.fill


def held(store: WeightStore) -> int:
    """The live version, which every byte of every image has to be."""
    versions = set()
    for worker, size in enumerate(SIZES):
        with store.read(worker) as reading:
            assert reading.image.numel() == size
            versions |= {reading.head.version, *reading.image.unique().tolist()}
    (version,) = versions
    return version


def images(folder: Path, store: WeightStore) -> set[str]:
    """Tokens of the slots that have files."""
    return {path.name.split("-")[-1].split(".")[0] for path in folder.glob(f"mbridge_rl-store-{store.name}-*.image")}


def forked(function: Callable[[], object]) -> int:
    """How a child that runs it ended: 0, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
