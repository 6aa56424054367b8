"""Estimators of the KL divergence between two policies from the tokens that one of them sampled."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]

MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def kl_penalty(
    log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator = "k3", *, straight_through: bool = False
) -> Tensor:
    """KL(policy || reference) per token, for tokens sampled from the policy (Schulman, http://joschu.net/blog/kl-approx.html).

    With `d = log p_reference - log p`: k1 = -d (unbiased), k2 = d^2 / 2, k3 = exp(d) - d - 1 (unbiased, never negative; `d`
    within +-20 and the value within +-10, so that no token overflows), abs = |d|.

    Args:
        straight_through: take the value from the estimator and the gradient from k2: of all these only k2's gradient estimates
            the gradient of the KL without bias for tokens of the policy itself (Tang and Munos, arXiv:2506.09477).

    Raises:
        ValueError: the estimator is unknown.
    """
    difference = reference_log_probs - log_probs
    if estimator == "k1":
        value = -difference
    elif estimator == "k2":
        value = difference.square() / 2
    elif estimator == "abs":
        value = difference.abs()
    elif estimator == "k3":
        clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        value = (clamped.exp() - clamped - 1).clamp(-MAX_K3, MAX_K3)
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}: choose {', '.join(get_args(KLEstimator))}")
    if not straight_through:
        return value
    surrogate = difference.square() / 2
    return value.detach() + (surrogate - surrogate.detach())
