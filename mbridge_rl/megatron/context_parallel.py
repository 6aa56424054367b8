"""Which tokens a context-parallel rank holds. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def context_parallel_positions(offsets: Sequence[int], rank: int, size: int) -> Tensor:
    """Global positions `[tokens / size]` of the tokens of context-parallel rank `rank` of `size`, in that rank's order.

    Every sequence is cut into `2 * size` chunks and rank `r` holds chunks `r` and `2 * size - 1 - r`, so that all ranks have
    the same work under a causal mask (the layout of Megatron-core and Transformer Engine).

    Args:
        offsets: where the packed sequences begin and the last one ends; `[0, length]` for one sequence. Lengths must be
            multiples of `2 * size`.
    """
    pieces = []
    for start, end in pairwise(offsets):
        length = (end - start) // (2 * size)
        for chunk in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + chunk * length, start + (chunk + 1) * length))
    return torch.cat(pieces)
