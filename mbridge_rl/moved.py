"""Modules that lie elsewhere since version 0.2, under the names that they had in 0.1.

`import mbridge_rl.sync.refit` still works, warns, and gives the module that is now `mbridge_rl.sync.weight_sync`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "mbridge_rl.sync.arena": "mbridge_rl.distributed.arena",
    "mbridge_rl.sync.errors": "mbridge_rl.core.errors",
    "mbridge_rl.sync.group": "mbridge_rl.distributed.group",
    "mbridge_rl.sync.refit": "mbridge_rl.sync.weight_sync",
    "mbridge_rl.sync.report": "mbridge_rl.sync.record.report",
    "mbridge_rl.sync.sinks": "mbridge_rl.sync.record.sinks",
    "mbridge_rl.sync.vllm.adapters": "mbridge_rl.sync.vllm.lora.adaptable_engine",
    "mbridge_rl.sync.vllm.async_engine": "mbridge_rl.sync.vllm.engines.async_engine",
    "mbridge_rl.sync.vllm.engine": "mbridge_rl.sync.vllm.engines.in_process",
    "mbridge_rl.sync.vllm.process": "mbridge_rl.sync.vllm.engines.process",
    "mbridge_rl.sync.vllm.server": "mbridge_rl.sync.vllm.engines.server",
    "mbridge_rl.sync.vllm.worker_calls": "mbridge_rl.sync.vllm.worker.calls",
    "mbridge_rl.training.config": "mbridge_rl.training.run.config",
    "mbridge_rl.training.episodes": "mbridge_rl.training.rollout.episodes",
    "mbridge_rl.training.generator": "mbridge_rl.training.rollout.generator",
    "mbridge_rl.training.guessing": "mbridge_rl.training.rollout.guessing",
    "mbridge_rl.training.launcher": "mbridge_rl.training.run.launcher",
    "mbridge_rl.training.lora": "mbridge_rl.megatron.lora.attach",
    "mbridge_rl.training.rewards": "mbridge_rl.training.rollout.rewards",
    "mbridge_rl.training.run_log": "mbridge_rl.training.run.run_log",
}
"""The present name of each module, by the name that version 0.1 documented or pickled into checkpoints."""


class _OldNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new_name = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new_name} since mbridge_rl 0.2: import that", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new_name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module ran under its present name; importing it under the old one must leave it as it was."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Makes the old names importable in this process."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
