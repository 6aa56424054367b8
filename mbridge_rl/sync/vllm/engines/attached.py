"""Engines that somebody else started and owns. They are reached through the interface that vLLM offers to its clients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mbridge_rl.core.errors import MessageError, SyncError
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.messages import WorkerCall
from mbridge_rl.sync.vllm.engines.completions import Completion, as_version, sampling
from mbridge_rl.sync.vllm.engines.transactions import TransactionalEngine
from mbridge_rl.sync.vllm.extension import EXTENSION, METHOD
from mbridge_rl.sync.vllm.lora.adaptable_engine import Served
from mbridge_rl.sync.vllm.worker import calls as worker_calls

_UNLABELLED = "default"  # vLLM's label of weights that nobody gave a version


class AttachedEngine(TransactionalEngine):
    """What engines in this process and engines behind HTTP have in common.

    vLLM's engine core would die if a model refused to run. So if an update lost the version that was served, the engine stays
    paused instead: requests wait for the next complete sync, and `generate` raises an error that names the lost version.
    """

    def _attach(self, weight_version: int) -> None:
        """Connects to the engine.

        Raises:
            SyncError: its workers cannot be reached, or there are several engines behind the same front.
        """
        super().__init__()
        workers, all_workers = self._sizes()
        if workers != all_workers:
            raise SyncError(
                f"{self} is {all_workers // workers} data-parallel engines behind one front, of which only the first answers: "
                "start each one by itself, and give WeightSync all of them"
            )
        self._require_reachable()
        if self._label() == _UNLABELLED:
            self._set_label(str(weight_version))

    @property
    def weight_version(self) -> int:
        """The version that is served now, or was served last."""
        return as_version(self._label())

    def generate(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | Sequence[str | None] | None = None, **options: Any
    ) -> list[Completion]:
        """As `InProcessEngine.generate`.

        Raises:
            EngineUnusable: a sync failed half-way; the message names the version that was lost.
        """
        self.require_usable()
        adapters = self._adapters.for_prompts(adapter, len(prompts))
        fields = sampling(len(prompts), **options)
        completions = self._completions([list(prompt) for prompt in prompts], fields, adapters or [None] * len(prompts))
        if not adapters:
            return completions
        return [replace(completion, adapter=adapters[completion.prompt_index].label) for completion in completions]

    def close(self) -> None:
        """Disconnects from the engine, which goes on running."""

    def _call_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        return worker_calls.results_of(self._rpc(METHOD, [WorkerCall(call.__name__, args).to_json()]))

    def _require_reachable(self) -> None:
        try:
            self._call_workers(worker_calls.identity)
        except MessageError:  # they answer, but their mbridge_rl has another schema
            raise
        except Exception as error:
            raise SyncError(
                f"the workers of {self} do not answer to a trainer ({error}). Start it with the weight-transfer backend "
                "'mbridge' and the worker extension of mbridge_rl: `sync.vllm.extension.engine_args()` for AsyncEngineArgs, or "
                f'for `vllm serve` --weight-transfer-config \'{{"backend": "mbridge"}}\' --worker-extension-cls {EXTENSION}'
            ) from error

    def _forget(self) -> None:
        """Does nothing: the engine dropped keys and values when it paused."""

    def _hold(self, requests: InFlight, timeout: float) -> None:
        lost = requests == "wait" and self._refusal() is not None
        self._halt("keep" if lost else requests, timeout)  # after a loss requests wait for new weights and cannot finish

    def _resume(self) -> None:
        if self._refusal() is None:
            self._go_on()

    def _serve(self, version: int) -> None:
        self._set_label(str(version))
        if not self._reset_caches():
            raise SyncError(f"{self} could not drop its prefix cache")

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """The number of workers of one engine, and of all engines behind the same front."""

    @abstractmethod
    def _rpc(self, method: str, args: list[Any]) -> list[Any]:
        """Calls vLLM's `collective_rpc`."""

    @abstractmethod
    def _halt(self, requests: InFlight, timeout: float) -> None:
        """Pauses generation.

        Raises:
            TransferTimeout: requests did not finish in time; generation goes on.
        """

    @abstractmethod
    def _go_on(self) -> None: ...

    @abstractmethod
    def _label(self) -> str: ...

    @abstractmethod
    def _set_label(self, label: str) -> None: ...

    @abstractmethod
    def _reset_caches(self) -> bool:
        """Drops cached keys and values, also of requests in flight, which compute them anew; returns whether it succeeded."""

    @abstractmethod
    def _completions(
        self, prompts: list[list[int]], fields: list[dict[str, Any]], adapters: Sequence[Served | None]
    ) -> list[Completion]: ...
