"""A real engine of two vLLM workers, one of which is stopped at the worst moments: it never serves two versions at once."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mbridge_rl.sync.payload.messages import (
    Announcement,
    CommitReport,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerStatus,
)
from mbridge_rl.sync.payload.wires import StoreWire

pytest.importorskip("vllm")

from interpreter import Interpreter
from standin import light_model, set_weights
from tiny import hf_state, tiny_checkpoint

from mbridge_rl.core.errors import EngineUnusable
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.weight_sync import WeightSync

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2}
VERSIONS = (1, 2, 3, 4)


class Replica:
    """Another engine of the same layout, as a trainer sees it: it answers at once and commits everything."""

    def __init__(self, described: Sequence[WorkerDescription]) -> None:
        self._described = described
        self.tokens: list[str] = []

    def describe(self, announcement: Announcement) -> Sequence[WorkerDescription]:
        return self._described

    def adopt(self, introduction: Introduction) -> None: ...
    def begin(self, request: UpdateRequest) -> None:
        assert isinstance(request.wire, StoreWire)
        self.tokens.append(request.wire.token)
        self._fill = request.fill

    def status(self) -> list[WorkerStatus]:
        return [WorkerStatus(arrived=True) for _ in self._described]

    def commit(self, version: int, requests: str = "keep", timeout: float = 600.0) -> CommitReport:
        return CommitReport(version, self._fill, len(self._described), 0, (), None, 0, 0, {})

    def abort(self, reason: str) -> None: ...


def weights_of(worker: Any) -> str:
    """Runs in a worker: of its live parameters, by nothing of the library."""
    inner, digest = getattr(worker, "worker", worker), hashlib.sha256()
    for name, parameter in sorted(inner.model_runner.model.named_parameters()):
        digest.update(name.encode() + parameter.data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pid_of(_: Any) -> int:
    return os.getpid()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class Scene:
    """An engine, and a trainer whose weights are those of the version."""

    def __init__(self, folder: Path, name: str) -> None:
        from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
        from mbridge_rl.sync.vllm.worker import calls as worker_calls

        self._states, self._name, self._calls = (
            {version: hf_state(folder / str(version)) for version in VERSIONS},
            name,
            worker_calls,
        )
        self._in_workers = worker_calls.in_workers
        self.engine = InProcessEngine(folder / "1", max_model_len=64, max_num_seqs=8, tensor_parallel_size=2)
        self._second = self._in_workers(self.engine.llm, pid_of)[1]
        self._bridge, self._model = light_model("qwen3", ParallelLayout(), 0, self._states[1], SIZES)
        sync = WeightSync(self._bridge, self._model, self.engine, store=name)
        self._known = {version: self._synced(sync, version) for version in VERSIONS}
        self._described = Introduction.from_json(sync.store.description(sync.route.fingerprint)).workers
        sync.close()

    def catch_up_while_stopped_at(self, call_name: str) -> dict[str, Any]:
        """The second worker is stopped when the engine calls `call_name` in its workers, and goes on when the trainer has made
        two more versions, so that the slot of the first one might have its token again."""
        replica, outcomes = Replica(self._described), []
        sync = WeightSync(self._bridge, self._model, replica, store=self._name)
        self._synced(sync, 1)

        def stopping(llm: Any, call: Callable[..., Any], *args: Any) -> list[Any]:
            if call.__name__ == call_name:
                os.kill(self._second, signal.SIGSTOP)
            return self._in_workers(llm, call, *args)

        def late() -> None:
            try:
                outcomes.append(f"version {self.engine.catch_up(self._name).version}")
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")

        self._calls.in_workers = stopping  # type: ignore[assignment]
        thread = threading.Thread(target=late)
        thread.start()
        while not is_stopped(self._second):
            time.sleep(0.01)
        time.sleep(1.0)  # the first worker runs the call meanwhile
        self._synced(sync, 2)
        self._synced(sync, 3)
        os.kill(self._second, signal.SIGCONT)
        thread.join(120)
        self._calls.in_workers = self._in_workers
        sync.close()
        held = self._in_workers(self.engine.llm, weights_of)
        which = [[version for version in VERSIONS if self._known[version][worker] == held[worker]] for worker in range(2)]
        try:
            self.engine.generate([[1, 2, 3]], max_tokens=2)
            refusal = None
        except EngineUnusable as error:
            refusal = str(error)
        served = {"which": which, "version": self.engine.weight_version, "refusal": refusal}
        return {"outcomes": outcomes, "served": served, "tokens": replica.tokens}

    def close(self) -> None:
        self._calls.in_workers = self._in_workers
        os.kill(self._second, signal.SIGCONT)
        self.engine.close()
        WeightStore(self._name).remove()

    def _synced(self, sync: WeightSync, version: int) -> list[str]:
        set_weights(self._bridge, self._model, 0, self._states[version])
        sync.sync(version)
        return self._in_workers(self.engine.llm, weights_of) if self.engine in sync.engines else []


def stopped_workers(folder: Path) -> list[dict[str, Any]]:
    scene = Scene(folder, f"identity.vllm.{os.getpid()}")
    try:
        return [scene.catch_up_while_stopped_at(call_name) for call_name in ("begin", "commit")]
    finally:
        scene.close()


def test_a_worker_that_is_stopped_amid_a_catch_up_serves_what_the_others_do(tmp_path: Path) -> None:
    for version in VERSIONS:
        tiny_checkpoint(tmp_path / str(version), "qwen3", seed=version, **SIZES)
    other = Interpreter()
    try:
        before_it_opens, before_it_loads = other.call(stopped_workers, tmp_path, timeout=900.0)
    finally:
        other.close()
    assert "has moved on to version 3" in before_it_opens["outcomes"][0]
    assert before_it_opens["served"] == {
        "which": [[4], [4]],
        "version": 4,
        "refusal": None,
    }  # both workers go on serving the version before
    assert before_it_loads["outcomes"] == ["version 1"]
    assert before_it_loads["served"] == {"which": [[1], [1]], "version": 1, "refusal": None}
    assert len(set(before_it_loads["tokens"])) == 3  # the trainer went into a third slot meanwhile
