"""Engines in Ray actors, on any node; they are addressed by the handles of their actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.errors import BridgeError, EngineProcessError, missing_extra
from mbridge_rl.sync.payload.message_codec import decode, encode
from mbridge_rl.sync.vllm.engines.completions import Completion
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.engines.process import PROOF_OF_LIFE
from mbridge_rl.sync.vllm.worker.calls import shared_memory_files

CALLS_AT_ONCE = 8  # more than one, because a commit comes while requests are in flight


class EngineActor:
    """Runs an in-process engine in an actor, which works on Ray without a GPU, too.

    A user's own actor class derives from it: `ray.remote(max_concurrency=CALLS_AT_ONCE)(MyActor)`.
    """

    def __init__(self, model_dir: str, threads: int | None = None, settings: Mapping[str, Any] | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        earlier_files = set(shared_memory_files(None))  # Ray may have run tasks in this process before
        self.engine = InProcessEngine(model_dir, **(settings or {}))
        # Ray ends actors by SIGKILL, and nobody could clean up on another node. All workers have mapped their shared memory by
        # now, so its files can be unlinked; memory without a file is freed when the last process ends, however it ends.
        for path in set(self.engine.shared_memory_files()) - earlier_files:
            Path(path).unlink(missing_ok=True)

    def pid(self) -> int:
        return os.getpid()

    def call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        member = getattr(self.engine, method)
        return encode(member(*decode(list(args)), **decode(options)) if callable(member) else member)


class RayEngine:
    """An engine in a Ray actor, with the interface of an engine, as `EngineProcess` is one in a child process.

    Args:
        actor: handle of an `EngineActor`, such as `ray.get_actor(name)`; its owner keeps it until `close`.
        start_timeout: seconds until the engine must be up.
        call_timeout: seconds until a call must be answered; after a call that was not, at most five until one is.

    Raises (every method):
        EngineProcessError: the actor died, cannot be reached, or did not answer in time; otherwise what the engine raised.
    """

    def __init__(self, actor: Any, *, start_timeout: float = 300.0, call_timeout: float = 600.0) -> None:
        self._actor, self._call_timeout, self._first_timeout = actor, call_timeout, start_timeout + call_timeout
        self._silent = False

    @classmethod
    def start(
        cls,
        model_dir: str | Path,
        *,
        threads: int | None = None,
        ray_options: Mapping[str, Any] | None = None,
        start_timeout: float = 300.0,
        call_timeout: float = 600.0,
        **engine_args: Any,
    ) -> RayEngine:
        """Starts an actor, and returns before its engine is up.

        Args:
            model_dir: the checkpoint.
            threads: torch threads of the actor; `None` leaves the default.
            ray_options: arguments of Ray's `options`: `num_cpus`, `num_gpus`, `name`, `scheduling_strategy`, ...
            start_timeout: seconds until the engine must be up.
            call_timeout: seconds until a call must be answered.
            engine_args: arguments of `InProcessEngine`.
        """
        options = {"max_concurrency": CALLS_AT_ONCE, **(ray_options or {})}
        actor = (
            import_ray().remote(EngineActor).options(**options).remote(str(Path(model_dir).absolute()), threads, engine_args)
        )
        return cls(actor, start_timeout=start_timeout, call_timeout=call_timeout)

    @property
    def weight_version(self) -> int:
        return self._call("weight_version")

    @property
    def pid(self) -> int:
        """The pid of the actor's process."""
        return import_ray().get(self._actor.pid.remote(), timeout=self._first_timeout)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        return self._call("generate", [list(prompt) for prompt in prompts], **options)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """The calls of a weight sync (`sync.trainer.engines.Engine`), which are sent as encoded messages."""
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    def close(self) -> None:
        """Ends the actor's process."""
        import_ray().kill(self._actor)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        ray, timeout = import_ray(), min(PROOF_OF_LIFE, self._first_timeout) if self._silent else self._first_timeout
        try:
            result = ray.get(self._actor.call.remote(method, encode(args), encode(options)), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            self._silent = True
            raise EngineProcessError(f"the engine actor did not answer {method} within {timeout:g} s") from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, BridgeError) else error from None
        except ray.exceptions.RayError as error:  # the actor died, or cannot be reached
            raise EngineProcessError(f"the engine actor was lost during {method}: {error}") from error
        self._first_timeout, self._silent = self._call_timeout, False
        return decode(result)


def import_ray() -> Any:
    """Imports Ray.

    Raises:
        ImportError: Ray is not installed; the message names the extra.
    """
    try:
        import ray
        import ray.exceptions
        import ray.util
    except ImportError as error:
        raise missing_extra("engines and trainer ranks on Ray need it", "ray") from error
    return ray
