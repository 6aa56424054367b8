"""The schedule of a stream: pure arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View, compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.schedule import clipped, schedule

MOE = ParallelLayout(tp=2, pp=2, ep=2, etp=1)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_clipping_cuts_a_rectangle_into_its_elements_of_a_range(data: st.DataObject) -> None:
    """Clipping gives every element of the range once, at its position in the rectangle, and none outside of the range."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    shape = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(sizes, starts, strict=True))
    order = data.draw(st.permutations(range(len(sizes))))
    full_tensor = torch.arange(torch.Size(sizes).numel()).view(sizes)
    box = full_tensor[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))].permute(order)
    target = View("hf", box.storage_offset(), tuple(box.stride()))
    packed = torch.arange(box.numel()).view(box.shape)
    first = data.draw(st.integers(0, full_tensor.numel()))
    last = data.draw(st.integers(first, full_tensor.numel()))
    clipped_elements: dict[int, int] = {}
    for part, source, clip in clipped(tuple(box.shape), View("local", 0, tuple(packed.stride())), target, first, last):
        pairs = zip(clip.of(full_tensor, part).flatten().tolist(), source.of(packed, part).flatten().tolist(), strict=True)
        for element, position in pairs:
            assert element not in clipped_elements
            clipped_elements[element] = position
    elements = dict(zip(box.flatten().tolist(), packed.flatten().tolist(), strict=True))
    assert clipped_elements == {element: position for element, position in elements.items() if first <= element < last}


@pytest.mark.parametrize("bucket_bytes", [100, 1000, 1 << 14, 1 << 22])
def test_schedules_are_bounded_and_complete(bucket_bytes: int) -> None:
    """Buckets smaller than a row (128 bytes and more), than a tensor, and larger than all of them."""
    spec = AutoBridge.from_config(tiny_config("qwen3-moe", vocab_size=67, num_hidden_layers=2, num_experts=4)).spec
    plan = compile_plan(spec, megatron_side(spec, MOE), hf_side(spec))
    tensors = [HFTensor(hf_name, torch.bfloat16, shape) for hf_name, shape in spec.hf_shapes.items()]
    buckets = schedule(tensors, plan.by_hf_name, bucket_bytes)
    covered = dict.fromkeys(spec.hf_shapes, 0)
    for bucket in buckets:
        pieces = [piece for span in bucket.spans for piece in span.pieces]
        assert bucket.nbytes <= bucket_bytes + 63
        assert sum(bucket.packed_nbytes.values()) <= bucket_bytes + 64 * len(pieces)
        for span in bucket.spans:
            assert span.first == covered[span.tensor.hf_name]
            assert sum(piece.numel for piece in span.pieces) == span.last - span.first
            covered[span.tensor.hf_name] = span.last
    assert covered == {tensor.hf_name: torch.Size(tensor.shape).numel() for tensor in tensors}
    total = sum(tensor.nbytes for tensor in tensors)
    assert len(buckets) <= 2 * total / bucket_bytes + 2 + sum(tensor.nbytes > bucket_bytes for tensor in tensors)
