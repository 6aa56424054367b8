"""The weight layer of RL post-training: Megatron-core, Hugging Face checkpoints and vLLM engines, both ways, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbridge_rl import moved

if TYPE_CHECKING:
    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.distributed.reshard import reshard
    from mbridge_rl.megatron.cpu.runtime import megatron_runtime
    from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
    from mbridge_rl.sync.options import SyncOptions
    from mbridge_rl.sync.pull import restore_from_store
    from mbridge_rl.sync.record.report import SyncReport
    from mbridge_rl.sync.store.weight_store import WeightStore
    from mbridge_rl.sync.vllm.engines.async_engine import AsyncEngine
    from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
    from mbridge_rl.sync.vllm.engines.process import EngineProcess
    from mbridge_rl.sync.vllm.engines.ray_actor import RayEngine
    from mbridge_rl.sync.vllm.engines.server import ServerEngine
    from mbridge_rl.sync.weight_sync import WeightSync

__all__ = [
    "AsyncEngine",
    "AutoBridge",
    "EngineProcess",
    "InProcessEngine",
    "ParallelLayout",
    "RayEngine",
    "ServerEngine",
    "SyncOptions",
    "SyncReport",
    "WeightStore",
    "WeightSync",
    "destroy_parallel",
    "initialize_parallel",
    "megatron_runtime",
    "reshard",
    "restore_from_store",
]

moved.install()

_HOMES = {
    "AsyncEngine": "mbridge_rl.sync.vllm.engines.async_engine",
    "AutoBridge": "mbridge_rl.bridge",
    "EngineProcess": "mbridge_rl.sync.vllm.engines.process",
    "InProcessEngine": "mbridge_rl.sync.vllm.engines.in_process",
    "ParallelLayout": "mbridge_rl.core.layout",
    "RayEngine": "mbridge_rl.sync.vllm.engines.ray_actor",
    "ServerEngine": "mbridge_rl.sync.vllm.engines.server",
    "SyncOptions": "mbridge_rl.sync.options",
    "SyncReport": "mbridge_rl.sync.record.report",
    "WeightStore": "mbridge_rl.sync.store.weight_store",
    "WeightSync": "mbridge_rl.sync.weight_sync",
    "destroy_parallel": "mbridge_rl.megatron.parallel",
    "initialize_parallel": "mbridge_rl.megatron.parallel",
    "megatron_runtime": "mbridge_rl.megatron.cpu.runtime",
    "reshard": "mbridge_rl.distributed.reshard",
    "restore_from_store": "mbridge_rl.sync.pull",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for: `mbridge-rl --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mbridge_rl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
