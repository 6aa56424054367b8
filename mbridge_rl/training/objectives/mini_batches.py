"""The division of a batch into mini-batches: which groups form an optimizer step together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def mini_batch_rows(rows: int, group_size: int, mini_batches: int, epochs: int, *, seed: int, step: int) -> Iterator[Tensor]:
    """Yields the indices of the rows of each optimizer step on a batch, `[rows of the mini-batch]` int64.

    In every epoch each group is in exactly one mini-batch and is not divided, so that a prompt's better and worse completions
    act in the same step. Sizes of mini-batches differ by one group at most. The division depends on `seed` and `step` alone: it
    is the same on every rank and layout, and in a resumed run.

    Args:
        rows: the number of rows of the batch, whole groups side by side.
        mini_batches: the number of mini-batches in an epoch; fewer if there are fewer groups.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    members = torch.arange(rows).view(-1, group_size)
    for _ in range(epochs):
        order = torch.randperm(len(members), generator=generator)
        for groups in order.tensor_split(min(mini_batches, len(members))):
            yield members[groups.sort().values].flatten()
