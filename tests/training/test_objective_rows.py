"""Which rows and tokens of a batch count in an objective, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from objective_samples import GROUP, Sample
from tolerance import assert_near, rounding

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.advantages import group_advantages
from mbridge_rl.training.objectives.config import GRPOConfig, objective
from mbridge_rl.training.objectives.correction import ImportanceCorrection
from mbridge_rl.training.objectives.prepare import Selection, prepare_batch, select_rows


def test_unknown_rewards_count_for_nothing_and_are_counted() -> None:
    sample = Sample()
    rewards = sample.rewards.clone()
    rewards[1], rewards[9] = math.nan, math.inf
    config = GRPOConfig(group_size=GROUP)
    selection = select_rows(config, sample.batch, rewards)
    assert selection.metrics["rewards_not_finite"] == 2
    assert selection.metrics["constant_groups"] == 1
    batch = prepare_batch(config, selection.batch, selection.rewards).batch
    assert not batch.mask[[1, 9]].any()
    assert not batch.need("advantages")[[1, 9]].any()
    known = torch.tensor([1.0, 0.0, 0.5])
    expected = (known - known.mean()) / (known.std() + 1e-6)
    assert_near(group_advantages(rewards, GROUP)[[0, 2, 3]], expected, rounding(3, 3))
    leave_one_out = group_advantages(rewards, GROUP, baseline="leave_one_out", normalize_std="none")
    assert_near(leave_one_out[[0, 2, 3]], torch.tensor([0.75, -0.75, 0.0]), rounding(3))
    with pytest.raises(ValueError, match="none of the 12 rewards is finite"):
        select_rows(config, sample.batch, rewards * math.nan)


def test_groups_without_variance_are_dropped_and_counted() -> None:
    sample = Sample()
    config = objective("dapo", group_size=GROUP)
    selection = select_rows(config, sample.batch, sample.rewards)
    assert selection.metrics["dropped_groups"] == 1
    assert torch.equal(selection.batch.tokens, sample.batch.tokens[[0, 1, 2, 3, 8, 9, 10, 11]])
    constant = select_rows(config, sample.batch, torch.ones(12))
    assert constant.metrics["dropped_groups"] == 3
    assert len(constant.batch) == constant.batch.num_tokens == 0
    prepared = prepare_batch(config, constant.batch, constant.rewards)
    assert prepared.metrics == {"advantage_mean": 0.0, "advantage_max": 0.0}


def test_truncated_completions_can_be_masked() -> None:
    sample = Sample()
    truncated = torch.arange(12) % 3 == 0
    selection = select_rows(
        GRPOConfig(group_size=GROUP, mask_truncated=True), sample.batch, sample.rewards, truncated=truncated
    )
    assert selection.metrics["truncated_rows"] == 4
    assert torch.equal(selection.batch.mask.any(dim=1), ~truncated)
    with pytest.raises(ValueError, match="needs to know which completions were truncated"):
        select_rows(GRPOConfig(group_size=GROUP, mask_truncated=True), sample.batch, sample.rewards)


def test_truncated_completions_are_punished_replaced_or_ignored() -> None:
    rewards, truncated = torch.tensor([1.0, 0.5, 3.0, 0.25]), torch.tensor([True, False, False, True])
    batch = Batch.from_completions([[1]] * 4, [[2, 3]] * 4, pad_token_id=0)

    def shaped(**changes: Any) -> Selection:
        return select_rows(GRPOConfig(group_size=4, **changes), batch, rewards, truncated=truncated)

    assert shaped(truncation_penalty=0.5).rewards.tolist() == [0.5, 0.5, 3.0, -0.25]
    assert shaped(truncated_reward=0.0).rewards.tolist() == [0.0, 0.5, 3.0, 0.0]
    assert shaped(truncated_reward=0.0, truncation_penalty=1.0).rewards.tolist() == [-1.0, 0.5, 3.0, -1.0]
    ignored = shaped(ignore_truncated=True)
    assert ignored.metrics["rewards_not_finite"] == 0
    assert ignored.batch.mask.any(dim=1).tolist() == [False, True, True, False]
    prepared = prepare_batch(GRPOConfig(group_size=4, normalize_std="none"), ignored.batch, ignored.rewards)
    assert prepared.batch.need("advantages")[:, 0].tolist() == [0.0, -1.25, 1.25, 0.0]  # of 0.5 and 3 alone


def test_numbers_that_are_none_are_refused_by_name() -> None:
    sample = Sample()
    old = sample.batch.need("old_log_probs").clone()
    old[sample.batch.mask.nonzero()[5].unbind()] = math.nan
    with pytest.raises(ValueError, match="old_log_probs of 1 tokens are not finite, first in row 1"):
        prepare_batch(GRPOConfig(group_size=GROUP), sample.batch.with_tensors(old_log_probs=old), sample.rewards)
    old = torch.where(sample.batch.mask, 0.0, math.nan)  # outside of the mask nobody looks
    sample.batch.with_tensors(old_log_probs=old).check_finite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "reinforce"}, "surrogate='reinforce' is none of 'clip', 'cispo', 'policy_gradient'"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"group_size": 1}, "nothing to compare"),
        ({"mini_batches": 0}, "mini_batches=0 and epochs=1 must be at least 1"),
        ({"epochs": 0}, "mini_batches=1 and epochs=0 must be at least 1"),
        ({"group_size": 1, "baseline": "none", "normalize_std": "batch", "dynamic_sampling": True}, "leaves out every group"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"dual_clip": 1.1}, r"dual_clip=1.1 must exceed 1 \+ clip_high"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip belongs to surrogate='clip'"),
        ({"ratio": "sequence", "surrogate": "cispo"}, "ratio='sequence' needs surrogate='clip'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "aggregation_length=None"),
        ({"aggregation_length": 5}, "aggregation='token-mean' with aggregation_length=5"),
        ({"kl_coefficient": -0.1}, "must not be negative"),
        ({"kl_in": "reward"}, "kl_in='reward' with kl_coefficient=0"),
        ({"kl_in": "reward", "kl_coefficient": 0.1, "kl_straight_through": True}, "kl_straight_through is about gradients"),
        ({"old_log_probs": "rollout", "correction": ImportanceCorrection()}, "would count twice"),
        ({"overlong_buffer": 4}, "overlong_buffer=4 needs overlong_length"),
        ({"mask_truncated": True, "ignore_truncated": True}, "ignore_truncated leaves mask_truncated nothing to do"),
        ({"truncated_reward": 0.0, "ignore_truncated": True}, "rewards that ignore_truncated ignores"),
        ({"truncation_penalty": -1.0}, "truncation_penalty=-1.0 must not be negative"),
        ({"overlong_buffer": 4, "overlong_length": 3}, "overlong_buffer=4 is longer than overlong_length=3"),
    ],
)
def test_contradictory_objectives_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


def test_unknown_objectives_and_empty_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown objective 'ppo': choose grpo, dr_grpo"):
        objective("ppo")
    with pytest.raises(ValueError, match="aggregation_length=None"):
        objective("dr_grpo")
    with pytest.raises(ValueError, match="corrects nothing"):
        ImportanceCorrection(weight="none")
    with pytest.raises(ValueError, match="mask_low < mask_high"):
        ImportanceCorrection(mask="token", mask_low=2.0, mask_high=1.0)
    with pytest.raises(ValueError, match="12 rewards for 3 rows"):
        select_rows(GRPOConfig(group_size=GROUP), Sample().batch.rows(slice(0, 3)), Sample().rewards)
