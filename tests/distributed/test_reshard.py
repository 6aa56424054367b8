"""Resharding between real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live import live
from ranks import run_ranks
from tiny import hf_state, tiny_checkpoint

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.distributed.reshard import reshard
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
from mbridge_rl.megatron.parameters import live_side

PAIRS = [
    ("qwen2", ParallelLayout(tp=2, pp=2), ParallelLayout(tp=4)),
    ("llama3-tied", ParallelLayout(tp=2, pp=2, stage_layers=(1, 3)), ParallelLayout(pp=4)),
    ("qwen3-moe", ParallelLayout(tp=2, pp=2, vpp=2), ParallelLayout(tp=2, ep=4, etp=1, dp=2)),
    ("qwen3-moe-tied", ParallelLayout(tp=4, etp=2, ep=2), ParallelLayout(dp=2)),
]


def move(rank: int, directory: Path, source: ParallelLayout, target: ParallelLayout) -> dict[str, torch.Tensor]:
    bridge = AutoBridge.from_pretrained(directory)
    mine = bridge.shard(hf_state(directory), source).get(rank, {})
    return reshard(bridge.spec, mine, source, target, round_bytes=1 << 16)


@pytest.mark.parametrize(("variant", "first", "second"), PAIRS, ids=[f"{name}-{a}-to-{b}" for name, a, b in PAIRS])
def test_resharding_equals_sharding_anew(variant: str, first: ParallelLayout, second: ParallelLayout, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, variant)
    bridge = AutoBridge.from_pretrained(directory)
    for source, target in ((first, second), (second, first)):
        expected = bridge.shard(hf_state(directory), target)
        for rank, shards in enumerate(run_ranks(move, 4, directory, source, target)):
            assert shards.keys() == expected.get(rank, {}).keys()
            assert all(torch.equal(shards[name], expected[rank][name]) for name in shards)


def move_a_live_model(rank: int, directory: Path, source: ParallelLayout, target: ParallelLayout) -> list[str]:
    """Out of one model into another one of the same ranks, which is built when the first is gone."""
    bridge, model = live(source, directory)
    tensors, _ = live_side(model, bridge.spec, source, rank)
    moved = reshard(bridge.spec, tensors, source, target, round_bytes=1 << 16)
    destroy_parallel()
    initialize_parallel(target, rank=rank, world_size=4)
    model = bridge.build_model(target)
    tensors, _ = live_side(model, bridge.spec, target, rank)
    for name in tensors:
        tensors.stored(name).copy_(moved[name])
    return bridge.verify(model, directory)


def test_resharding_a_live_model(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    layouts = ParallelLayout(tp=2, pp=2, vpp=2), ParallelLayout(tp=2, ep=4, etp=1, dp=2)
    assert run_ranks(move_a_live_model, 4, directory, *layouts) == [[]] * 4


def move_wrongly(rank: int, directory: Path) -> tuple[str, str]:
    layout = ParallelLayout(tp=2)
    bridge = AutoBridge.from_pretrained(directory)
    mine = bridge.shard(hf_state(directory), layout)[rank]
    with pytest.raises(SyncError) as too_few:
        reshard(bridge.spec, mine, layout, ParallelLayout(tp=4))
    if rank == 1:
        del mine["output_layer.weight"]
    with pytest.raises(StateMismatchError) as lacking:
        reshard(bridge.spec, mine, layout, ParallelLayout(pp=2))
    return str(too_few.value), str(lacking.value)


def test_what_does_not_fit_is_refused_on_every_rank(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for too_few, lacking in run_ranks(move_wrongly, 2, directory):
        assert "found a group of 2" in too_few
        assert "rank 1 lacks output_layer.weight" in lacking
