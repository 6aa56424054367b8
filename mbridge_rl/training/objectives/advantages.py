"""Advantages: how much better a completion is than what could be expected of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group_mean", "leave_one_out", "none"]
Normalization = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    baseline: Baseline = "group_mean",
    normalize_std: Normalization = "group",
    epsilon: float = 1e-6,
) -> Tensor:
    """`(reward - baseline) / standard deviation`, exactly zero in groups whose rewards are all equal.

    Baselines: the mean of the group (GRPO, Shao et al., arXiv:2402.03300) or of the group's *other* completions, which keeps
    the gradient unbiased (RLOO, Ahmadian et al., arXiv:2402.14740). Deviations: of the group (GRPO), of the whole batch after
    its mean is taken away, too (REINFORCE++, Hu et al., arXiv:2501.03262), or none, which does not favour prompts that are
    nearly always or never solved (Dr. GRPO, Liu et al., arXiv:2503.20783).

    Args:
        rewards: `[groups * group_size]`, a group's rewards side by side. A reward that is not finite is unknown: its advantage
            is 0 and the others are compared without it.
        normalize_std: over which completions the sample deviation (n - 1) is taken. `"batch"` counts every completion once,
            however long it is.
        epsilon: added to the deviation.

    Returns:
        `[groups * group_size]` fp32.

    Raises:
        ValueError: the number of rewards is not a multiple of `group_size`.
    """
    groups = _groups(rewards, group_size)
    known = groups.isfinite()
    count = known.sum(dim=1, keepdim=True)
    values = torch.where(known, groups, 0.0)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = values if baseline == "none" else groups - mean
    if baseline == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    counts = known if baseline == "none" else known & _varies(groups)
    if normalize_std == "group":
        squares = torch.where(known, groups - mean, 0.0).square().sum(dim=1, keepdim=True)
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + epsilon)
    elif normalize_std == "batch" and known.any():
        centred = torch.where(counts, centred, 0.0)
        known_values = centred[known]
        deviation = known_values.std() if len(known_values) > 1 else known_values.new_zeros(())
        centred = (centred - known_values.mean()) / (deviation + epsilon)
    return torch.where(counts, centred, 0.0).view(-1).float()


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """`[groups]` bool: the groups whose rewards differ. The others give no gradient; DAPO's dynamic sampling (Yu et al.,
    arXiv:2503.14476) leaves them out and samples others in their place.

    Args:
        rewards: `[groups * group_size]`; unknown rewards (not finite) are not compared.
    """
    return _varies(_groups(rewards, group_size))[:, 0]


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {list(rewards.shape)} are not whole groups of {group_size}")
    return rewards.double().view(-1, group_size)


def _varies(groups: Tensor) -> Tensor:
    """`[groups, 1]` bool: whether the known rewards of a group differ. They are compared with each other and not with their
    mean, since the rounded mean of equal numbers need not equal them."""
    known = groups.isfinite()
    highest = torch.where(known, groups, -torch.inf).amax(dim=1, keepdim=True)
    return highest > torch.where(known, groups, torch.inf).amin(dim=1, keepdim=True)
