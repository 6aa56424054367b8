"""An engine as a side of a plan: landings as boxes, random pairs of layouts, and engines that do not fit."""

from __future__ import annotations

import pytest
import torch
from fused_engine import EngineLayout, FusedWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_pairs import run_pairs
from tiny import tiny_config

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.engine_side import boxes_of, engine_side, kept_bytes
from mbridge_rl.sync.payload.landing import Landing, ShapedView
from mbridge_rl.sync.payload.messages import WorkerDescription


def test_random_pairs_of_layouts_are_bit_exact() -> None:
    """`python tests/support/layout_pairs.py 10000` runs the other ones."""
    assert run_pairs(120) > 100


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], ShapedView]:
    """A strided view of a row-major tensor of a factored shape, with no regard to that shape."""
    grid = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    total = torch.Size(grid).numel()
    shape, strides, reach = [], [], draw(st.integers(0, total - 1))
    offset = reach
    for _ in range(draw(st.integers(0, 3))):
        stride = draw(st.integers(0, max(1, total // 2)))
        size = draw(st.integers(1, 6))
        while reach + (size - 1) * stride >= total:
            size -= 1
        shape.append(size)
        strides.append(stride)
        reach += (size - 1) * stride
    return grid, ShapedView(offset, tuple(shape), tuple(strides))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(views())
def test_boxes_of_any_view_are_the_view(case: tuple[tuple[int, ...], ShapedView]) -> None:
    grid, source = case
    tensor = torch.arange(torch.Size(grid).numel())
    target = ShapedView(0, source.shape, contiguous_strides(source.shape))
    filled = torch.full((max(1, torch.Size(source.shape).numel()),), -1)
    for box, offset, strides in boxes_of(Landing("hf", "local", source, target), grid):
        values = tensor.view(grid)[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))]
        filled.as_strided(box.size, strides, offset).copy_(values)
    assert torch.equal(filled.view(source.shape) if source.shape else filled[0], source.of(tensor).clone())


def described(variant: str = "qwen3", layout: EngineLayout | None = None) -> tuple[object, list[WorkerDescription]]:
    config = tiny_config(variant)
    spec, layout = model_spec(config), layout or EngineLayout(tp=2)
    metadata = [HFTensor(name, torch.bfloat16, shape) for name, shape in spec.hf_shapes.items()]
    workers = [FusedWorker(config, spec.hf_shapes, layout, rank).describe(metadata) for rank in range(layout.size)]
    return spec, workers


def test_a_missing_worker_is_named() -> None:
    spec, workers = described()
    with pytest.raises(EngineMismatch, match=r"an engine of 2 workers needs all of them, found \[1\]"):
        engine_side(spec, workers[1:], {})


def test_a_tensor_without_a_place_is_named() -> None:
    spec, workers = described()
    for worker in workers:
        del worker.landings["model.norm.weight"]
    with pytest.raises(EngineMismatch, match=r"no worker of the engine has a place for model\.norm\.weight"):
        engine_side(spec, workers, {})


def test_what_a_worker_keeps_is_its_share() -> None:
    spec, workers = described("qwen3-moe", EngineLayout(tp=2, expert_parallel=True))
    full_bytes = sum(torch.Size(shape).numel() for shape in spec.hf_shapes.values()) * 4
    bytes_of_workers = [kept_bytes(worker) for worker in workers]
    assert full_bytes < sum(bytes_of_workers) < 1.05 * full_bytes
    assert max(bytes_of_workers) < 0.65 * full_bytes  # the padded vocabulary falls unevenly
