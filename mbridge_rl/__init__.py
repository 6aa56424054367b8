"""The weight layer of RL post-training: Megatron-core, Hugging Face checkpoints and vLLM engines, both ways, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.megatron.runtime import megatron_runtime
    from mbridge_rl.sync.refit import WeightSync

__all__ = ["AutoBridge", "ParallelLayout", "WeightSync", "megatron_runtime"]

_HOMES = {
    "AutoBridge": "mbridge_rl.bridge",
    "ParallelLayout": "mbridge_rl.core.layout",
    "WeightSync": "mbridge_rl.sync.refit",
    "megatron_runtime": "mbridge_rl.megatron.runtime",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for: `mbridge-rl --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mbridge_rl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
