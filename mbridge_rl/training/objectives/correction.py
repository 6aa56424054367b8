"""Importance correction: the engine that sampled is not quite the policy that is trained (other arithmetic, older weights)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mbridge_rl.training.objectives.aggregation import masked_mean
from mbridge_rl.training.objectives.kl import MAX_LOG_RATIO


@dataclass(frozen=True)
class ImportanceCorrection:
    """How each token's policy loss is weighted, with `r = p_train / p_rollout` of the sampled tokens (log-ratios within +-20).

    Weights: truncated importance sampling, `min(r, cap)` per token (Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training", 2025) or with the product of `r` over the sequence. Masks give zero weight outside of
    `[mask_low, mask_high]`: to a token by its `r` (IcePop, Ling team, arXiv:2510.18855), to a sequence by the product of its
    `r`, or by their geometric mean, which does not depend on its length (Liu et al., "When Speed Kills Stability", 2025). The
    denominators of the aggregation do not change, as in IcePop.

    Attributes:
        weight: which ratio becomes the weight; with `"none"` only the mask and the veto act.
        cap: largest weight.
        mask: which ratio the mask compares with its bounds; `"none"` masks nothing.
        mask_low, mask_high: bounds of the ratio, inclusive.
        veto: sequences with any token whose `r` is below it get zero weight; 0 vetoes none.

    Raises:
        ValueError: nothing is corrected, or no ratio can lie between the bounds.
    """

    weight: Literal["none", "token", "sequence"] = "token"
    cap: float = 2.0
    mask: Literal["none", "token", "sequence", "geometric"] = "none"
    mask_low: float = 0.5
    mask_high: float = 5.0
    veto: float = 0.0

    def __post_init__(self) -> None:
        if self.weight not in ("none", "token", "sequence") or self.mask not in ("none", "token", "sequence", "geometric"):
            raise ValueError(f"unknown importance correction: weight {self.weight!r}, mask {self.mask!r}")
        if self.weight == "none" and self.mask == "none" and self.veto == 0:
            raise ValueError("this importance correction corrects nothing: choose a weight, a mask or a veto, or give none")
        if self.cap <= 0 or not 0 <= self.mask_low < self.mask_high or not 0 <= self.veto < 1:
            raise ValueError(
                f"importance correction needs cap > 0, 0 <= mask_low < mask_high and 0 <= veto < 1, "
                f"found {self.cap}, {self.mask_low}, {self.mask_high}, {self.veto}"
            )


def importance_weights(
    correction: ImportanceCorrection, train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Importance weights of a batch of whole sequences, and metrics of them.

    Returns:
        Weights `[batch, seq]` fp32 without gradient, zero outside of the mask; and the metrics `importance_weight_mean`,
        `importance_truncated` (share of the tokens at the cap) and `importance_masked` (share of the tokens with zero weight).
    """
    log_ratio = torch.where(mask, (train_log_probs - rollout_log_probs).detach().double(), 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    total = log_ratio.sum(dim=1, keepdim=True)
    log_ratios = {
        "none": torch.zeros_like(log_ratio),
        "token": log_ratio,
        "sequence": total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(log_ratio),
        "geometric": (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(log_ratio),
    }
    ratio = log_ratios[correction.weight].exp()
    weights = ratio.clamp(max=correction.cap) if correction.weight != "none" else ratio
    weighted = mask
    if correction.mask != "none":
        mask_ratio = log_ratios[correction.mask].exp()
        weighted = weighted & (mask_ratio >= correction.mask_low) & (mask_ratio <= correction.mask_high)
    if correction.veto:
        weighted = weighted & (log_ratio.exp() >= correction.veto).all(dim=1, keepdim=True)
    weights = torch.where(weighted, weights, 0.0)
    metrics = {
        "importance_weight_mean": masked_mean(weights, mask),
        "importance_truncated": masked_mean(ratio > correction.cap, mask) if correction.weight != "none" else 0.0,
        "importance_masked": masked_mean(~weighted, mask),
    }
    return weights.float(), metrics
