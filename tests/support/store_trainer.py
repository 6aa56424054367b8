"""A trainer of a named weight store, whose versions are known, for tests of what names a version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from standin import StandInEngine, light_model, random_weights, served, set_weights

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.weight_sync import WeightSync

SIZES = (4096, 1000)


class Trainer:
    """One rank, whose weights are those of the version."""

    def __init__(self, engines: Any, name: str, **options: Any) -> None:
        self._bridge, self._model = light_model("qwen3", ParallelLayout(), 0, random_weights("qwen3", 0))
        self.weights = WeightSync(self._bridge, self._model, engines, store=name, timeout=5.0, **options)

    def sync(self, version: int) -> Any:
        set_weights(self._bridge, self._model, 0, random_weights("qwen3", version))
        return self.weights.sync(version)


def expected(version: int) -> tuple[int, str]:
    return version, served(random_weights("qwen3", version))


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, engine: StandInEngine, worker: int, method: str, act: Callable[[], object]
) -> None:
    """Before this worker does what its engine told it to, something else happens."""
    receiver = engine.receivers[worker]
    real = getattr(receiver, method)

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(receiver, method, real)
        act()
        return real(*args)

    monkeypatch.setattr(receiver, method, slow)
