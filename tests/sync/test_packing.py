"""Pieces on their way, without processes."""

from __future__ import annotations

from math import prod

import torch

from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.plan import View
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.route import Bucket, Part, Piece, Route, WorkerRoute
from mbridge_rl.sync.trainer.packer import Packer


def full_tensor(shape: tuple[int, ...], dtype: torch.dtype, parameter: str = "w", offset: int = 0) -> Piece:
    """All of the tensor `w`."""
    view = View("w", 0, contiguous_strides(shape))
    target = View(parameter, 0, view.strides)
    return Piece("w", shape, dtype, view, target, view, columns=shape[-1], offset=offset, counted=not offset)


def test_each_parameter_is_proven_in_its_own_dtype() -> None:
    """Two parameters hold the same elements, as tied embeddings may, and one of them keeps bf16."""
    shape = (5, 7)
    pieces = full_tensor(shape, torch.float32), full_tensor(shape, torch.bfloat16, "v", offset=192)
    parts = Part(0, 0, 192 + prod(shape) * 2, pieces), Part(0, 320, 8, ())
    route = WorkerRoute(0, ("w",), tuple(Bucket(part.start, part.nbytes, (part,)) for part in parts), 328)
    packer = Packer(Route((route,)), 0, {"w": torch.randn(shape)}, {"w": torch.float32})
    assert not packer.examine(with_digests=True, check_finite=True)
    image = torch.zeros(route.nbytes, dtype=torch.uint8)
    for part in parts:
        packer.pack(route, part, image[part.start : part.start + part.nbytes])
    packing.require_expected(route, image)


def test_a_large_piece_moves_between_devices() -> None:
    """From host memory onto an accelerator, for which the device without data stands."""
    shape = (1024, 1024)
    piece = full_tensor(shape, torch.float32)
    assert packing.move(piece, torch.ones(shape), torch.empty(shape, device="meta"), with_digest=False) == 0
    held = torch.zeros(shape)
    assert packing.move(piece, torch.ones(shape), held, with_digest=True) == packing.examine(piece, held, with_digest=True)
    assert held.all()
