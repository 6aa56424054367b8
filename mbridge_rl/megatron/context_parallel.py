"""The positions of the tokens that a context-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
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


def token_positions(tokens: int, packed_seq_params: Any, group: dist.ProcessGroup | None) -> Tensor:
    """The positions `[tokens]` of a rank's query tokens in their own sequences.

    Args:
        tokens: number of this rank's tokens per row of the batch.
        packed_seq_params: Megatron's parameters of packed sequences, `None` where nothing is packed.
        group: the context-parallel group; `None` where there is none.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if packed_seq_params is None:
        return context_parallel_positions([0, tokens * size], rank, size) if size > 1 else torch.arange(tokens)
    padded = packed_seq_params.cu_seqlens_q_padded
    offsets = (packed_seq_params.cu_seqlens_q if padded is None else padded).cpu()
    positions = context_parallel_positions(offsets.tolist(), rank, size) if size > 1 else torch.arange(tokens)
    return positions - offsets[torch.bucketize(positions, offsets[1:], right=True)]
