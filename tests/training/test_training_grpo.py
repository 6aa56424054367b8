"""GRPO's arithmetic, and batches, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_near, rounding

from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.objectives.advantages import group_advantages
from mbridge_rl.training.objectives.aggregation import masked_mean
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.loss import grpo_loss, policy_metrics
from mbridge_rl.training.objectives.metrics import mismatch_metrics
from mbridge_rl.training.objectives.surrogates import clipped_surrogate, policy_ratio

# Log-probabilities are fp32, what is made of them is summed in fp64: two are rounded, and their difference.
ROUNDING = rounding(3)


def test_advantages_compare_within_a_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 3.0, 1.0])
    std = math.sqrt(1 / 3)
    expected = torch.tensor([2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 1.0, 0.0, -1.0])
    # The library adds 1e-6 to the deviation, which is 0.58.
    assert_near(group_advantages(rewards, 3), expected, rounding(3, 3) + 1e-6 / std)
    without_std = group_advantages(rewards, 3, normalize_std="none")
    assert_near(without_std, torch.tensor([2 / 3, -1 / 3, -1 / 3, 2.0, 0.0, -2.0]), rounding(3))


def test_groups_without_variance_give_exact_zeros() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])  # whose fp32 mean is not the reward
    for normalize_std in ("group", "batch", "none"):
        assert torch.equal(group_advantages(rewards, 3, normalize_std=normalize_std), torch.zeros(6))


def test_rewards_must_be_whole_groups() -> None:
    with pytest.raises(ValueError, match="not whole groups of 4"):
        group_advantages(torch.zeros(6), 4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 2.0, -1.28 * 2.0, False),  # good and already likelier: nothing more to gain
        (0.5, 2.0, -0.5 * 2.0, True),
        (1.5, -2.0, 1.5 * 2.0, True),
        (0.5, -2.0, 0.8 * 2.0, False),  # bad and already less likely
    ],
)
def test_the_ratio_is_clipped_where_it_would_overshoot(ratio: float, advantage: float, expected: float, gradient: bool) -> None:
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    ratio = policy_ratio(log_probs, torch.zeros(1))
    loss = clipped_surrogate(ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.28)
    loss.sum().backward()
    assert_near(loss.item(), expected, rounding(1, 3))  # logarithm, exponential, product
    assert bool(log_probs.grad) == gradient


def test_extreme_log_ratios_stay_finite() -> None:
    log_probs = torch.tensor([0.0, -500.0], requires_grad=True)
    ratio = policy_ratio(log_probs, torch.tensor([-500.0, 0.0]))
    loss = clipped_surrogate(ratio, torch.tensor([-1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_probs.grad.isfinite().all()
    assert kl_penalty(log_probs, torch.tensor([500.0, -500.0])).max().item() == 10.0


def test_kl_estimators_estimate_the_kl() -> None:
    """Expectations over the policy, exactly: k1 and k3 are unbiased."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator).log_softmax(-1)
    true_kl = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy.exp() * kl_penalty(policy, reference, estimator)).sum()
        # Sums of terms as large as the largest ratio, which cancel.
        assert_near(estimate, true_kl, rounding(9, 3), scale=(policy - reference).abs().exp().max().item())
    assert_near(kl_penalty(policy, reference, "k2"), (policy - reference) ** 2 / 2, rounding(1, 3))
    assert (kl_penalty(policy, reference, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(policy, reference, "k4")  # type: ignore[arg-type]


def test_mismatch_estimates_the_kl_from_the_trainer_to_the_engine() -> None:
    """With every token present in proportion to the engine's probability, the estimate is the KL itself."""
    engine = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    train = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    drawn = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])
    mask = torch.tensor([True] * 8 + [False])
    metrics = mismatch_metrics(train[drawn][None], engine[drawn][None], mask[None])
    assert_near(metrics["kl_train_rollout"], (train.exp() * (train - engine)).sum().item(), ROUNDING, scale=math.log(8))
    assert_near(metrics["mismatch_max"], math.log(2), ROUNDING, scale=math.log(8))
    assert_near(metrics["mismatch_mean"], math.log(2) * 6 / 8, ROUNDING, scale=math.log(8))


def _batch() -> Batch:
    return Batch.from_completions(
        [[5, 6], [7, 8, 9]], [[10, 11], [12]], pad_token_id=0, length=6, log_probs=[[-0.1, -0.2], [-0.3]]
    )


def test_batches_align_with_the_prediction() -> None:
    batch = _batch()
    assert batch.tokens.tolist() == [[5, 6, 10, 11, 0, 0], [7, 8, 9, 12, 0, 0]]
    assert batch.need("targets")[batch.mask].tolist() == [10, 11, 12]
    assert torch.equal(batch.need("rollout_log_probs")[batch.mask], torch.tensor([-0.1, -0.2, -0.3]))
    assert batch.mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert batch.spread(torch.tensor([1.0, 2.0]))[batch.mask].tolist() == [1.0, 1.0, 2.0]
    assert batch.num_tokens == 3


def test_a_completion_that_ends_the_row_is_predicted_from_before_it() -> None:
    batch = Batch.from_completions([[3]], [[4, 5]], pad_token_id=0)
    assert batch.mask.tolist() == [[True, True, False]]
    full = Batch(batch.tokens, torch.ones(1, 3, dtype=torch.bool))
    assert full.mask.tolist() == [[True, True, False]]  # the last position has nothing to predict


def test_bad_batches_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="has 4 tokens, the batch is padded to 3"):
        Batch.from_completions([[1, 2]], [[3, 4]], pad_token_id=0, length=3)
    with pytest.raises(ValueError, match="a prompt is empty"):
        Batch.from_completions([[]], [[3, 4]], pad_token_id=0)
    with pytest.raises(ValueError, match="advantages has shape"):
        _batch().with_tensors(advantages=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="has no advantages"):
        grpo_loss(GRPOConfig())(TokenStatistics(*torch.zeros(3, 2, 6)), _batch())


def test_the_loss_adds_kl_and_subtracts_entropy() -> None:
    config = GRPOConfig(kl_coefficient=0.5, kl_estimator="k1", entropy_coefficient=0.25)
    ones = torch.ones(2, 6)
    batch = _batch().with_tensors(advantages=3 * ones, old_log_probs=-ones, reference_log_probs=-3 * ones)
    policy = TokenStatistics(-ones, 8 * ones, ones.bool())
    assert torch.equal(grpo_loss(config)(policy, batch), (-3.0 + 0.5 * 2.0 - 0.25 * 8.0) * ones)


def test_metrics_look_at_the_mask_only() -> None:
    batch = _batch().with_tensors(old_log_probs=torch.full((2, 6), -1.0), advantages=torch.ones(2, 6))
    log_probs = torch.where(batch.mask, -1.0, 50.0)
    metrics = policy_metrics(log_probs, batch, GRPOConfig())
    assert metrics.pop("ratio_mean") == 1.0
    assert set(metrics.values()) == {0.0}
    log_probs[0, 1] = -1.0 + math.log(1.5)
    metrics = policy_metrics(log_probs, batch, GRPOConfig())
    assert metrics["clip_fraction"] == metrics["clip_fraction_high"] == 1 / 3
    assert metrics["clip_fraction_low"] == 0.0  # the ratio is too high, not too low
    assert_near(metrics["ppo_kl"], -math.log(1.5) / 3, ROUNDING, scale=1.0)
    assert masked_mean(log_probs, torch.zeros_like(batch.mask)) == 0.0
