"""An engine decides for all of its workers, and serves one fill on all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from standin import StandInEngine
from store_trainer import Trainer, expected, meanwhile

from mbridge_rl.core.errors import EngineUnusable, StoreError, SyncError
from mbridge_rl.sync.payload.message_codec import encode
from mbridge_rl.sync.payload.messages import Announcement, Introduction, WorkerDescription
from mbridge_rl.sync.store.image import new_fill
from mbridge_rl.sync.vllm.engines import process
from mbridge_rl.sync.vllm.engines.process_calls import Call
from mbridge_rl.sync.vllm.engines.transactions import TransactionalEngine
from mbridge_rl.sync.vllm.worker import calls as worker_calls


class PlainEngine(TransactionalEngine):
    """The library's own transactions over workers that are those of a stand-in."""

    def __init__(self, inner: StandInEngine) -> None:
        super().__init__()
        self.inner, self.version = inner, 0
        self.workers = [SimpleNamespace(receiver=_Worker(receiver)) for receiver in inner.receivers]

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        return self.inner.describe(announcement)

    def adopt(self, introduction: Introduction) -> None:
        self.inner.adopt(introduction)

    def generate(self) -> tuple[int, str]:
        self.require_usable()
        self.inner.version = self.version
        return self.inner.generate()

    def _call_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        return worker_calls.results_of([worker_calls.answering(worker, call, *map(encode, args)) for worker in self.workers])

    def _hold(self, requests: str, timeout: float) -> None: ...
    def _resume(self) -> None: ...
    def _forget(self) -> None: ...

    def _serve(self, version: int) -> None:
        self.version = version


class _Worker:
    def __init__(self, payload: Any) -> None:
        self.payload, self.serving = payload, payload.serving

    @property
    def unusable(self) -> str | None:
        return self.serving.guard.reason


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> PlainEngine:
    monkeypatch.setattr(worker_calls, "backend_of", lambda worker: worker)
    return PlainEngine(StandInEngine())


def test_an_engine_decides_for_all_of_its_workers(name: str, engine: PlainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(StandInEngine(), name)
    trainer.sync(1)
    before = engine.generate()
    meanwhile(monkeypatch, engine.inner, 1, "begin", lambda: [trainer.sync(2), trainer.sync(3)])
    with pytest.raises(StoreError, match="has moved on to version 3"):
        engine.catch_up(name)
    assert engine.generate() == before
    assert all(receiver._update is None for receiver in engine.inner.receivers)  # no slot is kept from the trainer
    engine.catch_up(name)
    assert engine.generate() == expected(3)
    trainer.weights.close()


def test_an_engine_refuses_where_one_worker_did_not_commit(
    name: str, engine: PlainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where that worker has a good reason, and had written nothing."""
    trainer = Trainer([engine, StandInEngine()], name)
    trainer.sync(1)
    meanwhile(monkeypatch, engine.inner, 1, "commit", lambda: engine.inner.receivers[1].abort("something dropped it"))
    report = trainer.sync(2)
    assert list(report.failed) == [0]
    assert [receiver.serving.version for receiver in engine.inner.receivers] == [2, 1]  # a mixture, were it served
    with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\)"):
        engine.generate()
    for receiver in engine.inner.receivers:  # as whoever asks vLLM itself would find out
        assert "version 2 was lost (before it: version 1)" in str(receiver.serving.guard.reason)
    trainer.sync(3)
    assert engine.generate() == expected(3)
    trainer.weights.close()


def test_an_engine_whose_workers_hold_different_fills_refuses(name: str, engine: PlainEngine) -> None:
    trainer = Trainer(engine, name)
    trainer.sync(1)
    engine.inner.receivers[1].serving.fill = new_fill()  # of a sync that no one else took part in
    with pytest.raises(EngineUnusable, match="the engine's workers hold weights of different syncs"):
        engine.generate()
    with pytest.raises(EngineUnusable, match="the engine's workers hold weights of different syncs"):
        engine.publish([])
    trainer.sync(2)
    assert engine.generate() == expected(2)
    trainer.weights.close()


def test_an_engine_stays_unusable_where_its_workers_cannot_be_told(
    name: str, engine: PlainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer([engine, StandInEngine()], name)
    trainer.sync(1)

    def lost(*_: Any) -> None:
        raise SyncError("the workers do not answer")

    monkeypatch.setattr(worker_calls, "lose", lost)
    meanwhile(monkeypatch, engine.inner, 1, "commit", lambda: engine.inner.receivers[1].abort("something dropped it"))
    assert list(trainer.sync(2).failed) == [0]
    with pytest.raises(EngineUnusable, match="version 2 was lost, and a complete sync has to come"):
        engine.generate()
    trainer.weights.close()


def test_a_commit_without_an_update_changes_nothing(name: str, engine: PlainEngine) -> None:
    trainer = Trainer(engine, name)
    trainer.sync(1)
    for version in (1, 2):
        with pytest.raises(SyncError, match=f"version {version} cannot be committed: none is open"):
            engine.commit(version)
    assert engine.generate() == expected(1)
    trainer.weights.close()


def test_calls_that_were_given_up_do_not_run_after_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's process takes them in the order in which they came, also where it gets all of them at once."""
    order: list[str] = []

    class Engine:
        def __init__(self) -> None: ...
        def shared_memory_files(self) -> list[str]:
            return []

        def commit(self, version: int) -> None:
            time.sleep(0.2)
            order.append(f"commit {version}")

        def begin(self, version: int) -> None:
            order.append(f"begin {version}")

        def close(self) -> None: ...

    class Connection:
        calls = [Call(1, "commit", (2,)), Call(2, "begin", (3,))]  # noqa: RUF012

        def send(self, _: Any) -> None: ...
        def recv(self) -> Any:
            if not self.calls:
                raise EOFError
            return self.calls.pop(0)

    monkeypatch.setattr("mbridge_rl.sync.vllm.engines.in_process.InProcessEngine", Engine)
    process._serve(Connection(), {}, [])  # type: ignore[arg-type]
    assert order == ["commit 2", "begin 3"]
