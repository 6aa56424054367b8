"""Every objective, value and gradient, against the papers' formulas written out here sequence by sequence in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objective_samples import GROUP, LENGTHS, Sample, Sequences
from paper_objectives import PAPERS, group_relative, k3, ppo
from tolerance import assert_near, rounding
from torch import Tensor

from mbridge_rl.training.batch import TokenStatistics
from mbridge_rl.training.objectives.aggregation import token_weights
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.correction import ImportanceCorrection, importance_weights
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.objectives.metrics import mismatch_metrics
from mbridge_rl.training.objectives.shaping import overlong_penalty

# The formulas are computed in fp64, but advantages and weights are handed on in fp32: a mean, a deviation and their ratio.
HANDED_ON = rounding(GROUP, 3)
DOUBLE = rounding(sum(LENGTHS), 3, torch.float64)

Estimate = Callable[[Tensor, Tensor], Tensor]
"""Of the KL from log-probabilities of the policy and the reference, per token."""


def assert_same(ours: Tensor, paper: Tensor, inputs: Sequences) -> None:
    """Checks that values and gradients are those of the paper's formula."""
    assert_near(ours, paper, HANDED_ON, scale=1.0)  # a mean of terms that are of order 1 and cancel
    gradients = torch.autograd.grad(ours, inputs, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(paper, inputs, allow_unused=True, materialize_grads=True)
    assert_near(torch.cat(gradients), torch.cat(expected), HANDED_ON, what="gradients")
    assert torch.cat(gradients).abs().max() > 1e-3


@pytest.mark.parametrize("name", PAPERS)
def test_equals_the_paper(name: str) -> None:
    config, paper = PAPERS[name]
    sample = Sample()
    assert_same(sample.ours(config), paper(sample), sample.policy)


def _token_mean(s: Sample, of_sequence: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over all tokens of what `of_sequence(index, log_probs, ratio)` says of a sequence's."""
    parts = [of_sequence(i, policy, (policy - s.old[i]).exp()) for i, policy in enumerate(s.policy)]
    return torch.cat(parts).sum() / sum(LENGTHS)


def _with_penalty(estimate: Estimate) -> Callable[[Sample], Tensor]:
    def loss(s: Sample) -> Tensor:
        advantages = group_relative(s.rewards, std=True)
        return _token_mean(
            s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28) + 0.3 * estimate(policy, s.reference[i])
        )

    return loss


def _dual_clip(s: Sample) -> Tensor:
    """arXiv:1912.09729, eq. 5."""
    advantages = group_relative(s.rewards, std=True)

    def of(i: int, policy: Tensor, ratio: Tensor) -> Tensor:
        gain = ppo(ratio, advantages[i], 0.2, 0.28)
        return -(gain if advantages[i] >= 0 else torch.max(gain, 1.5 * advantages[i]))

    return _token_mean(s, of)


def _entropy(s: Sample) -> Tensor:
    advantages = group_relative(s.rewards, std=True)
    return _token_mean(s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28) - 0.1 * s.entropy[i])


def _straight_through(estimate: Estimate) -> Estimate:
    """The value of `estimate`, the gradient of k2 (arXiv:2506.09477)."""
    return lambda p, r: estimate(p, r).detach() + (p - r) ** 2 / 2 - ((p - r) ** 2 / 2).detach()


def _kl_in_reward(estimate: Estimate) -> Callable[[Sample], Tensor]:
    def loss(s: Sample) -> Tensor:
        penalties = [estimate(old, reference).sum() for old, reference in zip(s.old, s.reference, strict=True)]
        advantages = group_relative(s.rewards - 0.3 * torch.stack(penalties), std=True)
        return _token_mean(s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28))

    return loss


ESTIMATES: dict[str, Estimate] = {
    "k1": lambda p, r: p - r,
    "k2": lambda p, r: (p - r) ** 2 / 2,
    "k3": k3,
    "abs": lambda p, r: (p - r).abs(),
}


