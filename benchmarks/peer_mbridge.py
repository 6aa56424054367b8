"""mbridge 0.15.1 (pip) on a CPU, patched from the outside.

It asks for three things that are not there: Transformer Engine at import (`megatron_runtime` puts ours in place), a CUDA
device as `torch.cuda.current_device()` for its buffers (the CPU, while it runs), and `hf_config.rope_theta`, which
Transformers 5 moved into `rope_parameters`. Its own code is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mbridge_rl.megatron.cpu.runtime import megatron_runtime


def peer_bridge(hf_config: Any) -> Any:
    """mbridge's bridge for the parallel state that is running.

    Raises:
        ImportError: mbridge is not installed.
    """
    with megatron_runtime():
        try:
            import mbridge
        except ImportError as error:
            raise ImportError("the peer is not installed: pip install --no-deps -r benchmarks/requirements.txt") from error
        if not hasattr(hf_config, "rope_theta"):
            hf_config.rope_theta = hf_config.rope_parameters["rope_theta"]
        bridge = mbridge.AutoBridge.from_config(hf_config)
        bridge.set_extra_args(sequence_parallel=False, bias_activation_fusion=False, bias_dropout_fusion=False)
        return bridge


@contextmanager
def without_cuda() -> Iterator[None]:
    """While mbridge runs: its buffers are on the CPU. Lighter than `megatron_runtime`, which also looks at every torch call."""
    real = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")
    try:
        yield
    finally:
        torch.cuda.current_device = real
