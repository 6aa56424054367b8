"""Rewards are plain functions of a problem and the text of a completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What the policy is asked, and what a reward function may compare with.

    Attributes:
        prompt: the text that is completed.
        answer: the expected completion, where there is one.
    """

    prompt: str
    answer: str = ""


RewardFunction = Callable[[Problem, str], float]
"""`reward(problem, completion)`; the completion is without the stop token that ended it."""


def exact_match(problem: Problem, completion: str) -> float:
    """1 if the completion is the answer, else 0."""
    return float(completion == problem.answer)
