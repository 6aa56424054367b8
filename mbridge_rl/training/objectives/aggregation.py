"""Aggregation of the losses of tokens into the loss of a batch.

Every aggregation is a weight per token that is known before the step. The loss is then a weighted sum, and the split of the
batch over micro-batches and ranks cannot change it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def token_weights(mask: Tensor, aggregation: Aggregation = "token-mean", *, length: int | None = None) -> Tensor:
    """The weight that each token's loss is multiplied by before all are summed.

    With `N` tokens in the mask, `n` of them in the token's sequence, and `S` sequences that have tokens in the mask:

    - `token-mean`: `1 / N` (DAPO, arXiv:2503.14476);
    - `token-sum`: 1;
    - `seq-mean-token-mean`: `1 / (S n)` (GRPO, arXiv:2402.03300, eq. 3);
    - `seq-mean-token-sum`: `1 / S`;
    - `seq-mean-token-sum-norm`: `1 / (S length)`, a constant for all lengths (Dr. GRPO, arXiv:2503.20783).

    Args:
        mask: `[batch, seq]` of the whole batch, over all micro-batches and ranks; a row is a sequence.
        length: the divisor of `seq-mean-token-sum-norm`, for example the longest completion allowed.

    Returns:
        `[batch, seq]` float64, zero outside of the mask.

    Raises:
        ValueError: the aggregation is unknown, or `length` is missing, not positive, or given for an aggregation without a
            length.
    """
    if (length is not None) != (aggregation == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"aggregation {aggregation!r} and length {length}: seq-mean-token-sum-norm needs one, no other takes one"
        )
    if length is not None and length < 1:
        raise ValueError(f"the length to divide by must be at least 1, found {length}")
    per_sequence = mask.sum(dim=1, keepdim=True).double()
    tokens, sequences = per_sequence.sum().clamp(min=1), (per_sequence > 0).sum().clamp(min=1)
    divisors = {
        "token-mean": tokens,
        "token-sum": torch.ones_like(tokens),
        "seq-mean-token-mean": sequences * per_sequence.clamp(min=1),
        "seq-mean-token-sum": sequences,
        "seq-mean-token-sum-norm": sequences * (length or 1),
    }
    if aggregation not in divisors:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose {', '.join(get_args(Aggregation))}")
    return mask.double() / divisors[aggregation]


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean of `values` where `mask` is set, with the same weight for every token of the batch."""
    return (torch.where(mask, values.double(), 0.0).sum() / mask.sum().clamp(min=1)).item()
