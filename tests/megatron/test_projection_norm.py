"""Norms over all heads, dealt to tensor-parallel ranks: values and gradients are those of one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tolerance import assert_near, rounding
from torch import Tensor

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.projection_norm import _AllHeadsNorm

DIM, EPS = 6, 1e-5


def normalized(rank: int, ranks: int, x: Tensor, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """This rank's heads, their gradient, and the weight's."""
    initialize_parallel(ParallelLayout(tp=ranks))
    heads = x.shape[2]
    copies = max(1, ranks // heads)
    held = slice(rank * heads // ranks, rank * heads // ranks + max(1, heads // ranks))
    with megatron_runtime():
        config = SimpleNamespace(kv_channels=DIM, params_dtype=torch.float32, sequence_parallel=False)
        norm = _AllHeadsNorm(heads, config, EPS, torch.distributed.group.WORLD)
        norm.weight.data.copy_(weight)
        local = x[:, :, held].clone().requires_grad_()
        output = norm(local)
        (output * upstream[:, :, held] / copies).sum().backward()  # copies of a head share its gradient
    return [output.detach(), local.grad, norm.weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (1, 2), (2, 4)])
def test_values_and_gradients(heads: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 2, heads, DIM, generator=generator) for _ in range(2))
    weight = torch.randn(heads * DIM, generator=generator)
    full_input, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(full_input.flatten(2), (heads * DIM,), scale, EPS).view_as(x)
    (expected * upstream).sum().backward()
    parts = run_ranks(normalized, ranks, ranks, x, weight, upstream)
    gradient, tolerance = torch.zeros_like(x), rounding(heads * DIM, 3)  # the sum of squares, and back twice
    for rank, (output, local_gradient, _) in enumerate(parts):
        first = rank * heads // ranks
        assert_near(output, expected[:, :, first : first + output.shape[2]], tolerance)
        gradient[:, :, first : first + output.shape[2]] += local_gradient
    assert_near(gradient, full_input.grad, tolerance)
    assert_near(sum(weight_gradient for *_, weight_gradient in parts), scale.grad, tolerance)
