"""Which groups of a batch make an optimizer step together, where a batch is worth several of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def mini_batch_rows(rows: int, group_size: int, mini_batches: int, epochs: int, *, seed: int, step: int) -> Iterator[Tensor]:
    """The rows of each optimizer step on a batch, in order.

    In every epoch each group is in one mini-batch, whole: a prompt's better and worse completions pull at the same time.
    Mini-batches differ by one group at most. Who comes together depends on `seed` and `step` alone: it is the same on every
    rank and layout, and in a resumed run.

    Args:
        rows: of the batch, whole groups side by side.
        mini_batches: of an epoch; fewer where there are fewer groups.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    members = torch.arange(rows).view(-1, group_size)
    for _ in range(epochs):
        order = torch.randperm(len(members), generator=generator)
        for groups in order.tensor_split(min(mini_batches, len(members))):
            yield members[groups.sort().values].flatten()
