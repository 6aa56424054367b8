"""Reward shaping: changes of rewards before they are compared with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from mbridge_rl.training.objectives.kl import KLEstimator, kl_penalty


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of length (arXiv:2503.14476, eq. 13): 0 up to `max_length - buffer` tokens, then falling linearly
    to -1 at `max_length`, and -1 beyond.

    Args:
        lengths: `[batch]`, the completions' numbers of tokens.
        buffer: tokens before the limit in which the penalty grows.

    Returns:
        `[batch]` fp32, to be added to the rewards.
    """
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def truncated_rewards(
    rewards: Tensor, truncated: Tensor, reward: float | None, penalty: float, *, ignore: bool = False
) -> Tensor:
    """The rewards `[batch]`, changed for completions that were cut off: `reward` takes the place of their own (unless their own
    is unknown), and `penalty` is subtracted. With `ignore` they become NaN, which means unknown. DAPO (arXiv:2503.14476,
    section 3.4) compares such treatments.

    Args:
        rewards: `[batch]`.
        truncated: `[batch]` bool.
    """
    if ignore:
        return torch.where(truncated, torch.nan, rewards)
    instead = rewards if reward is None else torch.where(rewards.isfinite(), reward, rewards)
    return torch.where(truncated, instead - penalty, rewards)


def kl_rewards(
    rewards: Tensor, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, coefficient: float, estimator: KLEstimator
) -> Tensor:
    """`reward - coefficient * sum of the KL estimates of the completion's tokens` (RLHF; RLOO, arXiv:2402.14740), `[batch]`."""
    kl = torch.where(mask, kl_penalty(log_probs, reference_log_probs, estimator), 0.0).sum(dim=1)
    return rewards - coefficient * kl
