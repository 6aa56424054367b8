"""The parallel state of a model: one that others made is understood, and one rank needs no launcher."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from ranks import run_ranks

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.parallel import current_layout, destroy_parallel, initialize_parallel


def _foreign_parallel_state(rank: int, order: str) -> ParallelLayout:
    """Somebody else, such as an RL framework, initialised Megatron."""
    with megatron_runtime():
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, pipeline_model_parallel_size=2, order=order)
    return current_layout(stage_layers=(1, 3))


def test_layout_of_a_parallel_state_that_others_made() -> None:
    for order in ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"):
        layouts = run_ranks(_foreign_parallel_state, 4, order)
        assert layouts == [ParallelLayout(pp=2, dp=2, order=order, stage_layers=(1, 3))] * 4


def _alone(rank: int) -> tuple[int, bool]:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    with pytest.raises(LayoutError, match="torchrun"):
        initialize_parallel(ParallelLayout(tp=2))
    initialize_parallel(ParallelLayout())
    size = dist.get_world_size()
    destroy_parallel()
    destroy_parallel()
    return size, dist.is_initialized()


def test_one_rank_needs_no_launcher() -> None:
    assert run_ranks(_alone, 1) == [(1, False)]