def _kl(estimator: str, **changes: Any) -> dict[str, Any]:
    return {"kl_coefficient": 0.3, "kl_estimator": estimator, **changes}


PIECES: dict[str, tuple[dict[str, Any], Callable[[Sample], Tensor]]] = {
    **{name: (_kl(name), _with_penalty(estimate)) for name, estimate in ESTIMATES.items()},
    **{
        f"straight-through {name}": (_kl(name, kl_straight_through=True), _with_penalty(_straight_through(estimate)))
        for name, estimate in ESTIMATES.items()
    },
    **{f"{name} in reward": (_kl(name, kl_in="reward"), _kl_in_reward(estimate)) for name, estimate in ESTIMATES.items()},
    "dual clip": ({"dual_clip": 1.5}, _dual_clip),
    "entropy": ({"entropy_coefficient": 0.1}, _entropy),
}


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_equal_their_formulas(piece: str) -> None:
    changes, formula = PIECES[piece]
    sample = Sample()
    if piece == "dual clip":
        sample.old[1] = sample.old[1] - 1.0  # a bad completion that has become likely
        sample.batch = sample.batch.with_tensors(old_log_probs=sample.spread(sample.batch, sample.old))
        assert ((sample.policy[1] - sample.old[1]).exp() > 1.5).any()
    config = GRPOConfig(group_size=GROUP, **changes)
    assert_same(sample.ours(config), formula(sample), [*sample.policy, *sample.entropy])


def _weighted(weight: Callable[[Tensor], Tensor]) -> Callable[[Sample], Tensor]:
    """`weight` of a sequence's ratios p_train / p_rollout multiplies its surrogate."""

    def loss(s: Sample) -> Tensor:
        advantages = group_relative(s.rewards, std=True)
        return _token_mean(
            s, lambda i, _, ratio: -weight((s.old[i] - s.rollout[i]).exp()) * ppo(ratio, advantages[i], 0.2, 0.28)
        )

    return loss


def _between(values: Tensor, low: float, high: float) -> Tensor:
    return (values >= low) & (values <= high)


CORRECTIONS: dict[str, tuple[ImportanceCorrection, Callable[[Tensor], Tensor]]] = {
    "token truncation": (ImportanceCorrection(cap=1.3), lambda r: r.clamp(max=1.3)),
    "sequence truncation": (
        ImportanceCorrection(weight="sequence", cap=1.3),
        lambda r: r.prod().clamp(max=1.3).expand_as(r),
    ),
    "IcePop": (
        ImportanceCorrection(cap=2.0, mask="token", mask_low=0.7, mask_high=2.0),
        lambda r: torch.where(_between(r, 0.7, 2.0), r, 0.0),
    ),
    "sequence mask": (
        ImportanceCorrection(weight="none", mask="sequence", mask_low=0.5, mask_high=2.0),
        lambda r: _between(r.prod(), 0.5, 2.0).double().expand_as(r),
    ),
    "geometric mask": (
        ImportanceCorrection(weight="none", mask="geometric", mask_low=0.9, mask_high=1.2),
        lambda r: _between(r.prod() ** (1 / len(r)), 0.9, 1.2).double().expand_as(r),
    ),
    "veto": (
        ImportanceCorrection(weight="none", veto=0.5),
        lambda r: (r.min() >= 0.5).double().expand_as(r),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_equal_their_formulas(name: str) -> None:
    correction, weight = CORRECTIONS[name]
    sample = Sample()
    config = GRPOConfig(group_size=GROUP, correction=correction)
    assert_same(sample.ours(config), _weighted(weight)(sample), sample.policy)
    _, metrics = importance_weights(
        correction, sample.batch.need("old_log_probs"), sample.batch.need("rollout_log_probs"), sample.batch.mask
    )
    ratios = [(old - rollout).exp() for old, rollout in zip(sample.old, sample.rollout, strict=True)]
    dropped = torch.cat([weight(r) == 0 for r in ratios])
    assert_near(metrics["importance_masked"], dropped.double().mean().item(), DOUBLE)
    assert 0 <= metrics["importance_masked"] < 1
    assert dropped.any() or (correction.mask == "none" and not correction.veto)


def test_aggregations_equal_their_formulas() -> None:
    sample = Sample()
    values = [policy.detach() for policy in sample.policy]
    spread, mask = sample.spread(sample.batch, values), sample.batch.mask
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])  # a row where nothing counts is no sequence
    spread = torch.cat([spread, torch.ones_like(spread[:1])])
    sums = torch.stack([value.sum() for value in values])
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    expected = {
        "token-mean": sums.sum() / lengths.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-mean": (sums / lengths).mean(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / 20,
    }
    for aggregation, value in expected.items():
        length = 20 if aggregation.endswith("norm") else None
        weights = token_weights(mask, aggregation, length=length)  # type: ignore[arg-type]
        assert weights.dtype == torch.float64
        assert_near((weights * spread).sum(), value, DOUBLE, scale=(weights * spread).abs().sum().item())
        assert not weights[~mask].any()


