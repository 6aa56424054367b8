"""A vLLM engine of two workers in a process of its own, that can be struck at a step of a sync, and looked into.

What a worker holds is said by a sha256 of its live parameters, computed by code that shares nothing with the library.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from strikes import Reached, StepTracer, Strike, start, stepping
from torch import Tensor

from mbridge_rl.sync.vllm.engines import process
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.vllm.worker import calls as worker_calls

ENGINE = "engine"  # the process that drives the workers, as a victim; a worker is its rank

_in_worker: StepTracer | None = None


def sha256_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and bytes, in the names' order."""
    state = hashlib.sha256()
    for name, tensor in sorted(named):
        state.update(name.encode())
        state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def worker_sha(worker: Any) -> str:
    return sha256_of((name, parameter.data) for name, parameter in _inner(worker).model_runner.model.named_parameters())


def worker_pid(_: Any) -> int:
    return os.getpid()


def worker_parameters(worker: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what a sync may write to, by name."""
    receiver = worker_calls.backend_of(worker).receiver
    with receiver.plain():
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in receiver.parameters().items()
        }


def arm_worker(worker: Any, rank: int, strike: Strike | None) -> None:
    """Counts this worker's steps from here on, if it is the one."""
    global _in_worker
    if _inner(worker).rank == rank:
        _in_worker = StepTracer(strike)
        start(_in_worker)


def disarm_worker(worker: Any) -> tuple[str, Reached] | None:
    global _in_worker
    start(None)
    tracer, _in_worker = _in_worker, None
    return None if tracer is None else (tracer.place, tracer.reached)


class StruckEngine(InProcessEngine):
    """The engine, in the child."""

    _tracer: StepTracer | None = None
    _active = 0
    _counting = threading.Lock()

    def pids(self) -> dict[Any, int]:
        return {ENGINE: os.getpid(), **dict(enumerate(self._call_workers(worker_pid)))}

    def parameters(self) -> list[dict[str, tuple[tuple[int, ...], str]]]:
        return self._call_workers(worker_parameters)

    def shas(self) -> list[str]:
        return self._call_workers(worker_sha)

    def arm(self, victim: str | int, strike: Strike | None) -> None:
        """Steps of `victim` are counted until `disarm`; with a strike, it comes at one of them."""
        if victim == ENGINE:
            self._tracer = StepTracer(strike)
        else:
            self._call_workers(arm_worker, victim, strike)

    def disarm(self) -> tuple[str, Reached]:
        """Where the strike came, and how often each line was reached."""
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            return tracer.place, tracer.reached
        return next((noted for noted in self._call_workers(disarm_worker) if noted is not None), ("", []))

    def active(self) -> int:
        """Calls of a trainer that have not ended; they may be of one who gave up waiting for them."""
        return self._active


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(engine: StruckEngine, *args: Any, **kwargs: Any) -> Any:
        with engine._counting:
            engine._active += 1
        try:
            with stepping(engine._tracer):
                return method(engine, *args, **kwargs)
        finally:
            with engine._counting:
                engine._active -= 1

    return call


for _name in ("describe", "adopt", "begin", "status", "commit", "abort", "catch_up"):
    setattr(StruckEngine, _name, _counted(getattr(InProcessEngine, _name)))


class StruckProcess(EngineProcess):
    """Controls the engine from the process that started it."""

    _program = "struck_engine"

    def ask(self, method: str, *args: Any) -> Any:
        """One of the methods that `StruckEngine` adds."""
        return self._call(method, *args)

    def set_call_timeout(self, seconds: float) -> None:
        """Sets the seconds that a call may take before the engine is taken for dead."""
        self._call_timeout = seconds


def _inner(worker: Any) -> Any:
    return getattr(worker, "worker", worker)


if __name__ == "__main__":
    import struck_engine

    from mbridge_rl.sync.vllm.engines import in_process as engine

    engine.InProcessEngine = struck_engine.StruckEngine  # type: ignore[misc]
    process.main()
