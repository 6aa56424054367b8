"""Rectangles of files: exactly the bytes that they are made of go in and out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import pages_of, watched
from torch import Tensor

from mbridge_rl.hf import rectangles
from mbridge_rl.hf.rectangles import Rectangle, read_into, read_many, write_from


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], tuple[slice, ...], list[int]]:
    """A whole shape, a box of it, and an order of its dimensions."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 7]), max_size=2))
    sizes.insert(draw(st.integers(0, len(sizes))), draw(st.sampled_from([1, 40, 1500])))
    starts = [draw(st.integers(0, size - 1)) for size in sizes]
    box = tuple(slice(start, draw(st.integers(start + 1, size))) for start, size in zip(starts, sizes, strict=True))
    return sizes, box, draw(st.permutations(range(len(sizes))))


def as_rectangle(tensor: Tensor, box: tuple[slice, ...], order: list[int], start: int) -> tuple[Rectangle, Tensor]:
    part = tensor[box].permute(order)
    offset = start + part.storage_offset() * tensor.element_size()
    return Rectangle(tensor.dtype, offset, tuple(part.shape), tuple(part.stride())), part


DTYPES = [torch.float32, torch.bfloat16]


@given(boxes(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([64, 5000, 8 << 20]))
@settings(max_examples=150, deadline=None)
def test_rectangles_go_in_and_out_and_touch_no_page_beside_their_own(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[int], tuple[slice, ...], list[int]],
    in_file: torch.dtype,
    in_memory: torch.dtype,
    aligned: bool,
    staging: int,
) -> None:
    sizes, box, order = case
    start = 8 if aligned else 1002
    tensor = (torch.arange(torch.Size(sizes).numel()) % 251).to(in_file).view(sizes)
    path = tmp_path_factory.getbasetemp() / "rectangle.bin"
    content = b"\1" * start + tensor.view(torch.uint8).numpy().tobytes() + b"\2" * 99
    path.write_bytes(content)
    rectangle, part = as_rectangle(tensor, box, order, start)
    backing = torch.full([size + 2 for size in part.shape], -1, dtype=in_memory)
    inner = backing[tuple(slice(1, 1 + size) for size in part.shape)]
    requested_pages: set[int] = set()
    with pytest.MonkeyPatch.context() as patch, path.open("r+b") as opened:
        patch.setattr(rectangles, "STAGING_BYTES", staging)
        patch.setattr(rectangles.os, "preadv", watched(os.preadv, requested_pages))
        read_into(opened.fileno(), rectangle, inner)
        assert torch.equal(inner, part.to(in_memory))
        assert (backing == -1).sum() == backing.numel() - inner.numel() + (inner == -1).sum()
        assert requested_pages <= pages_of(rectangle)
        write_from(opened.fileno(), rectangle, inner + 3)
    expected = tensor.clone()
    expected[box].permute(order).copy_((inner + 3).to(in_file))
    assert path.read_bytes() == content[:start] + expected.view(torch.uint8).numpy().tobytes() + b"\2" * 99


@given(st.lists(st.tuples(boxes(), st.booleans()), min_size=1, max_size=5), st.sampled_from([1, 3, 1000]), st.data())
@settings(max_examples=150, deadline=None)
def test_many_are_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, cases: list[Any], most: int, data: st.DataObject
) -> None:
    """Many rectangles are read in any order, side by side or apart, cast or not, however few bytes each call returns."""
    path = tmp_path_factory.getbasetemp() / "rectangles.bin"
    requests, expected, content = [], [], b"\1" * 8
    for index, ((sizes, box, order), cast) in enumerate(cases):
        tensor = (torch.arange(torch.Size(sizes).numel()) % 251).float().view(sizes) + index
        rectangle, part = as_rectangle(tensor, box, order, len(content))
        content += tensor.numpy().tobytes()
        requests.append((f"tensor {index}", rectangle, torch.full(part.shape, -1.0, dtype=torch.float64 if cast else None)))
        expected.append(part)
    path.write_bytes(content)

    def grudging(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return os.preadv(descriptor, [buffers[0][: data.draw(st.integers(1, len(buffers[0])))]], position)

    with pytest.MonkeyPatch.context() as patch, path.open("rb") as opened:
        patch.setattr(rectangles, "_MOST_NEIGHBOURS", most)
        if data.draw(st.booleans()) and sum(part.numel() for part in expected) < 20:
            patch.setattr(rectangles, "os", SimpleNamespace(preadv=grudging))
        read_many(opened.fileno(), data.draw(st.permutations(requests)))
    for (_, _, read), part in zip(requests, expected, strict=True):
        assert torch.equal(read.float(), part)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(20))
    requests = [
        (name, Rectangle(torch.float32, start, (2,), (1,)), torch.empty(2)) for name, start in (("b", 8), ("c", 16), ("a", 0))
    ]
    with (tmp_path / "short").open("rb") as opened, pytest.raises(EOFError, match=r"^c: the file ends 4 bytes too early"):
        read_many(opened.fileno(), requests)
    assert torch.equal(requests[0][2], torch.zeros(2))
