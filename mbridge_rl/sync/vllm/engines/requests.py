"""Requests of several threads in one vLLM engine, which can be held between two steps while its weights change."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mbridge_rl.core.errors import TransferTimeout
from mbridge_rl.sync.options import InFlight

_TURN_SECONDS = 1e-4


class RequestRunner:
    """Runs `generate` calls step by step. Every thread that calls steps the engine, for the requests of all threads.

    Args:
        llm_engine: vLLM's `LLMEngine`; only this object may step it.
    """

    def __init__(self, llm_engine: Any) -> None:
        self._engine = llm_engine
        self._core = llm_engine.engine_core.engine_core
        self._batches = getattr(self._core, "batch_queue", None)  # the batches of a pipeline
        self._lock = threading.Condition()
        self._numbers = itertools.count()
        self._open: set[str] = set()
        self._finished: dict[str, Any] = {}
        self._closed = False  # no new requests
        self._held = False  # no steps
        self._visitors = 0  # threads that want to come between two steps

    def run(self, prompts: Sequence[Any], parameters: Sequence[Any], adapters: Sequence[Any] | None = None) -> list[Any]:
        """The `RequestOutput` of every prompt, in order; `adapters` are vLLM's `LoRARequest` of each. If a step fails, the
        requests are removed from the engine, so that the next call does not run them."""
        with self._lock:
            self._lock.wait_for(lambda: not self._closed)
            names = [f"mbridge-{next(self._numbers)}" for _ in prompts]
            self._open.update(names)
        try:
            with self._lock:
                for name, prompt, parameter, adapter in zip(
                    names, prompts, parameters, adapters or [None] * len(names), strict=True
                ):
                    self._engine.add_request(name, prompt, parameter, lora_request=adapter)
            while not self._done(names):
                self._step(names)
            return [self._finished.pop(name) for name in names]
        finally:
            with self._lock:
                if left := self._open.intersection(names):
                    self._engine.abort_request(list(left), internal=False)
                    self._open -= left
                self._lock.notify_all()

    def hold(self, requests: InFlight, timeout: float = 600.0) -> None:
        """Stops generating until `resume`.

        Args:
            requests: what happens to requests in flight: `keep` freezes them (their keys and values are computed anew
                afterwards), `wait` lets them finish first, `abort` ends them with the tokens that they have.
            timeout: seconds to wait for them.

        Raises:
            TransferTimeout: the requests did not finish in time; generation goes on.
        """
        self._closed = True
        if requests != "wait":
            self._held = True  # set without the lock, so that no further step begins before this thread gets the lock
        with self._lock:
            if requests == "wait" and not self._lock.wait_for(lambda: not self._open, timeout):
                self._closed = False
                self._lock.notify_all()
                raise TransferTimeout(f"{len(self._open)} requests did not finish within {timeout:g} s; use 'keep' or 'abort'")
            self._held = True
            self._drain()
            if requests == "abort":
                self._abort()

    def resume(self) -> None:
        with self._lock:
            if self._batches is not None:
                self._core.resume_scheduler()
            self._closed = self._held = False
            self._lock.notify_all()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A block in which no step runs. Threads that step let this thread have the lock first."""
        self._visitors += 1
        try:
            with self._lock:
                yield
        finally:
            self._visitors -= 1

    @property
    def in_flight(self) -> int:
        return len(self._open)

    def _done(self, names: Sequence[str]) -> bool:
        return all(name in self._finished for name in names)

    def _step(self, names: Sequence[str]) -> None:
        while self._visitors:
            time.sleep(_TURN_SECONDS)
        with self._lock:
            self._lock.wait_for(lambda: not self._held or self._done(names))
            if self._done(names):
                return
            for output in self._engine.step():
                self._finish(output)

    def _drain(self) -> None:
        """Finishes the batches of a pipeline that are under way between two steps; their tokens are of the old weights."""
        if self._batches is None:
            return
        self._core.pause_scheduler("keep", clear_cache=False)
        while any(batch.total_num_scheduled_tokens for _, batch, _ in self._batches):
            for output in self._engine.step():
                self._finish(output)

    def _finish(self, output: Any) -> None:
        if output.finished:
            self._open.discard(output.request_id)
            self._finished[output.request_id] = output
            self._lock.notify_all()

    def _abort(self) -> None:
        """Aborts all requests. vLLM puts the outputs of aborted requests only into their queues, so each request gets one."""
        states = self._engine.output_processor.request_states
        for state in states.values():
            state.queue = _Collector(self._finish)
        self._engine.abort_request(list(states), internal=True)


class _Collector:
    def __init__(self, finish: Any) -> None:
        self.put = finish
