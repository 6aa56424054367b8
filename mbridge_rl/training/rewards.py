"""Rewards: plain functions of a problem and the text of a completion, and who calls them.

A judge turns completions into verdicts. A reward that raises, times out or is no finite number is a verdict with an error: it
is named and counted, and the run decides what becomes of the completion (`RewardConfig.failed`).
"""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """What the policy is asked, and what a reward function may compare with.

    Attributes:
        prompt: the text that is completed.
        answer: the expected completion, where there is one.
        metadata: whatever else the reward function or the environment wants to know.
    """

    prompt: str
    answer: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


RewardFunction = Callable[[Problem, str], float]
"""`reward(problem, completion)`; the completion is without the stop token that ended it."""

Question = tuple[Problem, str]
"""A problem and the completion that is to be rewarded."""


@dataclass(frozen=True)
class Verdict:
    """A reward, or why there is none (`reward` is then 0)."""

    reward: float = 0.0
    error: str | None = None


class Judge(Protocol):
    """Rewards completions: `InProcessJudge`, `HTTPJudge`, `reward_pool.PoolJudge`, `ray_runner.RayJudge`."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]: ...
    def close(self) -> None: ...


def exact_match(problem: Problem, completion: str) -> float:
    """1 if the completion is the answer, else 0."""
    return float(completion == problem.answer)


def math_verify(problem: Problem, completion: str) -> float:
    """1 if the completion's last mathematical expression equals the answer's, by the library `math-verify`.

    The answer is taken as LaTeX in `$...$` unless it is already. math-verify's own time-outs use signals, which only a main
    thread has; they are off, and a pool's take their place.

    Raises:
        ImportError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("rewards by math-verify need it: pip install 'mbridge-rl[tasks]'") from error
    answer = problem.answer if "$" in problem.answer or "\\boxed" in problem.answer else f"${problem.answer}$"
    gold = parse(answer, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify finds no expression in the answer {problem.answer!r}")
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def verdict_of(function: RewardFunction, problem: Problem, completion: str) -> Verdict:
    """What `function` says, whatever it does."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        reward = float(function(problem, completion))
    except Exception as error:
        return Verdict(error=f"reward {name} raised {type(error).__name__}: {error}")
    return checked(reward, f"reward {name}")


def checked(reward: float, what: str) -> Verdict:
    return Verdict(reward) if math.isfinite(reward) else Verdict(error=f"{what} is {reward}, which is no finite number")


class InProcessJudge:
    """Calls a function in this process, one completion after the other."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [verdict_of(self._function, problem, completion) for problem, completion in questions]

    def close(self) -> None:
        """Nothing to end."""


class HTTPJudge:
    """Asks a service: one POST of `{"items": [{"prompt", "answer", "metadata", "completion"}, ...]}` per batch, answered by
    `{"rewards": [...]}`, where `null` is a reward that could not be computed.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self._url, self._timeout = url, timeout

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        items = [
            {"prompt": problem.prompt, "answer": problem.answer, "metadata": dict(problem.metadata), "completion": completion}
            for problem, completion in questions
        ]
        body = json.dumps({"items": items}, default=str).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                rewards = json.load(answer)["rewards"]
            if len(rewards) != len(items):
                raise ValueError(f"{len(rewards)} rewards for {len(items)} completions")
            return [self._verdict(reward) for reward in rewards]
        except (OSError, ValueError, KeyError, TypeError) as error:  # URLError and time-outs are OSErrors
            return [Verdict(error=f"reward service {self._url}: {type(error).__name__}: {error}")] * len(items)

    def _verdict(self, reward: Any) -> Verdict:
        if reward is None:
            return Verdict(error=f"reward service {self._url} had no reward")
        return checked(float(reward), f"the reward of {self._url}")

    def close(self) -> None:
        """Nothing to end."""
