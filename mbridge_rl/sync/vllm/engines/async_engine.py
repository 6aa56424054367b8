"""An engine for a trainer around a vLLM `AsyncLLM` that the user runs in this process."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from mbridge_rl.core.errors import EngineProcessError, SyncError, TransferTimeout
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.vllm.engines.attached import AttachedEngine
from mbridge_rl.sync.vllm.engines.completions import Completion, completion_of
from mbridge_rl.sync.vllm.lora.adaptable_engine import Served
from mbridge_rl.sync.vllm.versions import refused_while_paused

_RETRY_SECONDS = 0.05  # between attempts of a request that is refused while generation is paused
_LOOP_SECONDS = 10.0  # a running event loop calls a new callback within this time


class AsyncEngine(AttachedEngine):
    """Connects to an `AsyncLLM` that was started with `sync.vllm.extension.engine_args()`.

    Its methods block, and must not be called on the engine's event loop: `await asyncio.to_thread(sync.sync, version)`.

    Args:
        llm: the engine; the user's own requests may go on meanwhile.
        loop: the event loop of `llm`; by default the one that runs here.
        weight_version: the version of the weights that it was started with.
        call_timeout: seconds until a call must be answered.

    Raises:
        SyncError: the engine was started without those arguments, or is data parallel.
    """

    _first_slot_id = 1 << 20  # the owner's adapters have smaller numbers

    def __init__(
        self,
        llm: Any,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        weight_version: int = 0,
        call_timeout: float = 600.0,
    ) -> None:
        self._llm, self._call_timeout = llm, call_timeout
        self._loop = loop or asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._attach(weight_version)

    @classmethod
    async def connect(cls, llm: Any, *, weight_version: int = 0, call_timeout: float = 600.0) -> AsyncEngine:
        """Connects from a coroutine on the engine's own event loop."""
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(cls, llm, loop, weight_version=weight_version, call_timeout=call_timeout)

    def __str__(self) -> str:
        return "the AsyncLLM"

    def _completions(
        self, prompts: list[list[int]], fields: list[dict[str, Any]], adapters: Sequence[Served | None]
    ) -> list[Completion]:
        async def all_outputs() -> list[Any]:
            return await asyncio.gather(*map(self._answer, prompts, fields, adapters))

        version = self.weight_version
        return [
            completion_of(index, sample, version)
            for index, output in enumerate(self._run(all_outputs(), None))
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]

    async def _answer(self, prompt: list[int], fields: dict[str, Any], adapter: Served | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
        lora_request = adapter and adapter.request
        deadline = time.monotonic() + self._call_timeout
        while True:
            name, last_output = f"mbridge-{id(self):x}-{next(self._numbers)}", None
            try:
                outputs = self._llm.generate({"prompt_token_ids": prompt}, parameters, name, lora_request=lora_request)
                async for output in outputs:
                    last_output = output
                return last_output
            except refused_while_paused():
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    def _sizes(self) -> tuple[int, int]:
        parallel = self._llm.vllm_config.parallel_config
        return parallel.world_size, parallel.world_size_across_dp

    def _rpc(self, method: str, args: list[Any]) -> list[Any]:
        return self._run(self._llm.collective_rpc(method, args=tuple(args)), self._call_timeout)

    def _halt(self, requests: InFlight, timeout: float) -> None:
        async def paused() -> bool:
            try:
                await asyncio.wait_for(self._llm.pause_generation(mode=requests, clear_cache=True), timeout)
            except TimeoutError:
                await self._llm.resume_generation()
                return False
            return True

        if not self._run(paused(), timeout + self._call_timeout):
            raise TransferTimeout(f"requests did not finish within {timeout:g} s; use 'keep' or 'abort'")

    def _go_on(self) -> None:
        self._run(self._llm.resume_generation(), self._call_timeout)

    def _label(self) -> str:
        return self._run(self._llm.get_weight_version(), self._call_timeout)

    def _set_label(self, label: str) -> None:
        self._run(self._llm.update_weight_version(label), self._call_timeout)

    def _reset_caches(self) -> bool:
        return self._run(self._llm.reset_prefix_cache(reset_running_requests=True), self._call_timeout)

    def _run(self, call: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Runs a coroutine on the engine's event loop.

        Raises:
            EngineProcessError: the engine's process died, or did not answer in time. SyncError: its event loop does not run.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self._require_loop()
        except SyncError:
            call.close()
            raise
        running = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return running.result(timeout)
        except EngineDeadError as error:
            raise EngineProcessError(f"{self} died: {error}") from error
        except TimeoutError as error:
            running.cancel()
            raise EngineProcessError(f"{self} did not answer within {timeout:g} s") from error

    def _require_loop(self) -> None:
        called = threading.Event()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(called.set)
        if not called.wait(0.0 if self._loop.is_closed() else _LOOP_SECONDS):
            raise SyncError(
                f"the event loop of {self} is closed or blocked. A sync must not run on it: call `await "
                "asyncio.to_thread(sync.sync, version)`, or run the loop in a thread of its own"
            )
