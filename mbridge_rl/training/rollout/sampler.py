"""Which problems come next. Samplers live on the first rank; their state goes into checkpoints, so that a resumed run goes on
with the problems that an undisturbed one would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mbridge_rl.training.rollout.rewards import Problem


class EpochSampler:
    """All problems in random order, then all again in another one."""

    def __init__(self, problems: Sequence[Problem], *, seed: int = 0) -> None:
        self._problems, self._seed, self._drawn = list(problems), seed, 0
        self._epoch, self._order = -1, []

    def draw(self, count: int) -> list[Problem]:
        drawn = [self._at(position) for position in range(self._drawn, self._drawn + count)]
        self._drawn += count
        return drawn

    def update(self, problem: Problem, mean_reward: float) -> None:
        """Makes no difference."""

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
    """Draws problems, those more often that the policy solved less of when it last met them.

    Where all completions of a group get the same reward there is no gradient; DAPO (arXiv:2503.14476) throws such groups away
    after sampling, this avoids most of them before.

    Args:
        floor: what solved problems weigh, compared with 1 for those of which nothing was solved.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int = 0, floor: float = 0.05) -> None:
        self._problems, self._floor = list(problems), floor
        self._index = {problem.prompt: index for index, problem in enumerate(self._problems)}
        self._weights = torch.ones(len(self._problems))
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> list[Problem]:
        """`count` problems, all different as long as there are so many."""
        drawn: list[int] = []
        while len(drawn) < count:
            some = min(count - len(drawn), len(self._problems))
            drawn += torch.multinomial(self._weights, some, generator=self._generator).tolist()
        return [self._problems[index] for index in drawn]

    def update(self, problem: Problem, mean_reward: float) -> None:
        """How well a problem was solved, in 0..1."""
        self._weights[self._index[problem.prompt]] = 1 - min(max(mean_reward, 0.0), 1.0) + self._floor

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = state["weights"].clone()
        self._generator.set_state(state["generator"])
