"""Reward functions that reward as the toy task does and, once, kill a part of their own run: -9, in the middle of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mbridge_rl.training.rollout.rewards import Problem, exact_match

FOLDER = "SABOTAGE_FOLDER"
CALLS_PER_STEP = 32 * 4


def kill_engine_then_rank(problem: Problem, completion: str) -> float:
    """The engine in step 2, another trainer rank in step 4."""
    _once("engine", 1.5, engine_pids)
    _once("rank", 3.5, sibling_pids)
    return exact_match(problem, completion)


def kill_driver(problem: Problem, completion: str) -> float:
    _once("driver", 3.5, lambda: [os.getppid()])
    return exact_match(problem, completion)


def slowly(problem: Problem, completion: str) -> float:
    """Some seconds for a step."""
    time.sleep(0.03)
    return exact_match(problem, completion)


def engine_pids() -> list[int]:
    """Engines of this process, or of its Ray node."""
    return [
        pid
        for pid in _processes()
        if (_parent(pid) == os.getpid() and "mbridge_rl.sync.vllm.engines.process" in _command(pid))
        or (_command(pid).startswith("ray::EngineActor") and _parent(pid) == os.getppid())
    ]


def ray_pids(driver: int) -> list[int]:
    """Actors of the run of this driver; others may run beside it."""
    actors = [pid for pid in _processes() if _command(pid).startswith(("ray::TrainerRank", "ray::EngineActor"))]
    return [pid for pid in actors if driver in _ancestors(pid)]


def sibling_pids() -> list[int]:
    """The other trainer ranks that the launcher, or the Ray node, started."""
    mine = os.getpid()
    siblings = [pid for pid in _processes() if _parent(pid) == os.getppid() and pid != mine]
    return [pid for pid in siblings if _command(pid) == _command(mine)]


def _once(name: str, step: float, victims: Callable[[], list[int]]) -> None:
    """In step `step` of the run, counted by rewards: earlier attempts of the run count, too."""
    folder = Path(os.environ[FOLDER])
    calls = folder / f"{name}.calls"
    with calls.open("a") as file:
        file.write(".")
    done = folder / f"{name}.done"
    if done.exists() or calls.stat().st_size < step * CALLS_PER_STEP:
        return
    pids = victims()
    done.write_text(str(pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return -1


def _ancestors(pid: int) -> list[int]:
    pids = []
    while (pid := _parent(pid)) > 0:
        pids.append(pid)
    return pids


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
