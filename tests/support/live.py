"""A live Megatron model with the weights of a checkpoint, on a rank of `run_ranks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel


def live(layout: ParallelLayout, directory: Path, **options: Any) -> tuple[AutoBridge, list[nn.Module]]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, **options)
    bridge.load_weights(model)
    return bridge, model


def raised(function: Callable[[], Any]) -> str:
    """The error that `function` raises, as `Type: message`."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
