"""A real vLLM engine that outlives trainers which are killed amid a sync, and is killed itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import chaos
import chaos_trainer
from children import fork
from engine_answers import PROMPTS
from refit_engines import without_versions
from standin import light_model
from tiny import hf_state, tiny_checkpoint

from mbridge_rl.core.errors import EngineUnusable
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.weight_sync import WeightSync

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2}
ENGINE = {"max_model_len": 64, "max_num_seqs": 8}


class Trainers:
    """Forks two trainer ranks at a time, which drive the engine of this process."""

    def __init__(self, folder: Path, engine: EngineProcess, store: str) -> None:
        self.folder, self.engine, self.store = folder, engine, store
        self._round = 0

    def sync(self, version: int, tag: str, mode: str, victim: int | None = None, then: Any = None) -> list[str]:
        """Runs one sync on two ranks and returns both outcomes. Amid the transfer, `victim` is killed and `then` is called."""
        self._round += 1
        folder = self.folder / str(self._round)
        folder.mkdir()
        ranks: list[int] = []
        try:
            for rank in range(2):
                fork(lambda rank=rank: self._rank(rank, folder, version, tag, mode, victim, then), ranks.append)
            if victim is not None or then is not None:
                chaos._wait_for((folder / "amid").exists, "the transfer", 90)
                if victim is not None:
                    os.kill(ranks[victim], signal.SIGKILL)
                if then is not None:
                    then()
            chaos._wait_for(lambda: all(map(chaos._has_ended, ranks)), "the ranks", 90)
        finally:
            for pid in ranks:
                chaos._end(pid)
        # Late answers to calls of those processes must not be taken for answers to calls of this one.
        self.engine._calls = 1_000_000 * self._round
        return [chaos._outcome(folder, rank) for rank in range(2)]

    def _rank(self, rank: int, folder: Path, version: int, tag: str, mode: str, victim: int | None, then: Any) -> None:
        self.engine._calls = 1_000_000 * self._round + 500_000
        amid = victim is not None or then is not None

        def slowly(outlet: Any, worker: int, index: int, part: Any, send: Any = None) -> None:
            if amid and index == 2:
                (folder / "amid").touch()
                time.sleep(2.0)
            send(outlet, worker, index, part)

        for kind in chaos_trainer.OUTLETS:
            kind.send = lambda *args, send=kind.send: slowly(*args, send=send)
        torch.set_num_threads(1)
        try:
            chaos_trainer.meet(folder, rank)
            state = hf_state(self.folder / tag)
            bridge, model = light_model("qwen3", ParallelLayout(tp=2), rank, state, SIZES)
            sync = WeightSync(bridge, model, self.engine if rank == 0 else None, mode=mode, store=self.store, timeout=6.0,
                              bucket_bytes=1 << 16, retries=0)  # fmt: skip
            sync.sync(version)
            sync.close()
            outcome = "done"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"outcome-{rank}").write_text(outcome)


@pytest.fixture
def store() -> Iterator[str]:
    name = f"vllm.chaos.{os.getpid()}"
    yield name
    WeightStore(name).remove()


def answers(engine: EngineProcess) -> list[tuple[list[int], list[float]]]:
    return without_versions(engine.generate(PROMPTS, temperature=0.0, max_tokens=6))


def refusal(engine: EngineProcess) -> str:
    with pytest.raises(EngineUnusable) as refused:
        engine.generate(PROMPTS, max_tokens=2)
    return str(refused.value)


def test_a_real_engine_survives_its_trainers(tmp_path: Path, store: str) -> None:
    tiny_checkpoint(tmp_path / "A", "qwen3", seed=0, **SIZES)
    tiny_checkpoint(tmp_path / "B", "qwen3", seed=1, **SIZES)
    with EngineProcess(tmp_path / "A", **ENGINE) as engine:
        engine.wait_ready()
        expected = {"A": answers(engine)}
        trainers = Trainers(tmp_path, engine, store)
        assert trainers.sync(1, "B", "staged") == ["done", "done"]
        expected["B"] = answers(engine)
        assert expected["A"] != expected["B"]

        first, second = trainers.sync(2, "A", "staged", victim=0)
        assert (first, second.split(":")[0]) == ("killed", "RanksUnreachable")
        assert (engine.weight_version, answers(engine)) == (1, expected["B"])

        first, second = trainers.sync(3, "A", "streaming", victim=1)
        assert (first.split(":")[0], second) == ("RanksUnreachable", "killed")
        with pytest.raises(EngineUnusable, match=r"version 3 was lost \(before it: version 1\)"):
            engine.generate(PROMPTS, max_tokens=2)

        first, _ = trainers.sync(4, "A", "streaming", victim=0)
        assert first == "killed"
        # Without a word from any trainer, and a moment later: the update is under way until the engine looks at its workers.
        chaos._wait_for(lambda: "version 4 was lost" in refusal(engine), "the engine to give up", 5)

        assert trainers.sync(5, "A", "staged") == ["done", "done"]
        assert (engine.weight_version, answers(engine)) == (5, expected["A"])

        assert engine._process is not None
        first, second = trainers.sync(6, "B", "staged", then=engine._process.kill)
        assert "EngineProcessError" in first
        assert "EngineProcessError" in second
    with EngineProcess(tmp_path / "B", **ENGINE) as again:
        again.wait_ready()
        again.catch_up(store)  # the last committed version, without any trainer
        assert (again.weight_version, answers(again)) == (5, expected["A"])


@pytest.mark.nightly
@pytest.mark.alone
def test_a_killed_engine_of_two_workers_leaves_nothing(tmp_path: Path) -> None:
    """Neither processes nor what they talked through: vLLM's own files, and those of Python's multiprocessing."""
    tiny_checkpoint(tmp_path / "A", "qwen3", seed=0, **SIZES)
    engine = EngineProcess(tmp_path / "A", **ENGINE, tensor_parallel_size=2).start()
    engine.wait_ready()
    assert engine._process is not None
    group, files = engine._process.pid, [Path(path) for path in engine._segments]
    members = _members(group)
    assert len(members) >= 3
    assert any(path.name.startswith("psm_") for path in files)
    assert all(path.exists() for path in files)
    mapped = {path for pid in members for path in _mapped(pid)}
    assert mapped <= {str(path) for path in files}, "shared memory that the engine does not know of"
    os.killpg(group, signal.SIGKILL)
    engine.close()
    chaos._wait_for(lambda: not _members(group), "the end of the workers", 10)
    assert not [path for path in files if path.exists()]


def _members(group: int) -> set[int]:
    """The ids of the living processes of a process group."""
    members = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            members.add(int(path.parent.name))
    return members


def _mapped(pid: int) -> set[str]:
    """Files of shared memory that a process has mapped and that have a name still."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[-1] for line in lines if "/dev/shm/" in line}
    return {name for name in names if not name.endswith("(deleted)")}
