"""Whoever fails amid a transfer says so: nobody waits for the time-out, which is minutes here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights, served

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.errors import ArenaError, EngineMismatch, EngineUnusable, NonFiniteWeights, SyncError
from mbridge_rl.sync.refit import WeightSync
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet, RingWay
from mbridge_rl.sync.update import Update
from mbridge_rl.sync.watch import _LOOK_SECONDS

WAYS: dict[str, dict[str, Any]] = {"streaming": {"mode": "streaming"}, "staged": {"mode": "staged", "delta": True}}  # by ring
PATIENCE = 200.0


@contextmanager
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < PATIENCE / 3


def sync_of(rank: int, engine: Any, **options: Any) -> WeightSync:
    bridge, model = light_model("qwen3", ParallelLayout(tp=2), rank, random_weights("qwen3", 1))
    return WeightSync(bridge, model, engine, bucket_bytes=1 << 12, timeout=PATIENCE, **options)


def worker_fails(rank: int, way: str) -> None:
    engines = [StandInEngine(), StandInEngine()] if rank == 0 else None
    sync = sync_of(rank, engines, **WAYS[way])
    sync.sync(1)
    taken = Update._taken

    def fails(update: Update, inlet: Any, index: int) -> Any:
        if update._route.rank == 1 and update._wire["replica"] == 1 and index == 4:
            raise EngineMismatch("worker 1 has no place for bucket 4")
        return taken(update, inlet, index)

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(Update, "_taken", fails)
        if way == "staged":
            sync._deltas = None  # everything travels
        with pytest.raises(EngineMismatch, match="worker 1 has no place for bucket 4"):
            sync.sync(2)
    if engines is not None and way == "streaming":
        for engine in engines:
            with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\)"):
                engine.generate()
    with at_once():
        sync.sync(3)
    assert engines is None or [engine.generate() for engine in engines] == [(3, served(random_weights("qwen3", 1)))] * 2
    sync.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_that_fails_amid_a_stream_is_known_at_once(way: str) -> None:
    run_ranks(worker_fails, 2, way)


def rank_fails(rank: int) -> None:
    engine = StandInEngine() if rank == 0 else None
    sync = sync_of(rank, engine, mode="streaming")
    send = RingOutlet.send

    def fails(outlet: RingOutlet, worker: int, index: int, part: Any) -> None:
        if rank == 1 and index == 4:
            raise NonFiniteWeights("rank 1 found NaN")
        send(outlet, worker, index, part)

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(RingOutlet, "send", fails)
        with pytest.raises(NonFiniteWeights, match="rank 1 found NaN"):  # also on rank 0, which waited for room
            sync.sync(1)
    if engine is not None:
        with pytest.raises(EngineUnusable, match=r"rank 1 f(ound NaN|ailed)"):
            engine.generate()
        assert "trainer rank 1 failed" in str(engine.update_status())
    sync.sync(2)
    assert engine is None or engine.generate() == (2, served(random_weights("qwen3", 1)))
    sync.close()


def test_a_trainer_rank_that_fails_amid_a_stream_is_known_at_once() -> None:
    run_ranks(rank_fails, 2)


def rings_are_elsewhere(rank: int) -> None:
    """As in another container, with a /dev/shm of its own."""
    engine = StandInEngine() if rank == 0 else None
    sync = sync_of(rank, engine, mode="streaming")
    opened = RingWay.open

    def open_elsewhere(way: RingWay, version: int, route: Any) -> Any:
        wire, outlet = opened(way, version, route)
        return {**wire, "paths": [f"{path}.elsewhere" for path in wire["paths"]]}, outlet

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(RingWay, "open", open_elsewhere)
        with pytest.raises(ArenaError, match=r"no arena at .*\.elsewhere: .* in another container"):
            sync.sync(1)
    sync.sync(2)
    assert engine is None or engine.generate() == (2, served(random_weights("qwen3", 1)))
    sync.close()


def test_a_worker_that_cannot_open_its_ring_is_known_at_once() -> None:
    run_ranks(rings_are_elsewhere, 2)


def trainer_is_late(rank: int, url: str) -> None:
    """The engine has dropped the update by itself when its trainer comes to ask."""
    engine = StandInEngine() if rank == 0 else None
    sync = sync_of(rank, engine, mode="streaming", transport="files", url=url)
    finish = FilesOutlet.finish

    def fails(update: Update, inlet: Any, index: int) -> Any:
        if update._route.rank == 0:
            raise EngineMismatch("worker 0 has no place for it")
        return taken(update, inlet, index)

    def finish_late(outlet: FilesOutlet) -> None:
        finish(outlet)
        time.sleep(4 * _LOOK_SECONDS)

    taken = Update._taken
    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(FilesOutlet, "finish", finish_late)
        patch.setattr(Update, "_taken", fails)
        with pytest.raises(SyncError, match="worker 0 has no place for it"):
            sync.sync(1)
    sync.close()


def test_what_an_engine_failed_of_is_known_after_it_dropped_the_update(tmp_path: Path) -> None:
    run_ranks(trainer_is_late, 2, str(tmp_path))
