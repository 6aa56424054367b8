"""Assembles HF tensors on the ranks that receive them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.schedule import StreamBucket, StreamSpan

_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_HUGE_TENSOR = 32 << 20  # above this size malloc maps memory anew for every tensor


class Assembly:
    """Builds tensors out of the spans of one bucket after another, one tensor at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensor: Tensor | None = None

    def completed(self, bucket: StreamBucket, fill: Callable[[StreamSpan, Tensor], None]) -> Iterator[tuple[str, Tensor]]:
        """Calls `fill(span, full tensor)` on every span of `bucket`; yields `(hf_name, tensor)` when a tensor is complete."""
        for span in bucket.spans:
            if span.begins_tensor:
                self._tensor = new_tensor(span.tensor, self._device)
            if self._tensor is None:
                raise ValueError(f"{span.tensor.hf_name}: buckets were consumed out of order")
            fill(span, self._tensor)
            if span.ends_tensor:
                tensor, self._tensor = self._tensor, None
                yield span.tensor.hf_name, tensor
                del tensor  # so that the next tensor may take its memory


def new_tensor(tensor: HFTensor, device: torch.device) -> Tensor:
    """An uninitialised tensor, which the consumer may keep."""
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= _HUGE_TENSOR:
        use_huge_pages(new)
    return new


def use_huge_pages(tensor: Tensor) -> None:
    """Asks the kernel for 2 MiB pages under a fresh CPU tensor: writing it first then takes a third of the time."""
    nbytes = prod(tensor.shape) * tensor.element_size()
    first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE - first
    if length > 0:  # a kernel without huge pages refuses, which does no harm
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
