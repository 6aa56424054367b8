"""Streams of HF tensors out of live Megatron models, on real processes: what arrives, and at what cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live import live
from ranks import run_ranks
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.stream import TensorStream
from mbridge_rl.megatron.parameters import live_side

TRANSPORTS = ("shared_memory", "collective")
MOE = ParallelLayout(tp=2, pp=2, ep=2, etp=1)


def export_all_ways(rank: int, directory: Path, layout: ParallelLayout, bucket_bytes: int) -> dict[str, dict[str, Tensor]]:
    bridge, model = live(layout, directory)
    exported = {}
    for transport in TRANSPORTS:
        for ranks in (None, [0], [1, 3]):
            stream = bridge.export_weights(model, bucket_bytes=bucket_bytes, transport=transport, ranks=ranks)
            exported[f"{transport} to {ranks}"] = dict(stream)
    return exported


@pytest.mark.parametrize("bucket_bytes", [5000, 1 << 16, 1 << 20])
def test_whole_tensors_reach_the_ranks_that_asked_and_no_others(bucket_bytes: int, tmp_path: Path) -> None:
    """Buckets that cut most tensors, few, and none; order is the checkpoint's."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe", num_experts=4)
    order = list(AutoBridge.from_pretrained(directory).spec.hf_shapes)
    expected = hf_state(directory)
    for rank, exported in enumerate(run_ranks(export_all_ways, 4, directory, MOE, bucket_bytes)):
        for way, state in exported.items():
            if way.endswith("None") or str(rank) in way:
                assert list(state) == order, way
                assert_same_state(state, expected)
            else:
                assert state == {}, way


def export_again_at_once(rank: int, directory: Path, transport: str) -> dict[str, Tensor]:
    """Rank 0 changes its weights and begins the next run while rank 1 still reads the one bucket of the first."""
    layout = ParallelLayout(tp=2)
    bridge, model = live(layout, directory)
    parameters, _ = live_side(model, bridge.spec, layout, rank)
    plan = compile_plan(bridge.spec, megatron_side(bridge.spec, layout), hf_side(bridge.spec))
    dtypes = dict.fromkeys(plan.hf_shapes, torch.float32)
    stream = TensorStream(plan, dtypes, RankGroup(), bucket_bytes=1 << 24, transport=transport)
    run = stream.run(parameters)
    first = dict([next(run)])
    if rank == 1:
        time.sleep(1.0)
    first |= dict(run)
    for parameter in model[0].parameters():
        parameter.data.zero_()
    again = dict(stream.run(parameters))
    assert not any(tensor.any() for tensor in again.values())
    stream.close()
    return first


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_next_export_waits_for_ranks_that_still_read(transport: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for state in run_ranks(export_again_at_once, 2, directory, transport):
        assert_same_state(state, hf_state(directory))


def export_and_keep(rank: int, directory: Path) -> bool:
    bridge, model = live(ParallelLayout(tp=2), directory)
    exported = list(bridge.export_weights(model, bucket_bytes=1 << 13))
    copies = [(name, tensor.clone()) for name, tensor in exported]
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    zeros = dict(bridge.export_weights(model, bucket_bytes=1 << 13))
    assert not any(tensor.any() for tensor in zeros.values())
    return all(torch.equal(tensor, copy) for (_, tensor), (_, copy) in zip(exported, copies, strict=True))


def test_tensors_are_the_consumers_to_keep(tmp_path: Path) -> None:
    """Later buckets and later exports leave them alone; later exports see the weights of then."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    assert run_ranks(export_and_keep, 2, directory) == [True, True]


def count_collectives(rank: int, directory: Path, transport: str, bucket_bytes: int) -> tuple[dict[str, int], int]:
    bridge, model = live(ParallelLayout(tp=2, pp=2), directory)
    stream = {"transport": transport, "bucket_bytes": bucket_bytes}
    nbytes = sum(tensor.nbytes for _, tensor in bridge.export_weights(model, **stream))
    counts: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)

        return call

    for name in ("all_gather_object", "all_reduce", "broadcast", "all_gather", "barrier", "scatter", "broadcast_object_list"):
        setattr(dist, name, counted(name))
    for _ in bridge.export_weights(model, **stream):
        pass
    return counts, nbytes


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket_bytes", [1 << 16, 1 << 18])
def test_collectives_grow_with_bytes_and_objects_travel_once(transport: str, bucket_bytes: int, tmp_path: Path) -> None:
    """At most 2 x (contributing ranks + 1 flag) per bucket's worth of bytes, and then only bytes and flags."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for counts, nbytes in run_ranks(count_collectives, 4, directory, transport, bucket_bytes):
        assert set(counts) <= {"all_reduce", "broadcast"}
        parts = 2 if transport == "collective" else 1
        per_bucket = 2 * parts * (1 + (4 if transport == "collective" else 0))
        assert sum(counts.values()) <= per_bucket * (nbytes / bucket_bytes + 1)
        assert counts.get("broadcast", 0) > 0 or transport == "shared_memory"
        assert counts["all_reduce"] >= nbytes // bucket_bytes


def resident(field: str) -> int:
    """Bytes of memory of this process, by the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def peak_of_export(rank: int, directory: Path, transport: str, bucket_bytes: int) -> tuple[int, int]:
    """Growth of resident memory during an export, and bytes of the largest tensor."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, largest = resident("VmRSS"), 0
    for _, tensor in bridge.export_weights(model, transport=transport, bucket_bytes=bucket_bytes):
        largest = max(largest, tensor.nbytes)
        del tensor
    return resident("VmHWM") - before, largest


# What Python, gloo and malloc take on the way, whatever the model: 3 to 9 MB here.
SLACK = 16 << 20


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("vocab_size", "layers"), [(70_000, 2), (260_000, 2), (70_000, 40)])
def test_memory_is_two_buckets_and_the_tensor(transport: str, vocab_size: int, layers: int, tmp_path: Path) -> None:
    """Neither a tensor of many buckets nor a model of many tensors makes a difference.

    The largest tensors are above 32 MiB, which malloc returns to the kernel; of smaller ones it keeps some.
    """
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 1536}
    directory, _ = tiny_checkpoint(tmp_path, "llama", **sizes)
    bucket_bytes = 4 << 20
    for grown, largest in run_ranks(peak_of_export, 2, directory, transport, bucket_bytes):
        assert largest == vocab_size * 128 * 4
        assert grown <= 2 * bucket_bytes + largest + SLACK
