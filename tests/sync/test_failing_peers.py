"""Whoever fails or is killed amid a transfer is known to: nobody waits for the time-out, which is minutes here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chaos
import chaos_trainer
import pytest
import torch
from children import fork
from fused_engine import EngineLayout
from ranks import run_ranks
from standin import RemoteEngine, StandInEngine, light_model, random_weights, serve, served

from mbridge_rl.core.errors import ArenaError, EngineMismatch, EngineUnusable, NonFiniteWeights, PeerFailed, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.distributed.arena import Arena, remove_stale
from mbridge_rl.sync.store.stale_stores import remove_stale_stores
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.shared_memory import Ring, RingInlet, RingOutlet, RingTransport
from mbridge_rl.sync.weight_sync import WeightSync
from mbridge_rl.sync.worker.update import Update
from mbridge_rl.sync.worker.update_watch import _LOOK_SECONDS

WAYS: dict[str, dict[str, Any]] = {"streaming": {"mode": "streaming"}, "staged": {"mode": "staged", "delta": True}}  # by ring
TIMEOUT = 200.0  # seconds, of every wait in a sync


@contextmanager
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < TIMEOUT / 3


def sync_of(rank: int, engine: Any, **options: Any) -> WeightSync:
    bridge, model = light_model("qwen3", ParallelLayout(tp=2), rank, random_weights("qwen3", 1))
    return WeightSync(bridge, model, engine, bucket_bytes=1 << 12, timeout=TIMEOUT, **options)


def worker_fails(rank: int, way: str) -> None:
    engines = [StandInEngine(), StandInEngine()] if rank == 0 else None
    sync = sync_of(rank, engines, **WAYS[way])
    sync.sync(1)
    taken = Update._take

    def fails(update: Update, inlet: Any, index: int) -> Any:
        if update._route.rank == 1 and update._wire.replica == 1 and index == 4:
            raise EngineMismatch("worker 1 has no place for bucket 4")
        return taken(update, inlet, index)

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(Update, "_take", fails)
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
        assert "trainer rank 1 failed" in str(engine.status())
    sync.sync(2)
    assert engine is None or engine.generate() == (2, served(random_weights("qwen3", 1)))
    sync.close()


def test_a_trainer_rank_that_fails_amid_a_stream_is_known_at_once() -> None:
    run_ranks(rank_fails, 2)


class Stubborn(StandInEngine):
    """Its trouble on the way back is not the trainer's."""

    def abort(self, reason: str) -> None:
        super().abort(reason)
        if reason.startswith("version 1 was given up"):
            raise RuntimeError("there is no way back")


def rank_fails_of_nothing_of_ours(rank: int) -> None:
    """All ranks ask together whether it was a lost engine, or none does."""
    sync = sync_of(rank, Stubborn() if rank == 0 else None, mode="streaming", lost_engines="drop")
    send = RingOutlet.send

    def fails(outlet: RingOutlet, worker: int, index: int, part: Any) -> None:
        if rank == 1 and index == 4:
            raise MemoryError("nothing is free")
        send(outlet, worker, index, part)

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(RingOutlet, "send", fails)
        with pytest.raises(SyncError, match="rank 1 failed: MemoryError: nothing is free"):
            sync.sync(1)
    with at_once():
        sync.sync(2)
    sync.close()


def test_ranks_decide_alike_of_what_one_of_them_raised() -> None:
    run_ranks(rank_fails_of_nothing_of_ours, 2)


def rings_are_elsewhere(rank: int) -> None:
    """As in another container, with a /dev/shm of its own."""
    engine = StandInEngine() if rank == 0 else None
    sync = sync_of(rank, engine, mode="streaming")
    opened = RingTransport.open

    def open_elsewhere(way: RingTransport, version: int, route: Any) -> Any:
        wire, outlet = opened(way, version, route)
        return replace(wire, paths=tuple(f"{path}.elsewhere" for path in wire.paths)), outlet

    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(RingTransport, "open", open_elsewhere)
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

    taken = Update._take
    with pytest.MonkeyPatch.context() as patch, at_once():
        patch.setattr(FilesOutlet, "finish", finish_late)
        patch.setattr(Update, "_take", fails)
        with pytest.raises(SyncError, match="worker 0 has no place for it"):
            sync.sync(1)
    sync.close()


def test_what_an_engine_failed_of_is_known_after_it_dropped_the_update(tmp_path: Path) -> None:
    run_ranks(trainer_is_late, 2, str(tmp_path))


