"""All engines of a run, and the weight syncs that serve them. A lost engine is replaced, and the new one gets the present
weights.

All ranks make the fleet and call its methods together; the engines themselves belong to rank 0.
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
    """An engine outside of this process: `EngineProcess`, `ray_actor.RayEngine`. A lost engine raises `EngineProcessError`."""

    @property
    def weight_version(self) -> int: ...
    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]: ...
    def close(self) -> None: ...


class EngineFleet:
    """Starts the engines of a run, keeps them supplied with weights, and ends them.

    Args:
        make: starts engine number `index` on the run's first checkpoint, and returns before it is up; called on rank 0 only.
        count: the number of engines.
        restarts: how many lost engines are replaced before a loss is an error.
    """

    def __init__(self, make: Callable[[int], ServedEngine], count: int, *, restarts: int = 0) -> None:
        self._make, self._restarts, self._group = make, restarts, RankGroup()
        self.lost, self._started = 0, False
        self._engines: list[ServedEngine] = []
        self._sync: WeightSync | AdapterSync | None = None
        self._refusing: set[int] = set()
        self._adapter_options: dict[str, str] = {}  # options of every `generate` call
        self._count = count
        self._calls = ThreadPoolExecutor(max_workers=count, thread_name_prefix="engine")

    def start(self) -> None:
        """Starts the engines, unless they were started before; returns before they are up."""
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
        """Prepares every engine for the weights of `model`; `sinks` receive the record of every sync.

        Args:
            adapter: the name under which only the model's adapters are sent to the engines, which must have been started on the
                base weights and with LoRA; `None` sends all weights.
        """

        def make_sync() -> WeightSync | AdapterSync:
            engines = self._engines or None
            if adapter is None:
                return WeightSync(bridge, model, engines, dtype=dtype, options=options, sinks=sinks)
            return AdapterSync(bridge, model, engines, adapter, is_policy=True, options=options, sinks=sinks)

        self.start()
        self._make_sync = make_sync
        self._adapter_options = {} if adapter is None else {"adapter": adapter}
        self._sync = make_sync()

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Divides the prompts evenly among the engines; engines that failed the last commit get none. Rank 0 only.

        Raises:
            EngineProcessError: an engine was lost.
        """
        engines = [engine for index, engine in enumerate(self._engines) if index not in self._refusing]
        per_engine = max(1, -(-len(prompts) // len(engines)))
        parts = [slice(start, start + per_engine) for start in range(0, len(prompts), per_engine)]

        def generate_part(engine: ServedEngine, part: slice) -> list[Completion]:
            of_part = {name: value[part] for name, value in options.items() if name in _PER_PROMPT and isinstance(value, list)}
            completions = engine.generate(prompts[part], **options | of_part | self._adapter_options)
            return [replace(completion, prompt_index=part.start + completion.prompt_index) for completion in completions]

        futures = [self._calls.submit(generate_part, engine, part) for engine, part in zip(engines, parts, strict=False)]
        return [completion for future in futures for completion in future.result()]

    def sync(self, version: int) -> SyncReport:
        """Sends the trainer's weights to every engine as `version`. An engine that is lost meanwhile is replaced; one that
        lives but fails to commit gets no prompts until the next sync."""
        assert self._sync is not None
        try:
            report = self._sync.sync(version)
        except SyncError as error:
            return self.replace_lost(version, error)
        if not report.failed:
            return self._remember_failed(report)
        failure = EngineProcessError(f"engines failed at the commit of version {version}: {report.failed}")
        return self._sync_replacements(version, failure) or self._remember_failed(report)

    def replace_lost(self, version: int, error: Exception) -> SyncReport:
        """Starts new engines in the place of lost ones, and sends all engines the present weights as `version`.

        Raises:
            Exception: `error` itself, where no engine is lost.
            EngineProcessError: more engines were lost than `restarts` allows.
        """
        report = self._sync_replacements(version, error)
        if report is None:
            raise error
        return report

    def close(self) -> None:
        """Ends the engines and frees the memory of the syncs. A second call does nothing."""
        if self._sync is not None:
            self._sync.close()
        for engine in self._engines:
            engine.close()
        self._calls.shutdown()
        self._sync, self._engines = None, []

    def _sync_replacements(self, version: int, error: Exception) -> SyncReport | None:
        """Replaces lost engines and syncs all; returns that sync's report, or `None` if no engine is lost."""
        lost = self._group.on_first_rank(lambda: self._restart_lost(error))
        if not lost:
            return None
        self.lost += len(lost)
        if self._sync is not None:
            self._sync.close()
        self._sync = self._make_sync()
        return self._remember_failed(self._sync.sync(version))

    def _remember_failed(self, report: SyncReport) -> SyncReport:
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
