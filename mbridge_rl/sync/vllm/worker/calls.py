"""Functions that an engine (`vllm.engines`) runs in each vLLM worker, by `LLM.collective_rpc`.

They return errors instead of raising them. vLLM's multi-process executor stops reading at the first worker's failure and
leaves the other workers' answers in their queues, where the next call would take them for its own; and an error that crosses
processes arrives there as bare text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.sync.payload.message_codec import decode, encode, require_message
from mbridge_rl.sync.payload.messages import (
    Announcement,
    Answer,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerIdentity,
    WorkerReport,
    WorkerStatus,
)

if TYPE_CHECKING:
    from mbridge_rl.sync.vllm.worker.backend import PlannedSyncEngine


def answering(worker: Any, call: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Runs `call(worker, *args)` in a worker; arguments and the `Answer` are encoded (`message_codec.encode`)."""
    return answered(lambda: call(worker, *map(decode, args)))


def answered(function: Callable[[], Any]) -> dict[str, Any]:
    """The result of `function`, or its error, as an encoded `Answer`."""
    try:
        return Answer(encode(function())).to_json()
    except Exception as error:  # every error has to be returned as a value; see above
        return Answer(failure=Failure.of(error)).to_json()


def results_of(answers: Iterable[object]) -> list[Any]:
    """The results of all workers, whose encoded answers are given.

    Raises:
        MessageError: a worker is of another mbridge_rl. Exception: the error of the first worker that failed, as it was raised
            there.
    """
    read_answers = [require_message(decode(answer), Answer, f"engine worker {rank}") for rank, answer in enumerate(answers)]
    for answer in read_answers:
        if answer.failure is not None:
            answer.failure.raise_()
    return [answer.result for answer in read_answers]


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


def describe(worker: Any, announcement: Announcement) -> WorkerDescription:
    inner = _inner(worker)
    size = inner.vllm_config.parallel_config.world_size
    return backend_of(worker).receiver.describe(announcement, inner.rank % size, size, machine_id())


def adopt(worker: Any, introduction: Introduction) -> None:
    rank = _inner(worker).rank % len(introduction.routes)
    backend_of(worker).receiver.payload.adopt(rank, introduction)


def begin(worker: Any, request: UpdateRequest) -> None:
    payload = backend_of(worker).receiver.payload
    payload.abort("another update began")
    payload.begin(request)


def status(worker: Any) -> WorkerStatus:
    return backend_of(worker).receiver.payload.status()


def commit(worker: Any, version: int, fill: str | None = None) -> WorkerReport:
    return backend_of(worker).receiver.payload.commit(version, fill)


def abort(worker: Any, reason: str) -> None:
    """Drops an open update, because another worker or its sender failed."""
    backend_of(worker).receiver.payload.abort(reason)


def publish(worker: Any, paths: Sequence[str]) -> str:
    payload = backend_of(worker).receiver.payload
    payload.publish_to(paths[payload.route.rank])
    return payload.fingerprint


def lose(worker: Any, version: int, reason: str, fill: str | None) -> None:
    """Blocks this worker, because the commit failed in some worker: then none of them serves."""
    backend_of(worker).receiver.payload.lose(version, reason, fill)


def identity(worker: Any) -> WorkerIdentity:
    receiver = backend_of(worker).receiver
    return WorkerIdentity(receiver.unusable, receiver.serving.fill)


def _inner(worker: Any) -> Any:
    return getattr(worker, "worker", worker)  # vLLM's wrapper forwards only reads of attributes


def in_workers(llm: Any, call: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `call(worker, *args)` in all workers of an `LLM`; returns their results, or raises the first error."""
    if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
        return llm.collective_rpc(call, args=args)  # within this process, so errors keep their traceback
    return results_of(llm.collective_rpc(answering, args=(call, *map(encode, args))))
