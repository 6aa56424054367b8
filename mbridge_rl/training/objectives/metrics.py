"""Metrics of the difference between two policies. Unless stated otherwise every token in the mask has the same weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mbridge_rl.training.objectives.aggregation import masked_mean
from mbridge_rl.training.objectives.kl import MAX_LOG_RATIO, kl_penalty


def ratio_metrics(
    ratio: Tensor, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> dict[str, float]:
    """Metrics of the difference between the policy of a step and the policy in the ratio's denominator.

    Returns:
        `ratio_mean`, `ratio_max_deviation` (largest |ratio - 1|), `clip_fraction` (share of the tokens with a ratio outside of
        the bounds), `clip_fraction_low` and `clip_fraction_high` (share of those below and above where the advantage pushes
        further out, so that they have no gradient), `ppo_kl` (KL(old || new) by k1) and `policy_kl` (KL(new || old) by k3).
    """
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max_deviation": torch.where(mask, (ratio - 1).abs(), 0.0).amax().item() if mask.any() else 0.0,
        "clip_fraction": masked_mean(below | above, mask),
        "clip_fraction_low": masked_mean(below & (advantages < 0), mask),
        "clip_fraction_high": masked_mean(above & (advantages > 0), mask),
        "ppo_kl": masked_mean(old_log_probs - log_probs, mask),
        "policy_kl": masked_mean(kl_penalty(log_probs, old_log_probs), mask),
    }


def mismatch_metrics(train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Metrics of the difference between the trainer's policy and the engine's on the tokens that the engine sampled, with
    `r = p_train / p_rollout`.

    Returns:
        - `mismatch_mean`, `mismatch_max`: mean and maximum of |log r|.
        - `token_mult_prob_error`: mean of exp(|log r|), 1 where they agree (the metric of that name in NeMo-RL).
        - `kl_train_rollout`: KL(train || rollout) in nats by r log r - (r - 1), unbiased and never negative.
        - `kl_rollout_train`: KL(rollout || train) by k1, `mismatch_k3`: the same by k3, r - 1 - log r.
        - `ppl_ratio`: perplexity of the trainer over that of the engine, geometric mean over sequences.
        - `chi2_token`, `chi2_sequence`: mean of r^2 - 1 over tokens, and over sequences with the product of their r.
        - `ess`: effective sample size of the tokens under r as a share of them, (sum r)^2 / (n sum r^2); 1 where they agree.
    """
    log_ratio = torch.where(mask, train_log_probs - rollout_log_probs, 0.0).double()
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = clamped.exp()
    lengths = mask.sum(dim=1)
    nonempty = lengths > 0
    totals = log_ratio.sum(dim=1)
    masked_ratio = ratio[mask]
    return {
        "mismatch_mean": masked_mean(log_ratio.abs(), mask),
        "mismatch_max": log_ratio.abs().max().item() if log_ratio.numel() else 0.0,
        "token_mult_prob_error": masked_mean(clamped.abs().exp(), mask),
        "kl_train_rollout": masked_mean(ratio * clamped - torch.expm1(clamped), mask),
        "kl_rollout_train": masked_mean(-log_ratio, mask),
        "mismatch_k3": masked_mean(torch.expm1(clamped) - clamped, mask),
        "ppl_ratio": math.exp(-masked_mean(totals / lengths.clamp(min=1), nonempty)),
        "chi2_token": masked_mean(ratio.square() - 1, mask),
        "chi2_sequence": masked_mean((2 * totals.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp() - 1, nonempty),
        "ess": (
            (masked_ratio.sum().square() / (len(masked_ratio) * masked_ratio.square().sum())).item()
            if len(masked_ratio)
            else 1.0
        ),
    }
