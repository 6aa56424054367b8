"""Streams of HF tensors into live Megatron models, on real processes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from live import live, raised
from ranks import run_ranks
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel

MOE = ParallelLayout(tp=2, pp=2, ep=2, etp=1)


def import_in_any_order(rank: int, directory: Path, in_place: bool) -> dict[str, Tensor]:
    initialize_parallel(MOE)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(MOE)
    tensors = list(hf_state(directory).items())
    random.Random(rank).shuffle(tensors)
    strided = ((name, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor) for name, tensor in tensors)
    bridge.import_weights(model, strided, in_place=in_place)
    return dict(bridge.export_weights(model))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("variant", ["qwen3-moe", "qwen3-moe-tied"])
def test_import_takes_any_order(variant: str, in_place: bool, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, variant)
    for exported in run_ranks(import_in_any_order, 4, directory, in_place):
        assert_same_state(exported, hf_state(directory))


def export_into_another_model(rank: int, directory: Path) -> dict[str, Tensor]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    twin = bridge.build_model()
    bridge.load_weights(twin, bridge.export_weights(model, bucket_bytes=1 << 14))
    return dict(bridge.export_weights(twin))


def test_an_export_feeds_an_import(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3")
    for exported in run_ranks(export_into_another_model, 2, directory):
        assert_same_state(exported, hf_state(directory))


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]], str]] = {
    "early end": (lambda stream: stream[:-1], r"the stream ended after 38 of 39 tensors: missing "),
    "repeated": (lambda stream: [*stream[:5], stream[2], *stream[5:]], r"the stream holds .* twice"),
    "unknown": (lambda stream: [*stream[:5], ("lm_hat.weight", stream[0][1])], "the stream holds lm_hat.weight, which "),
    "shape": (lambda stream: [(n, t[1:] if n == Q else t) for n, t in stream], rf"{Q} has shape \[63, 64\], the config says"),
    "dtype": (lambda stream: [(n, t.int() if n == Q else t) for n, t in stream], rf"{Q} is torch.int32"),
}


def import_faulty(rank: int, directory: Path, name: str, in_place: bool) -> tuple[str, bool]:
    """Rank 1's stream has the fault, rank 0's has none."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    stream = [(name, tensor + 1) for name, tensor in hf_state(directory).items()]
    if rank == 1:
        stream = FAULTS[name][0](stream)
    error = raised(lambda: bridge.import_weights(model, iter(stream), in_place=in_place))
    after = [parameter for chunk in model for parameter in chunk.parameters()]
    return error, all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_stream_changes_no_rank(name: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_faulty, 2, directory, name, False)
    for error, untouched in (first, second):
        assert error.startswith(StateMismatchError.__name__)
        assert re.search(FAULTS[name][1], error)
        assert untouched
    assert "rank 1 failed: StateMismatchError" in first[0]


def test_an_import_in_place_says_that_it_leaves_a_mixture(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_faulty, 2, directory, "early end", True)
    assert "The import was in place: 38 of 39 tensors are the stream's, the others are what they were" in second[0]
    assert "rank 1 failed" in first[0]
    assert not first[1]
    assert not second[1]


def import_a_broken_export(rank: int, directory: Path) -> tuple[str, bool]:
    """A stream that all ranks feed together; rank 1 takes a tensor of it for another's."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    twin = bridge.build_model()
    before = [parameter.detach().clone() for chunk in twin for parameter in chunk.parameters()]

    def confused() -> Iterator[tuple[str, Tensor]]:
        stream = bridge.export_weights(model, bucket_bytes=1 << 14)
        try:
            for index, (name, tensor) in enumerate(stream):
                yield (Q if rank == 1 and index == 3 else name), tensor
        finally:
            stream.close()

    error = raised(lambda: bridge.import_weights(twin, confused()))
    return error, all(map(torch.equal, before, (parameter for chunk in twin for parameter in chunk.parameters())))


def test_a_fault_in_a_common_stream_reaches_all(tmp_path: Path) -> None:
    """Rank 0 waits inside the export that rank 1 has left: it hears of it there, not by a time-out, and raises why it left."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_a_broken_export, 2, directory, timeout=60)
    assert "has shape" in second[0]
    assert "rank 1 failed" in first[0]
    assert "has shape" in first[0]
    assert first[1]
    assert second[1]
