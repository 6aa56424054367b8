"""Engines in Ray actors, for `tests/vllm/test_attached_engines.py`: refitted, killed, and gone without a trace."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from attached_scenarios import LIMITS, greedy, holds_requests_in_flight, is_refitted_exactly, make_checkpoints


def start_ray() -> Any:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, object_store_memory=128 << 20, include_dashboard=False, logging_level="error")
    return ray


def a_ray_actor_with_two_workers(directory: Path) -> None:
    make_checkpoints(directory)
    ray = start_ray()
    with leaves_nothing(_ray_engine_of_two(directory)) as engine:
        is_refitted_exactly(engine, directory, str(directory / "files"))
        engine.close()
    ray.shutdown()


def a_killed_ray_actor_with_two_workers(directory: Path) -> None:
    make_checkpoints(directory)
    ray = start_ray()
    with leaves_nothing(_ray_engine_of_two(directory)) as engine:
        os.kill(engine.pid, signal.SIGKILL)
    ray.shutdown()


def _ray_engine_of_two(directory: Path) -> Any:
    from mbridge_rl.sync.vllm.engines.ray_actor import RayEngine

    options: dict[str, Any] = {"num_cpus": 0}
    arguments: dict[str, Any] = {**LIMITS, "kv_cache_bytes": 1 << 26, "tensor_parallel_size": 2}
    return RayEngine.start(directory / "A", threads=1, ray_options=options, **arguments)


@contextmanager
def leaves_nothing(engine: Any) -> Iterator[Any]:
    """Once the block has ended the actor: neither processes, nor names of what they had mapped in shared memory."""
    actor = psutil.Process(engine.pid)
    family = [actor, *actor.children(recursive=True)]
    files = {path for process in family for path in _in_shared_memory(process.pid)}
    assert len([path for path in files if path.name.startswith("psm_")]) >= 4, files
    yield engine
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert not [path for path in files if path.exists()]


def _in_shared_memory(pid: int) -> set[Path]:
    """What a process has mapped there: under the names of its map, which may be gone, and those of the same inode."""
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line]
    inodes = {int(line[4]) for line in lines}
    named = {Path(file.path) for file in os.scandir("/dev/shm") if file.inode() in inodes}
    return named | {Path(line[5].removesuffix(" (deleted)")) for line in lines}


def a_ray_actor(directory: Path) -> None:
    from mbridge_rl.core.errors import EngineProcessError
    from mbridge_rl.sync.vllm.engines.ray_actor import RayEngine

    make_checkpoints(directory)
    ray = start_ray()
    options = {"num_cpus": 0, "name": "engine-0"}
    started = RayEngine.start(directory / "A", threads=1, ray_options=options, **LIMITS, kv_cache_bytes=1 << 26)
    engine = RayEngine(ray.get_actor("engine-0"))  # as another process would find it
    is_refitted_exactly(engine, directory, str(directory / "files"))
    holds_requests_in_flight(engine, directory)
    started.close()
    with pytest.raises(EngineProcessError, match="the engine actor was lost during generate"):
        greedy(engine)
    ray.shutdown()
