"""Quantized states and a loss for tests of syncs that carry changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from standin import SIZES
from tiny import tiny_config
from torch import Tensor

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.quantize import Fp8, quantize, quantized_spec, scale_names
from mbridge_rl.training.batch import Batch, TokenStatistics

SCHEME = Fp8((8, 8))


def quantized_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in fp8 as one process quantizes it, which has every tensor in full."""
    spec = quantized_spec(model_spec(tiny_config("qwen3", **SIZES)), SCHEME)
    scales = scale_names(spec, SCHEME)
    quantized = {}
    for name in spec.hf_shapes:
        if name in scales:
            quantized[name], quantized[scales[name]] = quantize(state[name], SCHEME)
        elif name not in quantized:
            quantized[name] = state[name]
    return quantized


def grpo(policy: TokenStatistics, micro: Batch) -> Tensor:
    """The clipped objective with advantages 1 and -1, at ratio 1."""
    advantages = torch.where(micro.tokens[:, :1] % 2 == 0, 1.0, -1.0)
    ratio = (policy.log_probs - policy.log_probs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
