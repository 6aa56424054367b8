"""Samplers choose the next problems. They live on the first rank; their state goes into checkpoints, so that a resumed run goes
on with the same problems as a run without an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mbridge_rl.training.rollout.rewards import Problem


class EpochSampler:
    """Draws all problems in random order, then all again in another random order, and so on."""

    def __init__(self, problems: Sequence[Problem], *, seed: int = 0) -> None:
        self._problems, self._seed, self._drawn = list(problems), seed, 0
        self._epoch, self._order = -1, []

    def draw(self, count: int) -> list[Problem]:
        drawn = [self._at(position) for position in range(self._drawn, self._drawn + count)]
        self._drawn += count
        return drawn

    def update(self, problem: Problem, mean_reward: float) -> None:
        """Does nothing: the order does not depend on rewards."""

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]

    def _at(self, position: int) -> Problem:
        epoch, place = divmod(position, len(self._problems))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._problems), generator=generator).tolist()
        return self._problems[self._order[place]]


class UnsolvedFirstSampler:
    """Draws problems at random, more often those with a lower mean reward when they were last drawn.

    Where all completions of a group get the same reward there is no gradient; DAPO (arXiv:2503.14476) throws such groups away
    after sampling, this sampler avoids most of them before.

    Args:
        floor: weight of solved problems; unsolved problems have a weight of `1 + floor`.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int = 0, floor: float = 0.05) -> None:
        self._problems, self._floor = list(problems), floor
        self._index = {problem.prompt: index for index, problem in enumerate(self._problems)}
        self._weights = torch.ones(len(self._problems))
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> list[Problem]:
        """Draws `count` problems, all different as long as there are so many."""
        drawn: list[int] = []
        while len(drawn) < count:
            missing = min(count - len(drawn), len(self._problems))
            drawn += torch.multinomial(self._weights, missing, generator=self._generator).tolist()
        return [self._problems[index] for index in drawn]

    def update(self, problem: Problem, mean_reward: float) -> None:
        """Sets the weight of a problem by the mean reward of its last group, clamped to 0..1."""
        self._weights[self._index[problem.prompt]] = 1 - min(max(mean_reward, 0.0), 1.0) + self._floor

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = state["weights"].clone()
        self._generator.set_state(state["generator"])
