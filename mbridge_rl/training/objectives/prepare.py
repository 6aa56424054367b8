"""Prepares a batch of rewarded rollouts for the loss.

Everything that compares completions with each other is computed here, on the whole batch, which every rank holds. So the later
split over ranks and micro-batches does not change it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.advantages import group_advantages, informative_groups
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.correction import importance_weights
from mbridge_rl.training.objectives.shaping import kl_rewards, overlong_penalty, truncated_rewards


@dataclass(frozen=True)
class Selection:
    """Attributes:
    batch: the rows to train on; empty where every group was left out.
    rewards: `[rows]` fp32, the shaped rewards; not finite where unknown.
    metrics: counts of rows and groups that were left out, by reason.
    """

    batch: Batch
    rewards: Tensor
    metrics: dict[str, float]


def select_rows(config: GRPOConfig, batch: Batch, rewards: Tensor, *, truncated: Tensor | None = None) -> Selection:
    """Leaves out rows that cannot be trained on, and shapes the rewards.

    A completion whose reward is not finite has no effect: its mask becomes empty, and its group is compared without it.

    Args:
        batch: whole groups, side by side.
        rewards: `[batch]`.
        truncated: `[batch]` bool, completions that were cut off.

    Returns:
        The rows with their rewards, and the metrics `rewards_not_finite`, `constant_groups` (whose rewards are all equal),
        `dropped_groups`, `truncated_rows`, `overlong_rows` (with a penalty).

    Raises:
        ValueError: the rewards are not one per row, do not form whole groups, or are all not finite; or the config treats
            truncated completions differently and `truncated` is missing.
    """
    if len(rewards) != len(batch):
        raise ValueError(f"{len(rewards)} rewards for {len(batch)} rows")
    if config.knows_truncation and truncated is None:
        raise ValueError("this objective needs to know which completions were truncated")
    rewards = rewards.float()
    unknown = ~rewards.isfinite()
    if len(batch) and unknown.all():
        raise ValueError(f"none of the {len(rewards)} rewards is finite: the reward function is broken")
    if truncated is not None:
        rewards = truncated_rewards(
            rewards, truncated, config.truncated_reward, config.truncation_penalty, ignore=config.ignore_truncated
        )
    informative = informative_groups(rewards, config.group_size)
    metrics = {
        "rewards_not_finite": float(unknown.sum()),
        "constant_groups": float((~informative).sum()),
        "truncated_rows": 0.0 if truncated is None else float(truncated.sum()),
        "overlong_rows": 0.0,
        "dropped_groups": 0.0,
    }
    if config.overlong_length is not None:
        penalty = overlong_penalty(batch.mask.sum(dim=1), config.overlong_length, config.overlong_buffer)
        rewards = rewards + config.overlong_penalty * penalty
        metrics["overlong_rows"] = float((penalty < 0).sum())
    batch = batch.without_rows(unknown)
    if (config.mask_truncated or config.ignore_truncated) and truncated is not None:
        batch = batch.without_rows(truncated)
    if config.dynamic_sampling:
        metrics["dropped_groups"] = metrics["constant_groups"]
        informative_rows = informative.repeat_interleave(config.group_size)
        batch, rewards = batch.rows(informative_rows), rewards[informative_rows]
    return Selection(batch, rewards, metrics)


@dataclass(frozen=True)
class Prepared:
    """Attributes:
    batch: the batch with all tensors that `grpo_loss` needs.
    metrics: metrics of the advantages and of the importance correction.
    """

    batch: Batch
    metrics: dict[str, float]


def prepare_batch(config: GRPOConfig, batch: Batch, rewards: Tensor) -> Prepared:
    """Adds advantages and, where the config has a correction, importance weights.

    Args:
        batch: a batch with `old_log_probs`, and with `rollout_log_probs` and `reference_log_probs` where the config needs them.
        rewards: `[batch]`, as `select_rows` returned them.

    Raises:
        ValueError: a tensor is missing, or not finite at a token in the mask.
    """
    batch.check_finite()
    metrics: dict[str, float] = {}
    if config.kl_in == "reward":
        old, reference = batch.need("old_log_probs"), batch.need("reference_log_probs")
        rewards = kl_rewards(rewards, old, reference, batch.mask, config.kl_coefficient, config.kl_estimator)
    advantages = group_advantages(rewards, config.group_size, baseline=config.baseline, normalize_std=config.normalize_std)
    if config.correction is not None:
        weights, metrics = importance_weights(
            config.correction, batch.need("old_log_probs"), batch.need("rollout_log_probs"), batch.mask
        )
        batch = batch.with_tensors(importance_weights=weights)
    has_rows = len(advantages) > 0
    metrics = {
        **metrics,
        "advantage_mean": advantages.mean().item() if has_rows else 0.0,
        "advantage_max": advantages.abs().max().item() if has_rows else 0.0,
    }
    return Prepared(batch.with_tensors(advantages=batch.spread(advantages)), metrics)
