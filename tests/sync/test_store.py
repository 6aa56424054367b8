"""The weight store by itself: slots, readers, writers that die at any instant, and what is left of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from store_images import SIZES, commit, fill, held, images, live_fill

from mbridge_rl.core.errors import StoreError
from mbridge_rl.sync.store.image import LABEL_BYTES, new_fill
from mbridge_rl.sync.store.weight_store import WeightStore


def test_two_slots_take_turns(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    first, second = commit(store, 1), commit(store, 2)
    assert first != second
    assert [commit(store, version) for version in (3, 4, 5)] == [first, second, first]
    assert held(store) == 5
    assert images(tmp_path, store) == {first, second}


def test_the_live_slot_is_never_written(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    commit(store, 1)
    for value in (7, 8):  # also when an update was given up
        slot = store.begin(SIZES)
        fill(slot, value)
        assert held(store) == 1
        store.abort(slot)
    assert held(store) == 1


def test_a_slot_that_is_read_is_left_alone_and_another_one_made(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    first = commit(store, 1)
    reading = WeightStore("policy", tmp_path).read(0)
    later = [commit(store, version) for version in (2, 3, 4)]
    assert first not in later
    assert later[0] != later[1]
    assert reading.head.version == 1
    assert reading.image.unique().tolist() == [1]
    assert held(store) == 4
    reading.close()
    assert commit(store, 5) in (first, later[1])  # now it is idle
    assert len(images(tmp_path, store)) <= 3


def test_a_reader_is_told_when_the_store_has_moved_on(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    with pytest.raises(StoreError, match="nothing was committed"):
        store.read(0)
    commit(store, 1)
    first = live_fill(store)
    commit(store, 2)
    with pytest.raises(StoreError, match="has moved on to version 2"):
        store.read(0, first)
    with pytest.raises(StoreError, match="an engine of 2 workers, asked for 2"):
        store.read(2)


def test_a_slot_of_another_size_is_not_reused(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    first = commit(store, 1)
    commit(store, 2)
    slot = store.begin((SIZES[0], SIZES[1] + 1))
    assert slot.token != first
    assert [Path(path).stat().st_size for path in slot.paths] == [LABEL_BYTES + SIZES[0], LABEL_BYTES + SIZES[1] + 1]
    assert first not in images(tmp_path, store)
    assert held(store) == 2


def test_a_dead_trainers_slot_is_not_reused(tmp_path: Path) -> None:
    """One of its ranks may live on for a while, and write."""
    dead = WeightStore("policy", tmp_path)
    commit(dead, 1)
    slot = dead.begin(SIZES)
    straggler = slot.open()
    dead.abort(slot)  # its locks end with the process
    dead.close()
    store = WeightStore("policy", tmp_path)
    mine = store.begin(SIZES)
    assert mine.token != slot.token
    assert slot.token not in images(tmp_path, store)
    fill(mine, 2)
    for arena in straggler:
        arena.view(0, (arena.nbytes,), torch.uint8).fill_(9)
    store.commit(mine, 2, "feed", None)
    assert held(store) == 2


def test_a_part_that_is_read_stays_with_its_readers(tmp_path: Path) -> None:
    """Where workers fill their own images, two tokens take turns."""
    store = WeightStore("policy", tmp_path)

    def brought(version: int, token: str) -> None:
        fill_name = new_fill()
        for worker, size in enumerate(SIZES):
            part = store.part(token, worker, size, fill_name)
            part.image.fill_(version)
            part.commit(version, {"fingerprint": "feed"}, SIZES)

    brought(1, "a")
    reading = store.read(0)
    brought(2, "b")
    brought(3, "a")
    assert reading.image.unique().tolist() == [1]
    assert held(store) == 3
    reading.close()


def test_parts_of_earlier_trainers_go_when_the_next_one_brings_its_own(tmp_path: Path) -> None:
    """The live version stays until another one is committed."""
    store = WeightStore("policy", tmp_path)

    def brought(version: int, token: str, *, commits: bool = True) -> None:
        fill_name = new_fill()
        parts = [store.part(token, worker, size, fill_name) for worker, size in enumerate(SIZES)]
        for part in parts:
            part.image.fill_(version)
        for part in parts:
            part.commit(version, {"fingerprint": "feed"}, SIZES) if commits else part.close()

    for version in (1, 2, 3):
        brought(version, f"100x{version % 2}")
    brought(9, "200x0", commits=False)
    assert images(tmp_path, store) == {"100x1", "200x0"}
    assert held(store) == 3
    brought(4, "200x0")
    brought(5, "200x1")
    assert images(tmp_path, store) == {"200x0", "200x1"}
    assert held(store) == 5
