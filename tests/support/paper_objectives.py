"""The objectives as their papers write them, sequence by sequence, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from objective_samples import GROUP, LENGTHS, Sample
from torch import Tensor

from mbridge_rl.training.objectives.config import GRPOConfig, objective

MAX_LENGTH = 9


def group_relative(rewards: Tensor, *, std: bool) -> Tensor:
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6) if std else centred).view(-1)


def ppo(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    return (reference - policy).exp() - (reference - policy) - 1


def paper_grpo(s: Sample) -> Tensor:
    """arXiv:2402.03300, eq. 3."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        ratio = (policy - s.old[i]).exp()
        total = total + (ppo(ratio, advantages[i], 0.2, 0.2) - 0.04 * k3(policy, s.reference[i])).sum() / LENGTHS[i]
    return -total / len(LENGTHS)


def paper_dr_grpo(s: Sample) -> Tensor:
    """arXiv:2503.20783: neither the deviation nor the length divides."""
    advantages, total = group_relative(s.rewards, std=False), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        total = total + ppo((policy - s.old[i]).exp(), advantages[i], 0.2, 0.2).sum() / MAX_LENGTH
    return -total / len(LENGTHS)


def paper_dapo(s: Sample) -> Tensor:
    """arXiv:2503.14476, eqs. 8, 9 and 13: groups with a gradient alone, mean over tokens, soft overlong punishment."""
    punished = s.rewards.clone()
    for i, length in enumerate(LENGTHS):
        if length > MAX_LENGTH - 4:
            punished[i] += (MAX_LENGTH - 4 - length) / 4
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    advantages = dict(zip(rows, group_relative(punished[rows], std=True), strict=True))
    total = sum(ppo((s.policy[i] - s.old[i]).exp(), advantages[i], 0.2, 0.28).sum() for i in rows)
    return -total / sum(LENGTHS[i] for i in rows)


def paper_gspo(s: Sample) -> Tensor:
    """arXiv:2507.18071, eqs. 5 to 7, the ratio differentiated as a whole."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        ratio = (policy.sum() - s.old[i].sum()).div(LENGTHS[i]).exp()
        total = total + ppo(ratio, advantages[i], 0.1, 0.15)
    return -total / len(LENGTHS)


def paper_cispo(s: Sample) -> Tensor:
    """arXiv:2506.13585, eqs. 4 and 5, without the lower bound."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        weight = (policy - s.old[i]).exp().detach().clamp(max=1.2)
        total = total + (weight * advantages[i] * policy).sum()
    return -total / sum(LENGTHS)


def paper_rloo(s: Sample) -> Tensor:
    """arXiv:2402.14740: REINFORCE of whole completions against the mean reward of the others."""
    total = torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        group = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
        others = sum(s.rewards[j] for j in group if j != i) / (GROUP - 1)
        total = total + (s.rewards[i] - others) * policy.sum()
    return -total / len(LENGTHS)


def paper_reinforce_plus_plus(s: Sample) -> Tensor:
    """arXiv:2501.03262: the deviation is that of the whole batch."""
    centred = group_relative(s.rewards, std=False)
    advantages = (centred - centred.mean()) / (centred.std() + 1e-6)
    total = sum(ppo((p - s.old[i]).exp(), advantages[i], 0.2, 0.2).sum() for i, p in enumerate(s.policy))
    return -total / sum(LENGTHS)


PAPERS: dict[str, tuple[GRPOConfig, Callable[[Sample], Tensor]]] = {
    "grpo": (objective("grpo", group_size=GROUP), paper_grpo),
    "dr_grpo": (objective("dr_grpo", group_size=GROUP, aggregation_length=MAX_LENGTH), paper_dr_grpo),
    "dapo": (objective("dapo", group_size=GROUP, overlong_length=MAX_LENGTH, overlong_buffer=4), paper_dapo),
    "gspo": (objective("gspo", group_size=GROUP, clip_low=0.1, clip_high=0.15), paper_gspo),
    "cispo": (objective("cispo", group_size=GROUP, clip_high=0.2), paper_cispo),
    "rloo": (objective("rloo", group_size=GROUP), paper_rloo),
    "reinforce++": (objective("reinforce++", group_size=GROUP), paper_reinforce_plus_plus),
}
