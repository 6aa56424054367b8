"""Functions that an engine (`vllm.engines`) runs in each vLLM worker, by `LLM.collective_rpc`.

They return errors instead of raising them. vLLM's multi-process executor stops reading at the first worker's failure and
leaves the other workers' answers in their queues, where the next call would take them for its own; and an error that crosses
processes arrives there as bare text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.host import machine_id

if TYPE_CHECKING:
    from mbridge_rl.sync.vllm.worker.backend import PlannedSyncEngine

Answer = tuple[bool, Any]  # (True, result) or (False, failure)


def answering(worker: Any, call: Callable[..., Any], *args: Any) -> Answer:
    """Runs `call(worker, *args)` in a worker, and returns its result or its error."""
    try:
        return True, call(worker, *args)
    except Exception as error:  # every error has to be returned as a value; see above
        return False, Failure.of(error).to_json()


def results_of(answers: Iterable[Answer]) -> list[Any]:
    """The results of all workers.

    Raises:
        Exception: the error of the first worker that failed, as it was raised there.
    """
    answers = list(answers)
    for succeeded, result in answers:
        if not succeeded:
            Failure.from_json(result).raise_()
    return [result for _, result in answers]


def backend_of(worker: Any) -> PlannedSyncEngine:
    """The worker's weight-transfer engine.

    Raises:
        SyncError: it is not of the backend "mbridge".
    """
    from mbridge_rl.sync.vllm.worker.backend import PlannedSyncEngine

    engine = worker.weight_transfer_engine
    if not isinstance(engine, PlannedSyncEngine):
        raise SyncError(f"this engine's weight transfer is {type(engine).__name__}, expected backend 'mbridge'")
    return engine


def initialize(worker: Any, init_info: dict[str, Any]) -> None:
    worker.init_weight_transfer_engine(init_info)


def abandon(worker: Any, reason: str) -> None:
    """Drops an open update, because another worker or its sender failed."""
    backend_of(worker).receiver.abort(reason)


def unusable(worker: Any) -> str | None:
    return backend_of(worker).receiver.unusable


def shared_memory_ident(_: Any) -> str | None:
    """The part of their names by which this engine's shared-memory files differ from others'; `None` in a single worker."""
    return os.environ.get("VLLM_DIST_IDENT")


def shared_memory_files(_: Any) -> list[str]:
    """The shared-memory files of Python's multiprocessing that this process has mapped. After killing it, somebody has to
    unlink them.

    They are compared by inode, because the process that makes a semaphore has mapped it under another name.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {int(line.split(maxsplit=5)[4]) for line in lines if "/dev/shm/" in line}
    with os.scandir("/dev/shm") as files:
        ours = (file for file in files if file.name.startswith(("psm_", "sem.mp-")))
        return sorted(file.path for file in ours if file.inode() in mapped)


def make_stage_buffers(worker: Any) -> None:
    """Makes the buffers of a later pipeline stage's inputs. vLLM makes them at warm-up, which its CPU runner skips unless it
    compiles."""
    runner = _inner(worker).model_runner
    if worker.parallel_config.pipeline_parallel_size > 1 and getattr(runner, "intermediate_tensors", True) is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def describe(worker: Any) -> dict[str, Any]:
    inner = _inner(worker)
    size = inner.vllm_config.parallel_config.world_size
    return backend_of(worker).receiver.describe(inner.rank % size, size, machine_id()).to_json()


def adopt(worker: Any, introduction: Mapping[str, Any]) -> None:
    rank = _inner(worker).rank % len(introduction["route"])
    backend_of(worker).receiver.shards.adopt(rank, introduction)


def receive_shards(worker: Any, update: Mapping[str, Any]) -> None:
    receiver = backend_of(worker).receiver
    receiver.abort("another update started")
    arguments = (update[name] for name in ("version", "fingerprint", "mode", "wire", "timeout", "delta"))
    receiver.shards.receive(*arguments)


def status(worker: Any) -> dict[str, Any]:
    return backend_of(worker).receiver.shards.status()


def commit_shards(worker: Any, version: int, fill: str | None = None) -> dict[str, Any]:
    return backend_of(worker).receiver.shards.commit(version, fill)


def lose(worker: Any, version: int, reason: str, fill: str | None) -> None:
    """Blocks this worker, because the commit failed in some worker: then none of them serves."""
    backend_of(worker).receiver.shards.lose(version, reason, fill)


def identity(worker: Any) -> dict[str, str | None]:
    """`refuses`: why this worker refuses to generate, or `None`; `fill`: the fill that brought its weights."""
    receiver = backend_of(worker).receiver
    return {"refuses": receiver.unusable, "fill": receiver.serving.fill}


def publish(worker: Any, paths: Sequence[str]) -> str:
    shards = backend_of(worker).receiver.shards
    shards.publish_to(paths[shards.route.rank])
    return shards.fingerprint


def catch_up(worker: Any, update: Mapping[str, Any]) -> None:
    """Opens and verifies the image of a committed fill, which the engine chose for all its workers."""
    receive_shards(worker, update)


def _inner(worker: Any) -> Any:
    return getattr(worker, "worker", worker)  # vLLM's wrapper forwards only reads of attributes


def in_workers(llm: Any, call: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `call(worker, *args)` in all workers of an `LLM`; returns their results, or raises the first error."""
    if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
        return llm.collective_rpc(call, args=args)  # within this process, so errors keep their traceback
    return results_of(llm.collective_rpc(answering, args=(call, *args)))
