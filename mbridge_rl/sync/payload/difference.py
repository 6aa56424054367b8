"""The difference between two versions of a rectangle, bit for bit: positions and values, or an XOR plane.

An optimizer step at a usual learning rate changes few elements of weights in a low-precision dtype, and few bits of these. A
difference is written so that a general compressor profits from that. If few elements changed, it has the gaps between their
positions and the XOR of their bits; else it has the XOR of all elements. In both cases the bytes of equal weight lie side by
side, so that runs of zero bytes are long. XOR is its own inverse, so the same difference leads back. Any dtype works, and NaNs
do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod

import numpy as np
import torch
from torch import Tensor

from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Shape

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kind(IntEnum):
    SAME = 0
    SPARSE = 1
    XOR = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two rectangles of the same shape and dtype.

    Attributes:
        kind: SAME if nothing changed, SPARSE if the changed elements are listed, XOR if all elements are.
        count: the number of elements that changed.
        planes: uncompressed bytes. SPARSE: the bytes of the gaps by weight, then those of the values; XOR: the bytes of all
            elements by weight.
    """

    kind: Kind
    count: int
    planes: bytes

    def values(self, shape: Shape, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """The changed positions and their XOR bits.

        Returns:
            `(positions, bits)`: int64 `[count]` in row-major order, or `None` for all elements; integers of the dtype's size.

        Raises:
            ValueError: the planes do not belong to a rectangle of this shape and dtype.
        """
        numel, size = prod(shape), dtype.itemsize
        if self.kind is Kind.SAME:
            _require_size(self, 0)
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=_INTEGER_OF_SIZE[size])
        if self.kind is Kind.XOR:
            _require_size(self, numel * size)
            return None, _from_planes(self.planes, size)
        gap_size = _gap_size(numel)
        _require_size(self, self.count * (gap_size + size))
        gaps = np.frombuffer(_interleaved(self.planes[: self.count * gap_size], gap_size), dtype=f"<u{gap_size}")
        positions = torch.from_numpy(np.cumsum(gaps, dtype=np.int64))
        if self.count and (int(positions[-1]) >= numel or int(positions[0]) < 0 or np.any(gaps[1:] == 0)):
            raise ValueError(f"positions reach {int(positions[-1])} in a rectangle of {numel} elements")
        return positions, _from_planes(self.planes[self.count * gap_size :], size)


def difference(old: Tensor, new: Tensor) -> Difference:
    """The difference from `old` to `new`, which are contiguous and of one shape and dtype."""
    before, after = integers(old).flatten(), integers(new).flatten()
    positions = (before != after).nonzero().flatten()
    count, numel, size = len(positions), before.numel(), before.element_size()
    if count == 0:
        return Difference(Kind.SAME, 0, b"")
    gap_size = _gap_size(numel)
    if 2 * count * (gap_size + size) > numel * size:
        return Difference(Kind.XOR, count, _planes(before ^ after))
    gaps = np.diff(positions.cpu().numpy(), prepend=0).astype(f"<i{gap_size}")
    bits = after[positions] ^ before[positions]
    return Difference(Kind.SPARSE, count, _planes(torch.from_numpy(gaps)) + _planes(bits))


def apply(change: Difference, view: View, shape: Shape, tensor: Tensor) -> None:
    """Turns the rectangle `view` `[*shape]` of the contiguous `tensor` from one version into the other, in place.

    Raises:
        ValueError: the difference does not belong to such a rectangle.
    """
    positions, bits = change.values(shape, tensor.dtype)
    words = integers(tensor)
    if positions is None:
        view.of(words, shape).bitwise_xor_(bits.view(shape).to(words.device))
    elif len(positions):
        places = torch.full_like(positions, view.offset)
        for size, stride in zip(reversed(shape), reversed(view.strides), strict=True):
            places += positions % size * stride
            positions = positions // size
        flat, places = words.view(-1), places.to(words.device)
        flat[places] = flat[places] ^ bits.to(words.device)


def apply_to(values: Tensor, change: Difference) -> Tensor:
    """Calls `apply` on a contiguous rectangle that is a tensor of its own, and returns that tensor."""
    apply(change, View("", 0, tuple(values.stride())), tuple(values.shape), values)
    return values


def integers(tensor: Tensor) -> Tensor:
    """The bits of `tensor`, as integers of the same size, in the same memory."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


def _gap_size(numel: int) -> int:
    return 4 if numel < 1 << 32 else 8


def _planes(values: Tensor) -> bytes:
    """The bytes of flat integers, sorted by weight: first the lowest byte of each, then the next."""
    array = values.cpu().contiguous().numpy()
    return np.ascontiguousarray(array.view(np.uint8).reshape(len(array), -1).T).tobytes()


def _from_planes(planes: bytes, size: int) -> Tensor:
    interleaved = bytearray(_interleaved(planes, size))
    if not interleaved:
        return torch.empty(0, dtype=_INTEGER_OF_SIZE[size])
    return torch.frombuffer(interleaved, dtype=_INTEGER_OF_SIZE[size])


def _interleaved(planes: bytes, size: int) -> bytes:
    return np.ascontiguousarray(np.frombuffer(planes, dtype=np.uint8).reshape(size, -1).T).tobytes()


def _require_size(change: Difference, nbytes: int) -> None:
    if len(change.planes) != nbytes:
        raise ValueError(f"a difference of kind {change.kind.name} has {len(change.planes)} bytes, expected {nbytes}")