class Amid:
    """Runs two trainer ranks and two engines, each a process of its own, and stops one of them amid a transfer by rings."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder, self.way = folder, way
        self.addresses = [folder / f"engine{number}" for number in range(2)]
        self.pids: dict[str, int] = {}
        for number in range(2):
            self._fork(f"engine {number}", lambda number=number: self._engine(number))
        chaos._wait_for(lambda: all(map(Path.exists, self.addresses)), "the engines' sockets")
        for rank in range(2):
            self._fork(f"rank {rank}", lambda rank=rank: self._rank(rank))

    def kill(self, victim: str) -> None:
        chaos._wait_for((self.folder / f"amid {victim}").exists, f"{victim} amid the transfer", 60.0)
        os.kill(self.pids[victim], signal.SIGKILL)

    def outcome(self, rank: int) -> str:
        chaos._wait_for(lambda: chaos._has_ended(self.pids[f"rank {rank}"]), f"the verdict of rank {rank}", TIMEOUT / 3)
        return chaos._outcome(self.folder, rank)

    def engine(self, number: int) -> RemoteEngine:
        return RemoteEngine(self.addresses[number])

    def end(self) -> None:
        for pid in self.pids.values():
            chaos._end(pid)
        remove_stale()  # as the next writer would
        remove_stale_stores()

    def _fork(self, who: str, life: Callable[[], None]) -> None:
        fork(life, lambda pid: self.pids.update({who: pid}))

    def _engine(self, number: int) -> None:
        give_back = RingInlet.give_back

        def halts(inlet: RingInlet, index: int) -> None:
            if index >= 4 and number == 1:
                self._halt("engine 1")
            give_back(inlet, index)

        RingInlet.give_back = halts
        serve(self.addresses[number], "qwen3", EngineLayout(tp=2))

    def _rank(self, rank: int) -> None:
        torch.set_num_threads(1)
        send = RingOutlet.send

        def halts(outlet: RingOutlet, worker: int, index: int, part: Any) -> None:
            if index >= 4:
                self._halt(f"rank {rank}")
            send(outlet, worker, index, part)

        RingOutlet.send = halts
        try:
            chaos_trainer.meet(self.folder, rank)
            engines = [self.engine(number) for number in range(2)] if rank == 0 else None
            sync_of(rank, engines, **WAYS[self.way]).sync(1)
            outcome = "done"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        (self.folder / f"outcome-{rank}").write_text(outcome)

    def _halt(self, who: str) -> None:
        """Stops the process that is to be killed here; the others go on."""
        if (self.folder / f"victim {who}").exists():
            (self.folder / f"amid {who}").touch()
            time.sleep(TIMEOUT)


@contextmanager
def amid(folder: Path, way: str, victim: str) -> Iterator[Amid]:
    (folder / f"victim {victim}").touch()
    scene = Amid(folder, way)
    try:
        scene.kill(victim)
        yield scene
    finally:
        scene.end()


@pytest.mark.parametrize(("victim", "way"), [(0, "staged"), (1, "streaming")])
def test_a_trainer_rank_that_is_killed_amid_a_stream_is_known_at_once(tmp_path: Path, victim: int, way: str) -> None:
    with amid(tmp_path, way, f"rank {victim}") as scene:
        assert scene.outcome(1 - victim).startswith("RanksUnreachable")
        for number in range(2):
            chaos._wait_for(lambda number=number: gave_up(scene.engine(number)), "an engine's verdict", TIMEOUT / 3)
            assert f"trainer rank {victim} failed or died" in str(scene.engine(number).status())
            if way == "staged":
                assert scene.engine(number).generate() == (0, served(random_weights("qwen3", 0)))


def gave_up(engine: RemoteEngine) -> bool:
    """Without a word from any trainer: who waits for weights refuses, and does not wait any longer."""
    return any(worker.failure for worker in engine.status())


def test_an_engine_that_is_killed_amid_a_stream_is_known_at_once(tmp_path: Path) -> None:
    with amid(tmp_path, "streaming", "engine 1") as scene:
        assert "EngineProcessError: " in scene.outcome(0)
        assert "EngineProcessError: " in scene.outcome(1)


def test_who_took_part_to_the_end_and_left_is_not_taken_for_dead() -> None:
    sizes = 1, 1, 64
    with Arena.create(Ring.nbytes(*sizes)) as arena:
        rank, worker = Ring(arena, *sizes, own_counter=0), Ring(arena, *sizes, own_counter=1)
        rank.count(5)
        rank.leave()
        worker.require_filling(0, 4)
        with pytest.raises(PeerFailed, match="trainer rank 0 failed or died: it did not send bucket 5"):
            worker.require_filling(0, 5)
        rank.require_emptying(0, 0)
        worker.close()
        with pytest.raises(PeerFailed, match="worker 0 of engine 0 failed or died: it did not empty bucket 0"):
            rank.require_emptying(0, 0)
        rank.close()
