"""The weight layer of RL post-training: Megatron-core, Hugging Face checkpoints and vLLM engines, both ways, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
    from mbridge_rl.megatron.runtime import megatron_runtime
    from mbridge_rl.sync.options import SyncOptions
    from mbridge_rl.sync.pull import restore_from_store
    from mbridge_rl.sync.refit import WeightSync
    from mbridge_rl.sync.report import SyncReport
    from mbridge_rl.sync.reshard import reshard
    from mbridge_rl.sync.store import WeightStore
    from mbridge_rl.sync.vllm.async_engine import AsyncEngine
    from mbridge_rl.sync.vllm.engine import InProcessEngine
    from mbridge_rl.sync.vllm.process import EngineProcess
    from mbridge_rl.sync.vllm.ray_actor import RayEngine
    from mbridge_rl.sync.vllm.server import ServerEngine

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

_HOMES = {
    "AsyncEngine": "mbridge_rl.sync.vllm.async_engine",
    "AutoBridge": "mbridge_rl.bridge",
    "EngineProcess": "mbridge_rl.sync.vllm.process",
    "InProcessEngine": "mbridge_rl.sync.vllm.engine",
    "ParallelLayout": "mbridge_rl.core.layout",
    "RayEngine": "mbridge_rl.sync.vllm.ray_actor",
    "ServerEngine": "mbridge_rl.sync.vllm.server",
    "SyncOptions": "mbridge_rl.sync.options",
    "SyncReport": "mbridge_rl.sync.report",
    "WeightStore": "mbridge_rl.sync.store",
    "WeightSync": "mbridge_rl.sync.refit",
    "destroy_parallel": "mbridge_rl.megatron.parallel",
    "initialize_parallel": "mbridge_rl.megatron.parallel",
    "megatron_runtime": "mbridge_rl.megatron.runtime",
    "reshard": "mbridge_rl.sync.reshard",
    "restore_from_store": "mbridge_rl.sync.pull",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for: `mbridge-rl --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mbridge_rl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
