"""Several engines as one: prompts are dealt, losses are replaced as often as allowed, and named when not."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mbridge_rl.core.errors import EngineProcessError, SyncError
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.sync.weight_sync import SyncOptions
from mbridge_rl.training import fleet as fleet_module
from mbridge_rl.training.fleet import EngineFleet


class NamedEngine:
    """Answers every prompt with the engine's name, its length and its seed; dies when it is told to."""

    def __init__(self, name: int) -> None:
        self.name, self.dead, self.refuses, self.closed = name, False, False, False

    @property
    def weight_version(self) -> int:
        self._check()
        return 1

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seed: list[int], temperature: float, adapter: str | None = None
    ) -> list[Completion]:
        self._check()
        self.adapter = adapter
        assert not self.refuses
        assert len(seed) == len(prompts)
        return [Completion(index, [self.name, len(prompt), seed[index]], [], "stop", 1) for index, prompt in enumerate(prompts)]

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.dead:
            raise EngineProcessError(f"engine {self.name} died")


class RecordingSync:
    """A weight sync that says what it was made for."""

    made: list[tuple[list[int], list[int]]] = []  # noqa: RUF012  one for all, so that tests see those that are gone
    adapter: str | None = None

    def __init__(
        self, bridge: Any, model: Any, engines: Sequence[NamedEngine], adapter: str | None = None, **options: Any
    ) -> None:
        assert (adapter, options.get("is_policy", False)) == (self.adapter, self.adapter is not None)
        self.versions: list[int] = []
        self._engines = engines
        RecordingSync.made.append(([engine.name for engine in engines], self.versions))

    def sync(self, version: int) -> Any:
        for engine in self._engines:
            engine._check()
        self.versions.append(version)
        return SimpleNamespace(version=version, failed={i: "no" for i, engine in enumerate(self._engines) if engine.refuses})

    def close(self) -> None:
        """Nothing to free."""


class RecordingAdapterSync(RecordingSync):
    adapter = "policy"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NamedEngine]:
    """Every engine that was started, with its number in the order of starts as name."""
    monkeypatch.setattr(fleet_module, "WeightSync", RecordingSync)
    monkeypatch.setattr(fleet_module, "AdapterSync", RecordingAdapterSync)
    RecordingSync.made.clear()
    return []


def _fleet(started: list[NamedEngine], count: int, restarts: int, adapter: str | None = None) -> EngineFleet:
    def make(index: int) -> NamedEngine:
        started.append(NamedEngine(len(started)))
        return started[-1]

    fleet = EngineFleet(make, count, restarts=restarts)
    assert not started
    fleet.connect(None, [], dtype=None, options=SyncOptions(), adapter=adapter)
    return fleet


@pytest.mark.parametrize("prompts", [1, 2, 5, 6])
def test_prompts_are_dealt_with_their_seeds_and_come_back_in_order(started: list[NamedEngine], prompts: int) -> None:
    fleet = _fleet(started, 3, 0)
    completions = fleet.generate([[0] * (index + 1) for index in range(prompts)], seed=list(range(prompts)), temperature=1.0)
    assert [completion.prompt_index for completion in completions] == list(range(prompts))
    assert [completion.tokens[1:] for completion in completions] == [[index + 1, index] for index in range(prompts)]
    assert len({completion.tokens[0] for completion in completions}) == min(prompts, 3)
    fleet.close()
    assert all(engine.closed for engine in started)


def test_a_lost_engine_is_replaced_and_all_get_the_present_weights(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 2, restarts=1)
    fleet.sync(1)
    started[1].dead = True
    with pytest.raises(EngineProcessError, match="engine 1 died"):
        fleet.generate([[1], [2]], seed=[1, 2], temperature=1.0)
    fleet.replace_lost(1, EngineProcessError("engine 1 died"))
    assert started[1].closed
    assert RecordingSync.made == [([0, 1], [1]), ([0, 2], [1])]
    assert [completion.tokens[0] for completion in fleet.generate([[1], [2]], seed=[1, 2], temperature=1.0)] == [0, 2]
    assert fleet.lost == 1
    fleet.close()


def test_an_engine_that_dies_in_a_sync_is_replaced_in_it(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 2, restarts=1)
    started[0].dead = True
    assert fleet.sync(4).version == 4
    assert RecordingSync.made[-1] == ([2, 1], [4])
    fleet.close()


def test_engines_of_an_adapter_are_asked_for_it_and_new_ones_get_it(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 2, restarts=1, adapter="policy")
    fleet.sync(3)
    started[0].dead = True
    fleet.replace_lost(3, EngineProcessError("engine 0 died"))
    assert RecordingSync.made == [([0, 1], [3]), ([2, 1], [3])]
    fleet.generate([[1], [2]], seed=[1, 2], temperature=1.0)
    assert [engine.adapter for engine in started[1:]] == ["policy", "policy"]
    fleet.close()


def test_too_many_losses_end_the_run_by_name(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 1, restarts=0)
    started[0].dead = True
    with pytest.raises(EngineProcessError, match=r"1 engines were lost in this run \(now \[0\]\) and engine.restarts=0"):
        fleet.sync(1)
    fleet.close()


def test_a_sync_that_fails_with_all_engines_alive_is_not_repeated(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 1, restarts=5)
    with pytest.raises(SyncError, match="weights are not finite"):
        fleet.replace_lost(1, SyncError("weights are not finite"))
    assert len(started) == 1
    fleet.close()


def test_an_engine_that_failed_to_commit_rests_until_it_does(started: list[NamedEngine]) -> None:
    fleet = _fleet(started, 3, restarts=1)
    started[1].refuses = True
    assert fleet.sync(1).failed == {1: "no"}
    completions = fleet.generate([[0]] * 4, seed=[1, 2, 3, 4], temperature=1.0)
    assert [completion.tokens[0] for completion in completions] == [0, 0, 2, 2]
    assert [completion.prompt_index for completion in completions] == [0, 1, 2, 3]
    assert fleet.lost == 0
    started[1].refuses = False
    fleet.sync(2)
    assert {completion.tokens[0] for completion in fleet.generate([[0]] * 3, seed=[1, 2, 3], temperature=1.0)} == {0, 1, 2}
    fleet.close()
