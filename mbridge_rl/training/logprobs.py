"""Log-probabilities of given tokens from logits that are split over the vocabulary. The whole logits never exist anywhere.

Each tensor-parallel rank reduces its own columns to four numbers per token; two small all-reduces (a maximum, a sum) combine
them. The dense computation is `log_softmax(logits[..., :vocab] / temperature)`; values and gradients equal it up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_MAX_ELEMENTS = 1 << 24


class TokenStatistics(NamedTuple):
    """What the policy says of given tokens; every field has the shape of the tokens.

    Attributes:
        log_probs: fp32, of the given token.
        entropy: fp32, of the whole distribution, in nats.
        greedy: bool, whether the given token is the most probable one.
    """

    log_probs: Tensor
    entropy: Tensor
    greedy: Tensor


def token_statistics(
    logits: Tensor,
    tokens: Tensor,
    vocab_size: int,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    max_elements: int = DEFAULT_MAX_ELEMENTS,
) -> TokenStatistics:
    """Statistics of `tokens` under `softmax(logits / temperature)`, differentiable in `log_probs` and `entropy`.

    Args:
        logits: `[..., padded_vocab / tp]`, any floating dtype: the columns of this rank, in rank order.
        tokens: `[...]` int64, below `vocab_size`, the same on all ranks of `group`.
        vocab_size: columns from here on are padding and take no part.
        group: the tensor-parallel group; `None` where the vocabulary is whole.
        temperature: what sampling used.
        max_elements: the work goes in chunks of tokens so that no more than two fp32 temporaries of so many elements exist at
            a time besides the logits and, in the backward pass, their gradient (both in the logits' dtype).

    Raises:
        ValueError: the logits cannot hold `vocab_size` columns, shapes differ, or the temperature is not positive.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    columns = logits.shape[-1]
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {list(logits.shape)} must be tokens {list(tokens.shape)} with one more dimension")
    if columns * size < vocab_size:
        raise ValueError(f"{size} ranks of {columns} columns cannot hold a vocabulary of {vocab_size}; pass this rank's logits")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    held = min(max(vocab_size - rank * columns, 0), columns)
    part = _VocabularyPart(rank * columns, held, group, temperature, max(1, max_elements // max(held, 1)))
    return TokenStatistics(*_TokenStatistics.apply(logits, tokens, part))


@dataclass(frozen=True)
class _VocabularyPart:
    """The columns of one rank: `held` real ones, the first of them token `first`."""

    first: int
    held: int
    group: dist.ProcessGroup | None
    temperature: float
    chunk_rows: int

    def chunks(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of `logits [tokens, columns]` as fresh fp32 `[rows, held]`, scaled by the temperature."""
        for start in range(0, len(logits), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            scaled = logits[rows, : self.held].to(torch.float32, copy=True)
            yield rows, scaled if self.temperature == 1.0 else scaled.div_(self.temperature)

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank holds each token, and the token's column (0 where it does not)."""
        column = tokens - self.first
        here = (column >= 0) & (column < self.held)
        return here, torch.where(here, column, 0)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, part: _VocabularyPart) -> tuple[Tensor, Tensor, Tensor]:
        rows, flat = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        maximum, sums = _reduce_columns(rows, flat, part)
        normalizer, weighted, target = sums
        log_sum = normalizer.log()  # of exp(logit - maximum)
        log_probs = target - maximum - log_sum
        entropy = log_sum - weighted / normalizer
        greedy = target >= maximum
        ctx.part = part
        ctx.save_for_backward(logits, tokens, maximum + log_sum, entropy)
        ctx.mark_non_differentiable(greedy)
        ctx.set_materialize_grads(False)
        return log_probs.view(tokens.shape), entropy.view(tokens.shape), greedy.view(tokens.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """d log p(t) / d x_i = [i = t] - p_i and d H / d x_i = -p_i (log p_i + H), each divided by the temperature."""
        grad_log_probs, grad_entropy, _ = grads
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None
        logits, tokens, log_normalizer, entropy = ctx.saved_tensors
        part: _VocabularyPart = ctx.part
        grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        grad_rows, here_column = grad.view(-1, logits.shape[-1]), part.locate(tokens.reshape(-1))
        for rows, log_p in part.chunks(logits.reshape(-1, logits.shape[-1])) if part.held else ():
            log_p.sub_(log_normalizer[rows, None])
            p = log_p.exp()
            scale = torch.zeros_like(log_normalizer[rows])
            if grad_log_probs is not None:
                scale = grad_log_probs.reshape(-1)[rows]
            if grad_entropy is None:
                chunk = p.mul_(-scale[:, None])
            else:  # p * (-scale - grad_entropy * (log_p + H))
                log_p.add_(entropy[rows, None]).mul_(grad_entropy.reshape(-1)[rows, None]).add_(scale[:, None])
                chunk = p.mul_(log_p.neg_())
            here, column = (of_all[rows] for of_all in here_column)
            chunk.scatter_add_(1, column[:, None], torch.where(here, scale, 0.0)[:, None])
            grad_rows[rows, : part.held] = chunk.div_(part.temperature)
        return grad, None, None


def _reduce_columns(logits: Tensor, tokens: Tensor, part: _VocabularyPart) -> tuple[Tensor, Tensor]:
    """Per token, over all ranks: the maximum logit `[tokens]`, and `[3, tokens]` fp32 sums, of `exp(x - maximum)`, of
    `exp(x - maximum) * (x - maximum)`, and of the token's own logit.
    """
    lowest = torch.finfo(torch.float32).min  # not -inf, whose product with zero is no number
    maximum = torch.full((len(tokens),), lowest, device=logits.device)
    sums = torch.zeros(3, len(tokens), device=logits.device)
    here, column = part.locate(tokens)
    for rows, x in part.chunks(logits) if part.held else ():
        sums[2, rows] = torch.where(here[rows], x.gather(1, column[rows, None])[:, 0], 0.0)
        maximum[rows] = x.amax(dim=-1)
        x.sub_(maximum[rows, None])
        exponential = x.exp()
        sums[0, rows] = exponential.sum(dim=-1)
        sums[1, rows] = exponential.mul_(x).sum(dim=-1)
    if part.group is None or part.group.size() == 1:
        return maximum, sums
    own_maximum = maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=part.group)
    shift = own_maximum - maximum
    sums[1] = (sums[1] + sums[0] * shift) * shift.exp()
    sums[0] *= shift.exp()
    dist.all_reduce(sums, group=part.group)
    return maximum, sums
