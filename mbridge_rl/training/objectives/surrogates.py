"""The policy's part of the loss: probability ratios, and the losses that are computed from ratio and advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.kl import MAX_LOG_RATIO


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """`exp(log_probs - old_log_probs)`, the log-ratio clamped to +-20 so that no token overflows."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, batch: Batch) -> Tensor:
    """GSPO's ratio, the same at every token of a sequence: `exp(mean over its tokens of the log-ratio)` (Zheng et al.,
    arXiv:2507.18071).

    Its gradient goes through the token's own log-probability alone (the paper's GSPO-token), so that none has to be
    communicated: with one advantage per sequence the gradient of the sum is that of GSPO itself.
    """
    difference = (log_probs - old_log_probs).detach()
    mean = batch.sequence_sum(difference) / batch.sequence_sum(torch.ones_like(difference)).clamp(min=1)
    mean = mean.to(log_probs.dtype)
    return (mean + (log_probs - log_probs.detach())).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped surrogate as a loss, `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` (Schulman et al.,
    arXiv:1707.06347; a separate upper bound, "clip-higher": DAPO, arXiv:2503.14476).

    Args:
        dual_clip: bounds the loss of a token with a negative advantage that has become very likely by `dual_clip * |A|` (Ye et
            al., arXiv:1912.09729); `None` sets no such bound.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def clipped_weight_loss(log_probs: Tensor, ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """CISPO's loss `-clip(ratio, 1 - clip_low, 1 + clip_high) * A * log p`. The clipped weight has no gradient, so that a
    clipped token still has one (MiniMax-M1, arXiv:2506.13585). `clip_low=1` leaves the weight without a lower bound, as the
    paper does.
    """
    return -(ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * log_probs)
