"""Divides a batch among ranks and micro-batches: rows by data parallelism, positions by context parallelism.

A micro-batch is a table of positions of the batch. Padded rows, packed sequences, and the halves that context-parallel ranks
hold are therefore read and written back in the same way. All micro-batches of a step have the same shape on all ranks, as
pipelines require.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.training.batch import Batch, Sequences


@dataclass(frozen=True)
class MicroBatch:
    """Attributes:
    source: `[rows, seq / cp]`, this rank's positions as indices into the flattened batch; -1 is padding.
    sequences: `[rows, seq / cp]`, the index of each position's sequence within the micro-batch.
    count: the number of sequences in the micro-batch.
    offsets: where packed sequences begin and end, over all context-parallel ranks, padding included; `None` where each row is a
        sequence.
    """

    source: Tensor
    sequences: Tensor
    count: int
    offsets: tuple[int, ...] | None = None

    def of(self, batch: Batch, context_group: dist.ProcessGroup | None) -> Batch:
        """The part of `batch` that this rank computes in this micro-batch."""
        return batch.take(self.source, Sequences(self.sequences, self.count, context_group))

    def write(self, results: Tensor, values: Tensor) -> None:
        """Puts `values [kinds, rows, seq / cp]` into their places of `results [kinds, batch, seq]`."""
        real = self.source >= 0
        results.flatten(1)[:, self.source[real].to(results.device)] = values[:, real.to(values.device)]


@dataclass(frozen=True)
class Split:
    """Attributes:
    micro_batches: the micro-batches of this rank.
    rows, length: the shape of each micro-batch; the length is that over all context-parallel ranks.
    loads: `[dp][micro-batches]`, the number of tokens in each without the padding.
    """

    micro_batches: list[MicroBatch]
    rows: int
    length: int
    loads: list[list[int]]


def split_rows(batch: Batch, layout: ParallelLayout, rank: int, micro_batch_size: int) -> Split:
    """Divides the batch into micro-batches of `micro_batch_size` padded rows; neighbouring rows are on the same data-parallel
    rank."""
    at, (batch_rows, batch_length) = layout.coordinates(rank), batch.tokens.shape
    length = batch_length + -batch_length % _length_multiple(layout)
    per_rank = math.ceil(batch_rows / (micro_batch_size * layout.dp))
    per_rank = max(1, per_rank) + -max(1, per_rank) % _round(layout)
    columns = _columns([0, length], at.cp, layout.cp)
    micro_batches = []
    for index in range(per_rank):
        rows = torch.arange(micro_batch_size) + (at.dp * per_rank + index) * micro_batch_size
        real = (rows < batch_rows)[:, None] & (columns < batch_length)
        source = torch.where(real, rows[:, None] * batch_length + columns, -1)
        sequences = torch.arange(micro_batch_size)[:, None].expand_as(source)
        micro_batches.append(MicroBatch(source, sequences, micro_batch_size))
    tokens = [*batch.lengths().tolist(), *[0] * (per_rank * layout.dp * micro_batch_size - batch_rows)]
    sums = [sum(tokens[start : start + micro_batch_size]) for start in range(0, len(tokens), micro_batch_size)]
    loads = [sums[dp * per_rank : (dp + 1) * per_rank] for dp in range(layout.dp)]
    return Split(micro_batches, micro_batch_size, length, loads)


def pack_rows(batch: Batch, layout: ParallelLayout, rank: int, max_tokens: int) -> Split:
    """Packs undivided sequences without their padding into micro-batches of at most `max_tokens` tokens.

    Rows with an empty mask are left out, and so are the tokens after the last prediction of the other rows. The sequences go in
    the order of their length, longest first, each to the micro-batch with the fewest tokens (longest processing time first).
    Every rank computes the same division, and data-parallel ranks get about equally many tokens.

    Raises:
        ValueError: a sequence is longer than `max_tokens`.
    """
    at, batch_length = layout.coordinates(rank), batch.tokens.shape[1]
    multiple = 2 * layout.cp if layout.cp > 1 else 1
    needed = [length + -length % multiple for length in batch.lengths().tolist()]
    for row, tokens in enumerate(needed):
        if tokens > max_tokens:
            raise ValueError(f"row {row} has {tokens} tokens, a micro-batch holds {max_tokens}: raise micro_batch_tokens")
    bins = _balanced_bins(needed, layout.dp, _round(layout), max_tokens)
    fullest = max(1, *(sum(needed[row] for row in rows) for rows in bins))
    length = fullest + -fullest % _length_multiple(layout)
    micro_batches = [_packed(rows, needed, length, batch_length, at.cp, layout.cp) for rows in bins[at.dp :: layout.dp]]
    loads = [[sum(needed[row] for row in rows) for rows in bins[dp :: layout.dp]] for dp in range(layout.dp)]
    return Split(micro_batches, 1, length, loads)


def _packed(rows: list[int], needed: list[int], length: int, batch_length: int, cp_rank: int, cp: int) -> MicroBatch:
    offsets = [0, *accumulate(needed[row] for row in rows)]
    source = torch.full((length,), -1)
    for row, (start, end) in zip(rows, pairwise(offsets), strict=True):
        real = min(end - start, batch_length)  # lengths are rounded up for context parallelism
        source[start : start + real] = torch.arange(real) + row * batch_length
    if offsets[-1] < length:
        offsets.append(length)  # padding is one more sequence
    sequences = torch.repeat_interleave(torch.tensor(offsets).diff())
    columns = _columns(offsets, cp_rank, cp)
    return MicroBatch(source[columns][None], sequences[columns][None], len(offsets) - 1, tuple(offsets))


def _balanced_bins(sizes: list[int], dp: int, micro_batches_multiple: int, limit: int) -> list[list[int]]:
    """Distributes the indices of nonzero `sizes` over the fewest bins that hold them, about equally full. The number of bins is
    a multiple of `dp * micro_batches_multiple`."""
    order = sorted((index for index, size in enumerate(sizes) if size), key=lambda index: (-sizes[index], index))
    step = dp * micro_batches_multiple
    count = max(step, -(-sum(sizes) // (limit * step)) * step)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        fill = [(0, index) for index in range(count)]
        for index in order:
            tokens, emptiest = fill[0]
            heapq.heapreplace(fill, (tokens + sizes[index], emptiest))
            bins[emptiest].append(index)
        if max(tokens for tokens, _ in fill) <= limit:
            return [sorted(rows) for rows in bins]
        count += step


def _columns(offsets: list[int], cp_rank: int, cp: int) -> Tensor:
    return context_parallel_positions(offsets, cp_rank, cp) if cp > 1 else torch.arange(offsets[-1])


def _length_multiple(layout: ParallelLayout) -> int:
    """The number of which the length is a multiple: sequence parallelism divides a context-parallel rank's tokens by tp,
    context parallelism divides a sequence into 2 cp parts."""
    return math.lcm(layout.cp * layout.tp, 2 * layout.cp if layout.cp > 1 else 1)


def _round(layout: ParallelLayout) -> int:
    """The number of which the number of micro-batches is a multiple: interleaved stages need full rounds of pp
    micro-batches."""
    return layout.pp if layout.vpp > 1 else 1
