"""Log-probabilities of given tokens where the vocabulary is split over ranks. No rank ever holds the full logits.

Each tensor-parallel rank reduces its own columns to four numbers per token; two small all-reduces (a maximum, a sum) combine
them. Values and gradients equal those of the dense computation `log_softmax(logits[..., :vocab] / temperature)` up to rounding.
Given hidden states and the output weight instead of logits, this rank's own logits exist only for a chunk of tokens at a time,
and the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mbridge_rl.training.batch import TokenStatistics

DEFAULT_MAX_ELEMENTS = 1 << 24


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
        group: the tensor-parallel group; `None` where the vocabulary is not split.
        temperature: the temperature of sampling.
        max_elements: the work goes in chunks of tokens so that no more than two fp32 temporaries of so many elements exist at
            a time besides the logits and, in the backward pass, their gradient (both in the logits' dtype).

    Raises:
        ValueError: the logits cannot hold `vocab_size` columns, shapes differ, or the temperature is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {list(logits.shape)} must be tokens {list(tokens.shape)} with one more dimension")
    part = _VocabularyPart.of(logits.shape[-1], vocab_size, group, temperature, max_elements)
    return TokenStatistics(*_OfLogits.apply(logits, tokens, part))


def projected_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    vocab_size: int,
    *,
    change: Callable[[Tensor], Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    max_elements: int = DEFAULT_MAX_ELEMENTS,
) -> TokenStatistics:
    """`token_statistics` of `change(hidden @ weight.T)`, differentiable in `hidden` and `weight`, without these logits.

    Args:
        hidden: `[..., hidden]` of the last layer, the same on all ranks of `group`; its gradient is this rank's part, to be
            summed over the group (Megatron's `copy_to_tensor_model_parallel_region` does).
        weight: `[padded_vocab / tp, hidden]`, this rank's rows of the output layer, in hidden's dtype.
        tokens, vocab_size, group, temperature: see `token_statistics`.
        change: a change of the logits, element by element (a scale, a soft cap).
        max_elements: no more than four tensors of so many logits exist at a time (eight with a `change`), whatever the
            number of tokens (one token's row at least). The weight's gradient is summed up in fp32.

    Raises:
        ValueError: as in `token_statistics`.
    """
    if hidden.shape[:-1] != tokens.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden states {list(hidden.shape)} must be tokens {list(tokens.shape)} with one more dimension, "
            f"that of the weight {list(weight.shape)}"
        )
    part = _VocabularyPart.of(weight.shape[0], vocab_size, group, temperature, max_elements)
    return TokenStatistics(*_OfHidden.apply(hidden, weight, tokens, part, change))


@dataclass(frozen=True)
class _VocabularyPart:
    """The columns of one rank: `held` real ones, the first of them token `first`."""

    first: int
    held: int
    group: dist.ProcessGroup | None
    temperature: float
    chunk_rows: int

    @classmethod
    def of(
        cls, columns: int, vocab_size: int, group: dist.ProcessGroup | None, temperature: float, max_elements: int
    ) -> _VocabularyPart:
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        if columns * size < vocab_size:
            raise ValueError(
                f"{size} ranks of {columns} columns cannot hold a vocabulary of {vocab_size}; pass this rank's logits"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, found {temperature}")
        held = min(max(vocab_size - rank * columns, 0), columns)
        return cls(rank * columns, held, group, temperature, max(1, max_elements // max(held, 1)))

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Yields the rows to work on at a time; none where this rank has only padding."""
        for start in range(0, tokens if self.held else 0, self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def scaled(self, logits: Tensor) -> Tensor:
        """`logits [rows, columns]` as fresh fp32 `[rows, held]`, scaled by the temperature."""
        scaled = logits[:, : self.held].to(torch.float32, copy=True)
        return scaled if self.temperature == 1.0 else scaled.div_(self.temperature)

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Whether this rank holds each token, and the token's column (0 where it does not)."""
        column = tokens - self.first
        here = (column >= 0) & (column < self.held)
        return here, torch.where(here, column, 0)


@dataclass(frozen=True)
class _Reduced:
    """The results of the reduction over the columns of all ranks that the backward pass needs, per token, fp32."""

    log_normalizer: Tensor
    entropy: Tensor

    def gradient(
        self, x: Tensor, rows: slice, tokens: Tensor, grads: tuple[Tensor | None, Tensor | None], part: _VocabularyPart
    ) -> Tensor:
        """The gradient of the logits of some rows, `[rows, held]` fp32. `x` holds these rows scaled, and is overwritten.

        d log p(t) / d x_i = [i = t] - p_i and d H / d x_i = -p_i (log p_i + H), each divided by the temperature.
        """
        grad_log_probs, grad_entropy = (None if grad is None else grad.reshape(-1)[rows] for grad in grads)
        log_p = x.sub_(self.log_normalizer[rows, None])
        p = log_p.exp()
        scale = torch.zeros_like(self.log_normalizer[rows]) if grad_log_probs is None else grad_log_probs
        if grad_entropy is None:
            gradient = p.mul_(-scale[:, None])
        else:  # p * (-scale - grad_entropy * (log_p + H))
            log_p.add_(self.entropy[rows, None]).mul_(grad_entropy[:, None]).add_(scale[:, None])
            gradient = p.mul_(log_p.neg_())
        here, column = part.locate(tokens[rows])
        gradient.scatter_add_(1, column[:, None], torch.where(here, scale, 0.0)[:, None])
        return gradient.div_(part.temperature)


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, part: _VocabularyPart) -> tuple[Tensor, ...]:
        rows = logits.reshape(-1, logits.shape[-1])
        outputs, reduced = _reduce(lambda chunk: rows[chunk], tokens, part)
        ctx.part = part
        return _remember(ctx, outputs, reduced, tokens, logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, tokens, log_normalizer, entropy = ctx.saved_tensors
        reduced, part = _Reduced(log_normalizer, entropy), ctx.part
        grad = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        rows, grad_rows = logits.reshape(-1, logits.shape[-1]), grad.view(-1, logits.shape[-1])
        for chunk in part.chunks(len(rows)):
            x = part.scaled(rows[chunk])
            grad_rows[chunk, : part.held] = reduced.gradient(x, chunk, tokens.reshape(-1), grads[:2], part)
        return grad, None, None


class _OfHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        part: _VocabularyPart,
        change: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        outputs, reduced = _reduce(lambda chunk: _project(rows[chunk], weight[: part.held], change), tokens, part)
        ctx.part, ctx.change = part, change
        return _remember(ctx, outputs, reduced, tokens, hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, tokens, log_normalizer, entropy = ctx.saved_tensors
        reduced, part = _Reduced(log_normalizer, entropy), ctx.part
        rows, held = hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach()[: part.held]
        grad_rows = torch.zeros_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in part.chunks(len(rows)):
            logits = F.linear(rows[chunk], held)
            if ctx.change is None:
                grad_logits = reduced.gradient(part.scaled(logits), chunk, tokens.reshape(-1), grads[:2], part)
            else:
                with torch.enable_grad():
                    changed = ctx.change(logits.requires_grad_())
                x = part.scaled(changed.detach())
                grad_changed = reduced.gradient(x, chunk, tokens.reshape(-1), grads[:2], part).to(logits.dtype)
                (grad_logits,) = torch.autograd.grad(changed, logits, grad_changed)
            grad_logits = grad_logits.to(rows.dtype)
            grad_rows[chunk] = grad_logits @ held
            if grad_weight is not None:
                grad_weight[: part.held].add_(grad_logits.t() @ rows[chunk])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_rows.view_as(hidden), grad_weight, None, None, None


def _project(rows: Tensor, weight: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits = F.linear(rows, weight)
    return logits if change is None else change(logits)


def _remember(ctx: Any, outputs: tuple[Tensor, ...], reduced: _Reduced, tokens: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    ctx.save_for_backward(*inputs, tokens, reduced.log_normalizer, reduced.entropy)
    ctx.mark_non_differentiable(outputs[2])
    ctx.set_materialize_grads(False)
    return outputs


def _reduce(logits_of: Callable[[slice], Tensor], tokens: Tensor, part: _VocabularyPart) -> tuple[tuple[Tensor, ...], _Reduced]:
    """Log-probabilities, entropy and greediness in the shape of `tokens`, and the values that the backward pass needs."""
    maximum, (normalizer, weighted, target) = _reduce_columns(logits_of, tokens.reshape(-1), part)
    log_sum = normalizer.log()  # of exp(logit - maximum)
    entropy = log_sum - weighted / normalizer
    outputs = (target - maximum - log_sum, entropy, target >= maximum)
    return tuple(output.view(tokens.shape) for output in outputs), _Reduced(maximum + log_sum, entropy)


def _reduce_columns(logits_of: Callable[[slice], Tensor], tokens: Tensor, part: _VocabularyPart) -> tuple[Tensor, Tensor]:
    """Per token, over all ranks: the maximum logit `[tokens]`, and `[3, tokens]` fp32 sums, of `exp(x - maximum)`, of
    `exp(x - maximum) * (x - maximum)`, and of the token's own logit.
    """
    lowest = torch.finfo(torch.float32).min  # not -inf, whose product with zero is NaN
    maximum = torch.full((len(tokens),), lowest, device=tokens.device)
    sums = torch.zeros(3, len(tokens), device=tokens.device)
    here, column = part.locate(tokens)
    for rows in part.chunks(len(tokens)):
        x = part.scaled(logits_of(rows))
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
