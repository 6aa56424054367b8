"""Group relative policy optimization as pure functions of tensors: no model, no process group.

Sources: GRPO, Shao et al., DeepSeekMath (arXiv:2402.03300); the clipped ratio, Schulman et al., PPO (arXiv:1707.06347); the
wider upper clip and token-level aggregation, Yu et al., DAPO (arXiv:2503.14476); advantages without the standard deviation, Liu
et al., Dr. GRPO (arXiv:2503.20783); KL estimators, Schulman, http://joschu.net/blog/kl-approx.html.

Per-token tensors are `[batch, seq]` fp32; `mask [batch, seq]` bool marks the tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.logprobs import TokenStatistics

KLEstimator = Literal["k1", "k2", "k3"]
TokenLoss = Callable[[TokenStatistics, Batch], Tensor]
"""Loss of every token of a micro-batch, `[rows, seq]`; the trainer takes its mean over all tokens of the whole batch."""

_MAX_LOG_RATIO = 20.0
_MAX_K3 = 10.0


@dataclass(frozen=True)
class GRPOConfig:
    """What the GRPO step is made of.

    Attributes:
        group_size: completions per prompt; advantages compare them with each other.
        normalize_std: divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO).
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        kl_coefficient: weight of the KL to the reference policy; 0 needs none.
        kl_estimator: of that KL.
        entropy_coefficient: weight of an entropy bonus, which keeps the policy trying other answers.
        old_log_probs: the denominator of the ratio: `"rollout"` takes the engine's, `"recompute"` the trainer's own before
            the step (exactly 1 on the first step, whatever the engine's arithmetic).
    """

    group_size: int = 8
    normalize_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coefficient: float = 0.0
    old_log_probs: Literal["recompute", "rollout"] = "recompute"


def group_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """`(reward - mean of its group) / std of its group`; exactly zero where all rewards of a group are equal.

    Args:
        rewards: `[groups * group_size]`, a group's rewards side by side.

    Returns:
        `[groups * group_size]` fp32.

    Raises:
        ValueError: the rewards are not whole groups.
    """
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {list(rewards.shape)} are not whole groups of {group_size}")
    groups = rewards.float().view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    varies = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + epsilon)
    return torch.where(varies, advantages, 0.0).view(-1)


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """`exp(log_probs - old_log_probs)`, the log-ratio clamped to +-20 so that no token overflows."""
    return (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate per token, `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`.

    All arguments are `[batch, seq]`; only `log_probs` takes part in the gradient.
    """
    ratio = policy_ratio(log_probs, old_log_probs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Schulman's estimators of KL(policy || reference) per token, for tokens sampled from the policy.

    With `d = log p_reference - log p`: k1 = -d (unbiased), k2 = d^2 / 2, k3 = exp(d) - d - 1 (unbiased, never negative).

    Raises:
        ValueError: an unknown estimator.
    """
    difference = reference_log_probs - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return (difference.exp() - difference - 1).clamp(-_MAX_K3, _MAX_K3)
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Mean of `values` where `mask` is set: every token of the batch weighs the same."""
    return (torch.where(mask, values.double(), 0.0).sum() / mask.sum().clamp(min=1)).item()


def grpo_loss(config: GRPOConfig) -> TokenLoss:
    """The loss of a GRPO step: the clipped surrogate, plus the KL to the reference, minus the entropy bonus.

    The batch must hold `advantages`, `old_log_probs` and, with a KL coefficient, `reference_log_probs`.
    """

    def loss(policy: TokenStatistics, batch: Batch) -> Tensor:
        total = policy_loss(
            policy.log_probs,
            batch.need("old_log_probs"),
            batch.need("advantages"),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        if config.kl_coefficient:
            kl = kl_penalty(policy.log_probs, batch.need("reference_log_probs"), config.kl_estimator)
            total = total + config.kl_coefficient * kl
        if config.entropy_coefficient:
            total = total - config.entropy_coefficient * policy.entropy
        return total

    return loss


def supervised_loss(policy: TokenStatistics, batch: Batch) -> Tensor:
    """Cross-entropy of the completion's tokens."""
    return -policy.log_probs


def policy_metrics(log_probs: Tensor, batch: Batch, config: GRPOConfig) -> dict[str, float]:
    """How far the policy of the step is from the one that the ratio divides by.

    Returns:
        `ratio_max_deviation` (largest |ratio - 1|), `clip_fraction`, and `policy_kl` (k3).
    """
    mask, old = batch.mask, batch.need("old_log_probs")
    ratio = policy_ratio(log_probs, old)
    clipped = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
    return {
        "ratio_max_deviation": torch.where(mask, (ratio - 1).abs(), 0.0).max().item(),
        "clip_fraction": masked_mean(clipped, mask),
        "policy_kl": masked_mean(kl_penalty(log_probs, old), mask),
    }


def mismatch_metrics(train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the trainer's policy is from the engine's on the tokens that the engine sampled.

    With `r = p_train / p_rollout` at those tokens, `r log r - (r - 1)` estimates KL(train || rollout) without bias and is never
    negative, as Schulman's k3 is for the opposite direction.

    Returns:
        `mismatch_mean` and `mismatch_max` of |difference of log-probabilities|, and `kl_train_rollout` in nats.
    """
    log_ratio = torch.where(mask, train_log_probs - rollout_log_probs, 0.0).double()
    clamped = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    divergence = clamped.exp() * clamped - torch.expm1(clamped)
    return {
        "mismatch_mean": masked_mean(log_ratio.abs(), mask),
        "mismatch_max": log_ratio.abs().max().item(),
        "kl_train_rollout": masked_mean(divergence, mask),
    }
