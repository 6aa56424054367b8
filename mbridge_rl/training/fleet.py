"""All engines of a run, and the weight syncs that serve them. A lost engine is replaced and gets the weights it missed.

Made and called by all ranks together; the engines themselves belong to rank 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from mbridge_rl.core.errors import EngineProcessError, SyncError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.adapter_sync import AdapterSync
from mbridge_rl.sync.record.sinks import Sink
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.sync.weight_sync import SyncOptions, SyncReport, WeightSync

_log = logging.getLogger(__name__)

_PER_PROMPT = ("max_tokens", "seed")


class ServedEngine(Protocol):
    """An engine outside of this process: `EngineProcess`, `ray_actor.RayEngine`. Lost, it raises `EngineProcessError`."""

    @property
    def weight_version(self) -> int: ...
    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]: ...
    def close(self) -> None: ...


class EngineFleet:
    """Engines, from their start to their end.

    Args:
        make: starts engine number `index` on the run's first checkpoint, and returns before it is up; called on rank 0 only.
        count: of engines.
        restarts: how many lost engines are replaced before a loss is an error.
    """

    def __init__(self, make: Callable[[int], ServedEngine], count: int, *, restarts: int = 0) -> None:
        self._make, self._restarts, self._group = make, restarts, RankGroup()
        self.lost, self._started = 0, False
        self._engines: list[ServedEngine] = []
        self._sync: WeightSync | AdapterSync | None = None
        self._refusing: set[int] = set()
        self._asked: dict[str, str] = {}  # of every call
        self._count = count
        self._calls = ThreadPoolExecutor(max_workers=count, thread_name_prefix="engine")

    def start(self) -> None:
        """Starts the engines, unless that was done; returns before they are up."""
        if not self._started:
            self._started = True
            self._group.first_rank_does(lambda: self._engines.extend(map(self._make, range(self._count))))

    def connect(
        self,
        bridge: Any,
        model: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None,
        options: SyncOptions,
        sinks: Sequence[Sink] = (),
        adapter: str | None = None,
    ) -> None:
        """Prepares every engine for the weights of `model`; `sinks` hear of every sync.

        Args:
            adapter: only the model's adapters travel, under this name; engines were started on its base weights, with LoRA.
        """

        def connected() -> WeightSync | AdapterSync:
            engines = self._engines or None
            if adapter is None:
                return WeightSync(bridge, model, engines, dtype=dtype, options=options, sinks=sinks)
            return AdapterSync(bridge, model, engines, adapter, is_policy=True, options=options, sinks=sinks)

        self.start()
        self._connected = connected
        self._asked = {} if adapter is None else {"adapter": adapter}
        self._sync = connected()

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Deals the prompts to the engines, as evenly as can be; those that failed the last commit get none. Rank 0 only.

        Raises:
            EngineProcessError: an engine was lost.
        """
        engines = [engine for index, engine in enumerate(self._engines) if index not in self._refusing]
        each = max(1, -(-len(prompts) // len(engines)))
        parts = [slice(start, start + each) for start in range(0, len(prompts), each)]

        def ask(engine: ServedEngine, part: slice) -> list[Completion]:
            own = {name: value[part] for name, value in options.items() if name in _PER_PROMPT and isinstance(value, list)}
            found = engine.generate(prompts[part], **options | own | self._asked)
            return [replace(completion, prompt_index=part.start + completion.prompt_index) for completion in found]

        asked = [self._calls.submit(ask, engine, part) for engine, part in zip(engines, parts, strict=False)]
        return [completion for future in asked for completion in future.result()]

    def sync(self, version: int) -> SyncReport:
        """Every engine gets the trainer's weights as `version`; one that is lost meanwhile is replaced. One that lives but
        fails to commit rests until the next sync."""
        assert self._sync is not None
        try:
            report = self._sync.sync(version)
        except SyncError as error:
            return self.replace_lost(version, error)
        if not report.failed:
            return self._noted(report)
        failure = EngineProcessError(f"engines failed at the commit of version {version}: {report.failed}")
        return self._replaced(version, failure) or self._noted(report)

    def replace_lost(self, version: int, error: Exception) -> SyncReport:
        """Starts lost engines anew, and gives all the present weights as `version`.

        Raises:
            Exception: `error`, where no engine is lost; EngineProcessError: too many were.
        """
        report = self._replaced(version, error)
        if report is None:
            raise error
        return report

    def close(self) -> None:
        """Ends engines and frees what the syncs hold. Idempotent."""
        if self._sync is not None:
            self._sync.close()
        for engine in self._engines:
            engine.close()
        self._calls.shutdown()
        self._sync, self._engines = None, []

    def _replaced(self, version: int, error: Exception) -> SyncReport | None:
        """The sync with new engines in the place of lost ones; `None` if none is lost."""
        lost = self._group.on_first_rank(lambda: self._restart_lost(error))
        if not lost:
            return None
        self.lost += len(lost)
        if self._sync is not None:
            self._sync.close()
        self._sync = self._connected()
        return self._noted(self._sync.sync(version))

    def _noted(self, report: SyncReport) -> SyncReport:
        self._refusing = set(report.failed)
        return report

    def _restart_lost(self, error: Exception) -> list[int]:
        lost = [index for index, engine in enumerate(self._engines) if not _is_alive(engine)]
        if self.lost + len(lost) > self._restarts:
            raise EngineProcessError(
                f"{self.lost + len(lost)} engines were lost in this run (now {lost}) and engine.restarts={self._restarts} are "
                f"allowed: {error}"
            ) from error
        for index in lost:
            _log.warning("engine %d was lost and is started anew: %s", index, error)
            self._engines[index].close()
            self._engines[index] = self._make(index)
        return lost


def _is_alive(engine: ServedEngine) -> bool:
    try:
        return engine.weight_version >= 0
    except EngineProcessError:
        return False
