"""Padded batches of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which sequence each position of a part of a batch belongs to, where it is not simply its row.

    Attributes:
        ids: `[rows, seq]` int64 in `0..count`.
        count: the number of sequences, the same on all ranks of `group`.
        group: the ranks among which the sequences' positions are spread; `None` where this rank has all positions.
    """

    ids: Tensor
    count: int
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """At every position, the sum of `values [rows, seq]` over its sequence, `[rows, seq]` float64. All ranks of the group
        call it together."""
        sums = values.new_zeros(self.count, dtype=torch.float64).index_add_(0, self.ids.flatten(), values.double().flatten())
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums[self.ids]


@dataclass(frozen=True)
class Batch:
    """Prompts with their completions, one per row, padded on the right, where causal attention cannot see it.

    Every per-token tensor is `[batch, seq]` and aligned with the *prediction*: position `t` is about token `t + 1`, given the
    tokens up to `t`. The last position predicts nothing and is never in the mask.

    Attributes:
        tokens: int64.
        mask: bool, the predictions that are trained on (those of the completion's tokens).
        position_ids: int64; `None` means 0, 1, 2, ... in every row.
        targets: int64, the predicted tokens; `None` means the tokens shifted by one.
        advantages, old_log_probs, rollout_log_probs, reference_log_probs: fp32, zero outside of the mask.
        importance_weights: fp32, factors of the tokens' policy loss (`objectives.correction`).
        loss_weights: fp32, the weights with which the tokens' losses are summed; the trainer sets them.
        sequences: the sequence of each position, for a part of a batch; `None` means that every row is one sequence.
    """

    tokens: Tensor
    mask: Tensor
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    importance_weights: Tensor | None = None
    loss_weights: Tensor | None = None
    sequences: Sequences | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2:
            raise ValueError(f"tokens must be [batch, seq], found shape {list(self.tokens.shape)}")
        for name, tensor in self.tensors().items():
            if tensor.shape != self.tokens.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, tokens have {list(self.tokens.shape)}")
        if self.position_ids is None:
            positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
            object.__setattr__(self, "position_ids", positions.expand_as(self.tokens))
        if self.targets is None:
            object.__setattr__(self, "targets", self.tokens.roll(-1, dims=1))
            predicts = torch.arange(self.tokens.shape[1], device=self.mask.device) < self.tokens.shape[1] - 1
            object.__setattr__(self, "mask", self.mask & predicts)

    @classmethod
    def from_completions(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        length: int | None = None,
        log_probs: Sequence[Sequence[float]] | None = None,
    ) -> Batch:
        """Pads prompts and completions into one batch.

        Args:
            prompts, completions: token ids, one pair per row.
            length: the length of the padded rows; `None` means the longest row.
            log_probs: the engine's log-probabilities of the completions' tokens; they become `rollout_log_probs`.

        Raises:
            ValueError: a prompt is empty, rows are longer than `length`, or numbers of rows or tokens differ.
        """
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a prompt with its completion has {longest} tokens, the batch is padded to {length}")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: its first completion token has nothing to be predicted from")
        tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        rollout_log_probs = None if log_probs is None else torch.zeros(len(rows), length)
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens[index, : len(row)] = torch.tensor(row)
            predictions = slice(len(prompt) - 1, len(row) - 1)
            mask[index, predictions] = True
            if rollout_log_probs is not None and log_probs is not None:
                rollout_log_probs[index, predictions] = torch.tensor(log_probs[index], dtype=torch.float32)
        return cls(tokens, mask, rollout_log_probs=rollout_log_probs)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """How many predictions are trained on."""
        return int(self.mask.sum())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this batch has, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}

    def need(self, name: str) -> Tensor:
        """The tensor `name`.

        Raises:
            ValueError: the batch does not have it.
        """
        tensor = getattr(self, name)
        if tensor is None:
            raise ValueError(f"the batch has no {name}, which this loss needs; it has {', '.join(self.tensors())}")
        return tensor

    def with_tensors(self, **tensors: Tensor | None) -> Batch:
        """The same batch with some tensors replaced or added."""
        return replace(self, **tensors)

    def spread(self, per_row: Tensor) -> Tensor:
        """Repeats `per_row [batch]` at every token of its row that is in the mask: `[batch, seq]` fp32, zero elsewhere."""
        return torch.where(self.mask, per_row.float()[:, None], 0.0)

    def rows(self, rows: slice | Tensor) -> Batch:
        """Some of the rows: a slice, indices, or a mask `[batch]`."""
        return Batch(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def without_rows(self, rows: Tensor) -> Batch:
        """The same batch with an empty mask in the rows that `rows [batch]` (bool) marks."""
        return self.with_tensors(mask=self.mask & ~rows[:, None])

    def lengths(self) -> Tensor:
        """`[batch]` int64: how many tokens of each row have to be read to predict all tokens in its mask; 0 for an empty
        mask."""
        positions = torch.arange(1, self.tokens.shape[1] + 1, device=self.mask.device)
        return (self.mask * positions).amax(dim=1) if len(self) else self.mask.new_zeros(0, dtype=torch.int64)

    def take(self, source: Tensor, sequences: Sequences) -> Batch:
        """The part of the batch at positions `source [rows, seq]`, indices into the flattened batch; -1 is padding outside of
        the mask."""
        real, index = source >= 0, source.clamp(min=0)
        taken = {name: torch.where(real, tensor.flatten()[index], 0) for name, tensor in self.tensors().items()}
        taken["mask"] = taken["mask"].bool()
        return Batch(**taken, sequences=sequences)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """At every token, the sum of `values [rows, seq]` over the tokens of its sequence that are in the mask, on whichever
        ranks they are; float64."""
        values = torch.where(self.mask, values, 0.0)
        if self.sequences is not None:
            return self.sequences.sum(values)
        return values.double().sum(dim=1, keepdim=True).expand_as(values)

    def check_finite(self) -> None:
        """
        Raises:
            ValueError: a token in the mask has a NaN or an infinite number; the message names the tensor, the number of such
                tokens, and the first row.
        """
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point():
                bad = self.mask & ~tensor.isfinite()
                if bad.any():
                    row = int(bad.any(dim=1).nonzero()[0])
                    raise ValueError(
                        f"{name} of {int(bad.sum())} tokens are not finite, first in row {row}: leave such rows out "
                        f"(Batch.without_rows) or find where they come from"
                    )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        sequences = self.sequences and replace(self.sequences, ids=self.sequences.ids.to(device))
        return Batch(**moved, sequences=sequences)


class TokenStatistics(NamedTuple):
    """The policy's predictions for given tokens; every field has the shape of the tokens.

    Attributes:
        log_probs: fp32, the log-probability of the given token.
        entropy: fp32, the entropy of the whole distribution, in nats.
        greedy: bool, whether the given token is the most probable one.
    """

    log_probs: Tensor
    entropy: Tensor
    greedy: Tensor