def test_mismatch_metrics_equal_their_definitions() -> None:
    sample = Sample()
    old, rollout = torch.cat(sample.old), torch.cat(sample.rollout)
    ratio = (old - rollout).exp()
    totals = torch.stack([(a - b).sum() for a, b in zip(sample.old, sample.rollout, strict=True)])
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    metrics = mismatch_metrics(sample.batch.need("old_log_probs"), sample.batch.need("rollout_log_probs"), sample.batch.mask)
    expected = {
        "mismatch_mean": (old - rollout).abs().mean(),
        "mismatch_max": (old - rollout).abs().max(),
        "token_mult_prob_error": (old - rollout).abs().exp().mean(),
        "kl_train_rollout": (ratio * ratio.log() - ratio + 1).mean(),
        "kl_rollout_train": (rollout - old).mean(),
        "mismatch_k3": (ratio - 1 - ratio.log()).mean(),
        "ppl_ratio": (-(totals / lengths).mean()).exp(),
        "chi2_token": (ratio**2).mean() - 1,
        "chi2_sequence": ((2 * totals).exp() - 1).mean(),
        "ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        # Exponentials multiply errors by their arguments, of which the largest is twice the total of a sequence.
        assert_near(metrics[name], value, DOUBLE * 2 * totals.abs().max().item(), scale=max(1.0, value.item()), what=name)
    same = mismatch_metrics(sample.batch.need("old_log_probs"), sample.batch.need("old_log_probs"), sample.batch.mask)
    ones = {"token_mult_prob_error", "ppl_ratio", "ess"}
    for name, value in same.items():
        assert_near(value, 1.0 if name in ones else 0.0, DOUBLE, scale=1.0, what=name)


def test_extreme_numbers_are_bounded() -> None:
    far = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, -300.0]])
    for estimator in ("k1", "k2", "k3", "abs"):
        assert kl_penalty(far, other, estimator).isfinite().all()  # type: ignore[arg-type]
    assert kl_penalty(far, other, "k3").max() == 10.0
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights, _ = importance_weights(ImportanceCorrection(weight="sequence"), far, other, mask)
    assert weights.tolist() == [[1.0, 1.0]]
    assert all(math.isfinite(value) for value in mismatch_metrics(far, other, mask).values())


def test_overlong_penalty_is_the_papers() -> None:
    lengths = torch.tensor([1, 12, 13, 14, 16, 17, 30])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert overlong_penalty(lengths, max_length=16, buffer=4).tolist() == expected


def test_a_plain_function_is_a_loss_too() -> None:
    sample = Sample()
    policy = TokenStatistics(sample.spread(sample.batch, sample.policy), *torch.zeros(2, *sample.batch.tokens.shape))
    assert torch.equal(supervised_loss(policy, sample.batch), -policy.log_probs)
