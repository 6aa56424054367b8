"""A batch of completions for tests of objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.loss import grpo_loss
from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows

GROUP = 4
LENGTHS = [3, 9, 1, 5, 7, 2, 8, 4, 6, 6, 1, 3]
REWARDS = [1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 1.0]  # the second group's are all equal

Sequences = list[Tensor]


class Sample:
    """Holds log-probabilities of completions, as lists of sequences for the formulas and as a batch for the library."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> Sequences:
            return [scale * torch.randn(length, generator=generator, dtype=torch.float64) for length in LENGTHS]

        self.policy = [(-2 + value).requires_grad_() for value in draw(0.5)]
        self.entropy = [value.abs().requires_grad_() for value in draw(1.0)]
        self.old = [policy.detach() + noise for policy, noise in zip(self.policy, draw(0.4), strict=True)]
        self.rollout = [old + noise for old, noise in zip(self.old, draw(0.5), strict=True)]
        self.reference = [policy.detach() + noise for policy, noise in zip(self.policy, draw(0.6), strict=True)]
        self.rewards = torch.tensor(REWARDS, dtype=torch.float64)
        prompts = [[5] * (1 + row % 3) for row in range(len(LENGTHS))]
        batch = Batch.from_completions(prompts, [[7] * length for length in LENGTHS], pad_token_id=0)
        self.batch = batch.with_tensors(
            old_log_probs=self.spread(batch, self.old),
            rollout_log_probs=self.spread(batch, self.rollout),
            reference_log_probs=self.spread(batch, self.reference),
        )

    @staticmethod
    def spread(batch: Batch, sequences: Sequences) -> Tensor:
        values = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        return values.masked_scatter(batch.mask, torch.cat(list(sequences)))

    def ours(self, config: GRPOConfig) -> Tensor:
        """The library's loss of the whole batch."""
        selection = select_rows(config, self.batch, self.rewards)
        selected = torch.ones(len(self.batch), dtype=torch.bool)
        if config.dynamic_sampling:
            selected[4:8] = False
        batch = prepare_batch(config, selection.batch, selection.rewards).batch
        policy = TokenStatistics(
            self.spread(self.batch, self.policy)[selected], self.spread(self.batch, self.entropy)[selected], batch.mask
        )
        loss = grpo_loss(config)
        return (loss.token_weights(batch.mask) * loss(policy, batch)).sum()
