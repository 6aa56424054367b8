"""Engines that join, leave and die while their trainer goes on."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from fused_engine import EngineLayout
from ranks import run_ranks
from standin import RemoteEngine, StandInEngine, light_model, random_weights, serve, served, set_weights

from mbridge_rl.core.errors import EngineMismatch, EngineProcessError, EngineUnusable, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.weight_sync import WeightSync

WAYS = [
    ("staged", "shared_memory"),
    ("streaming", "shared_memory"),
    ("staged", "process_group"),
    ("streaming", "process_group"),
]
TP2 = ParallelLayout(tp=2)


class Trainer:
    """One rank, whose weights differ from version to version."""

    def __init__(self, rank: int, engines: list[Any] | None, **options: Any) -> None:
        self.rank = rank
        self._bridge, self._model = light_model("qwen3", TP2, rank, random_weights("qwen3", 0))
        self.weights = WeightSync(self._bridge, self._model, engines, bucket_bytes=1 << 12, timeout=3.0, **options)

    def sync(self, version: int) -> Any:
        set_weights(self._bridge, self._model, self.rank, random_weights("qwen3", version))
        return self.weights.sync(version)


def expected(version: int) -> tuple[int, str]:
    return version, served(random_weights("qwen3", version))


def come_and_go(rank: int) -> None:
    for mode, transport in WAYS:
        first, second, third = (StandInEngine() if rank == 0 else None for _ in range(3))
        trainer = Trainer(rank, [first] if first else None, mode=mode, transport=transport)
        trainer.sync(1)
        if rank == 0:
            stranger = StandInEngine(layout=EngineLayout(tp=1))
            with pytest.raises(EngineMismatch, match="keeps its weights on 1 workers in another layout than the 2"):
                trainer.weights.add_engine(stranger)
            there = trainer.weights.add_engine(second)
            assert there == (1 if (mode, transport) == WAYS[0] else None)
            assert there is None or second.generate() == expected(1)  # without a sync, from the weight store
        report = trainer.sync(2)
        if rank == 0:
            assert [engine.generate() for engine in (first, second)] == [expected(2)] * 2, (mode, transport)
            assert len(report.engines) == 2
            trainer.weights.remove_engine(first)
            trainer.weights.add_engine(third)
            with pytest.raises(SyncError, match="takes no part"):
                trainer.weights.remove_engine(first)
        trainer.sync(3)
        if rank == 0:
            assert [engine.generate() for engine in (first, second, third)] == [expected(2), expected(3), expected(3)]
            trainer.weights.remove_engine(second)
            trainer.weights.remove_engine(third)
        with pytest.raises(SyncError, match="no engine takes part any more"):
            trainer.sync(4)
        trainer.weights.close()
        for engine in (first, second, third):
            if engine is not None:
                engine.close()


def test_engines_join_and_leave_between_syncs() -> None:
    run_ranks(come_and_go, 2)


def join_amid(rank: int) -> None:
    """Whoever comes while a version is on its way gets that version, once it is committed."""
    first, late = (StandInEngine() if rank == 0 else None for _ in range(2))
    trainer = Trainer(rank, [first] if first else None)
    joined: list[int | None] = []
    joining = threading.Thread(target=lambda: joined.append(trainer.weights.add_engine(late)))
    if first is not None:
        begin = first.begin

        def begin_and_be_joined(update: dict[str, Any]) -> None:
            joining.start()
            begin(update)

        first.begin = begin_and_be_joined
    trainer.sync(1)
    if first is not None:
        joining.join(20)
        assert joined == [1]
        assert late.generate() == expected(1)
        first.begin = begin
    trainer.sync(2)
    if first is not None:
        assert [first.generate(), late.generate()] == [expected(2)] * 2
    trainer.weights.close()


def test_an_engine_joins_amid_a_sync() -> None:
    run_ranks(join_amid, 2)


class Mortal:
    """An engine in another process, which is killed when the method `last_call` is called."""

    def __init__(self, address: Path, pid: int, last_call: str) -> None:
        self._engine, self._pid, self._last_call = RemoteEngine(address), pid, last_call

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self._engine, method)(*args, **kwargs) if method != "commit" else None
            if method == self._last_call:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                raise EngineProcessError("the engine was killed")
            return result if method != "commit" else self._engine.commit(*args, **kwargs)

        return call


def die(rank: int, address: Path, mode: str, transport: str, last_call: str) -> None:
    engines, dead = None, None
    if rank == 0:
        process = get_context("fork").Process(target=serve, args=(address, "qwen3", EngineLayout(tp=2)), daemon=True)
        process.start()
        while not (address).exists():
            process.join(0.02)
        dead = Mortal(address, process.pid, last_call)
        engines = [StandInEngine(), dead, StandInEngine()]
    trainer = Trainer(rank, engines, mode=mode, transport=transport, lost_engines="drop")
    report = trainer.sync(1)
    trainer.sync(2)
    if engines is not None:
        survivors = [engine for engine in engines if engine is not dead]
        assert list(trainer.weights.engines) == survivors
        assert [engine.generate() for engine in survivors] == [expected(2)] * 2
        assert report.attempts == (1 if last_call == "commit" else 2)
        survivors[0].begin = survivors[1].begin = gone
        survivors[0].status = survivors[1].status = gone
    with pytest.raises(
        EngineProcessError, match="2 of 2 engines failed"
    ):  # all are lost: none is dropped, and the error stands
        trainer.sync(3)
    trainer.weights.close()
    for engine in engines or ():
        if engine is not dead:
            engine.close()


def gone(*_: Any) -> Any:
    raise EngineProcessError("it died")


def die_each_way(rank: int, folder: Path) -> None:
    die(rank, folder / "1", "staged", "shared_memory", "begin")
    die(rank, folder / "2", "staged", "shared_memory", "commit")
    die(rank, folder / "3", "streaming", "shared_memory", "begin")
    die(rank, folder / "4", "streaming", "process_group", "status")


def test_a_sync_goes_on_without_an_engine_that_died(tmp_path: Path) -> None:
    run_ranks(die_each_way, 2, tmp_path)


def die_and_tell(rank: int) -> None:
    engines = [StandInEngine(), StandInEngine()] if rank == 0 else None
    trainer = Trainer(rank, engines, mode="streaming")
    trainer.sync(1)
    if engines is not None:
        engines[1].status = gone
    with pytest.raises(EngineProcessError, match="engine 1: EngineProcessError: it died"):
        trainer.sync(2)
    if engines is not None:
        with pytest.raises(EngineUnusable, match="version 2 was lost"):
            engines[0].generate()
        trainer.weights.remove_engine(engines[1])
    trainer.sync(3)
    assert engines is None or engines[0].generate() == expected(3)
    trainer.weights.close()


def test_a_lost_engine_is_an_error_unless_it_may_be_dropped() -> None:
    run_ranks(die_and_tell, 2)
