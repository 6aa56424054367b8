"""The loss of a policy-gradient step, put together from the components in `objectives` that a `GRPOConfig` chooses.

config = objective("dapo", group_size=16)
selection = select_rows(config, batch, rewards)
batch = ...selection.batch with old log-probabilities...
prepared = prepare_batch(config, batch, selection.rewards)
trainer.step(prepared.batch, grpo_loss(config))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.objectives.aggregation import masked_mean, token_weights
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.metrics import ratio_metrics
from mbridge_rl.training.objectives.surrogates import (
    clipped_surrogate,
    clipped_weight_loss,
    policy_ratio,
    sequence_ratio,
)

TokenLoss = Callable[[TokenStatistics, Batch], Tensor]
"""A function that returns the loss of every token of a micro-batch, `[rows, seq]`. The trainer takes the mean over all tokens
of the whole batch or, for a `WeightedLoss`, the sum with its weights."""


@runtime_checkable
class WeightedLoss(Protocol):
    """A `TokenLoss` that defines the weights with which its tokens are summed."""

    def __call__(self, policy: TokenStatistics, batch: Batch) -> Tensor: ...

    def token_weights(self, mask: Tensor) -> Tensor:
        """Weights `[batch, seq]` of the tokens of the whole batch, zero outside of its `mask`."""
        ...


@dataclass(frozen=True)
class GRPOLoss:
    """`importance weight * surrogate + kl_coefficient * KL - entropy_coefficient * entropy` of every token."""

    config: GRPOConfig

    def __call__(self, policy: TokenStatistics, batch: Batch) -> Tensor:
        """
        Raises:
            ValueError: the batch lacks a tensor that the config needs.
        """
        config = self.config
        total = self._surrogate(policy.log_probs, batch)
        if config.correction is not None:
            total = total * batch.need("importance_weights")
        if config.kl_coefficient and config.kl_in == "loss":
            reference = batch.need("reference_log_probs")
            kl = kl_penalty(policy.log_probs, reference, config.kl_estimator, straight_through=config.kl_straight_through)
            total = total + config.kl_coefficient * kl
        if config.entropy_coefficient:
            total = total - config.entropy_coefficient * policy.entropy
        return total

    def token_weights(self, mask: Tensor) -> Tensor:
        return token_weights(mask, self.config.aggregation, length=self.config.aggregation_length)

    def _surrogate(self, log_probs: Tensor, batch: Batch) -> Tensor:
        config, advantages = self.config, batch.need("advantages")
        if config.surrogate == "policy_gradient":
            return -advantages * log_probs
        ratio = step_ratio(config, log_probs, batch)
        bounds = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        if config.surrogate == "cispo":
            return clipped_weight_loss(log_probs, ratio, advantages, **bounds)
        return clipped_surrogate(ratio, advantages, **bounds, dual_clip=config.dual_clip)


def grpo_loss(config: GRPOConfig) -> GRPOLoss:
    """The loss of a step. The batch must hold `advantages`, `old_log_probs` and, where the config needs them,
    `reference_log_probs` and `importance_weights`."""
    return GRPOLoss(config)


def step_ratio(config: GRPOConfig, log_probs: Tensor, batch: Batch) -> Tensor:
    """`[rows, seq]`: the ratio of the policy to the one before the step, of tokens or of sequences as `config.ratio` says."""
    old = batch.need("old_log_probs")
    return sequence_ratio(log_probs, old, batch) if config.ratio == "sequence" else policy_ratio(log_probs, old)


def supervised_loss(policy: TokenStatistics, batch: Batch) -> Tensor:
    """Cross-entropy of the completion's tokens."""
    return -policy.log_probs


def policy_metrics(log_probs: Tensor, batch: Batch, config: GRPOConfig) -> dict[str, float]:
    """The metrics of `objectives.metrics.ratio_metrics` for a step on the whole batch, with the config's ratio and bounds; with
    `dual_clip` also `dual_clip_fraction`, the share of the tokens whose loss it bounds."""
    ratio, advantages = step_ratio(config, log_probs, batch), batch.need("advantages")
    metrics = ratio_metrics(
        ratio, log_probs, batch.need("old_log_probs"), advantages, batch.mask, config.clip_low, config.clip_high
    )
    if config.dual_clip is not None:
        bounded = (advantages < 0) & (ratio > config.dual_clip)
        metrics["dual_clip_fraction"] = masked_mean(bounded, batch.mask)
    return metrics
