"""Rewards: plain functions of a problem and the text of a completion, and judges that call them.

A judge turns completions into verdicts. A reward that raises, times out or is no finite number becomes a verdict with an error:
the error is logged and counted, and `RewardConfig.failed` decides what happens with the completion.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mbridge_rl.bounded_http import request
from mbridge_rl.core.errors import missing_extra
from mbridge_rl.core.json_text import parse_json
from mbridge_rl.core.typed_values import shown

_MOST_ERROR_CHARACTERS = 500  # longer errors are cut
_MOST_GIVEN_UP = 4  # calls that may hang at the same time


@dataclass(frozen=True)
class Problem:
    """A prompt for the policy, with the data that a reward function may use.

    Attributes:
        prompt: the text that the policy completes.
        answer: the expected completion, empty if there is none.
        metadata: further data for the reward function or the environment.
    """

    prompt: str
    answer: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


RewardFunction = Callable[[Problem, str], float]
"""A function `reward(problem, completion)`; the completion comes without the stop token that ended it."""

Question = tuple[Problem, str]
"""A problem with the completion that a judge rewards."""


@dataclass(frozen=True)
class Verdict:
    """A reward, or the reason why there is none (`reward` is then 0)."""

    reward: float = 0.0
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> Verdict:
        """A verdict without a reward. Errors may quote completions and answers, so a long one is cut."""
        return cls(error=error if len(error) <= _MOST_ERROR_CHARACTERS else f"{error[:_MOST_ERROR_CHARACTERS]}...")


class Judge(Protocol):
    """Rewards completions: `InProcessJudge`, `HTTPJudge`, `reward_pool.PoolJudge`, `ray_runner.RayJudge`."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]: ...
    def close(self) -> None: ...


def exact_match(problem: Problem, completion: str) -> float:
    """1 if the completion is the answer, else 0."""
    return float(completion == problem.answer)


def math_verify(problem: Problem, completion: str) -> float:
    """1 if the completion's last mathematical expression equals the answer's, else 0; the library `math-verify` decides it.

    An answer that is no LaTeX is put into `$...$`. math-verify's own time-outs use signals, which only the main thread can
    handle; they are turned off, and a judge's time-outs take their place.

    Raises:
        ImportError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise missing_extra("rewards by math-verify need it", "tasks") from error
    answer = problem.answer if "$" in problem.answer or "\\boxed" in problem.answer else f"${problem.answer}$"
    gold = parse(answer, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify finds no expression in the answer {problem.answer!r}")
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def verdict_of(function: RewardFunction, problem: Problem, completion: str) -> Verdict:
    """The verdict of a reward function on a completion; never raises."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return verdict_from(lambda: function(problem, completion), f"reward {name}")


def verdict_from(compute: Callable[[], Any], name: str) -> Verdict:
    """The verdict with the reward that `compute` returns, or with an error if it raises or returns no finite number.

    Args:
        name: the subject of the error's sentence, for example `reward exact_match`.
    """
    try:
        reward = compute()
        if isinstance(reward, str | bytes | None):
            return Verdict.failed(f"{name} is {shown(reward)}, which is no number")
        return checked(float(reward), name)
    except (Exception, SystemExit) as error:  # a reward that calls sys.exit() must not end the run
        return Verdict.failed(f"{name} raised {described_error(error)}")


def checked(reward: float, name: str) -> Verdict:
    """The verdict with `reward` if it is finite, otherwise with an error."""
    return Verdict(reward) if math.isfinite(reward) else Verdict.failed(f"{name} is {reward}, which is no finite number")


def described_error(error: BaseException) -> str:
    """Type and text of an error; the type alone if the error has no text because its `__str__` raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, which has no text"


class InProcessJudge:
    """Calls a reward function in a thread of this process, one completion after the other.

    A call that takes too long is given up. Its thread cannot be ended, so that no more calls are made while several of them
    hang. A call that hangs in compiled code that holds Python's lock hangs this process; only `PoolJudge` can end such a call.

    Args:
        timeout: seconds for one reward.
    """

    def __init__(self, function: RewardFunction, timeout: float = 30.0) -> None:
        self._function, self._timeout = function, timeout
        self._caller = _Caller(function)
        self._given_up: list[_Caller] = []

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        self._given_up = [caller for caller in self._given_up if caller.is_busy]
        if len(self._given_up) >= _MOST_GIVEN_UP:
            return Verdict.failed(
                f"{len(self._given_up)} calls of the reward still hang, no more are made: set reward.workers, so that they can "
                "be ended"
            )
        verdict = self._caller.ask(question, self._timeout)
        if verdict is not None:
            return verdict
        self._given_up.append(self._caller)
        self._caller = _Caller(self._function)
        return Verdict.failed(f"the reward took longer than {self._timeout:g} s; set reward.workers, so that it can be ended")

    def close(self) -> None:
        for caller in (self._caller, *self._given_up):
            caller.end()


class _Caller:
    """A thread that calls a reward function with one question after the other."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.is_busy = False

    def ask(self, question: Question, timeout: float) -> Verdict | None:
        """The verdict, or `None` if there is none in time; the thread then ends when the function returns, if it does."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
            self._thread.start()
        self.is_busy = True
        self._questions.put(question)
        try:
            verdict = self._verdicts.get(timeout=timeout)
        except queue.Empty:
            self.end()
            return None
        return verdict

    def end(self) -> None:
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            verdict = verdict_of(self._function, *question)
            self.is_busy = False
            self._verdicts.put(verdict)


class HTTPJudge:
    """Rewards completions by an HTTP service. Each batch is one POST of
    `{"items": [{"prompt", "answer", "metadata", "completion"}, ...]}`, and the service answers `{"rewards": [...]}`, where
    `null` stands for a reward that it could not compute.

    Args:
        timeout: seconds for the whole answer to a batch.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        self._url, self._timeout = url, timeout

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        try:
            return [self._verdict(reward) for reward in self._rewards(questions)]
        except Exception as error:  # any failure of the service, or a problem that cannot be sent, costs this batch its rewards
            return [Verdict.failed(f"reward service {self._url}: {described_error(error)}")] * len(questions)

    def _rewards(self, questions: Sequence[Question]) -> list[Any]:
        items = [
            {"prompt": problem.prompt, "answer": problem.answer, "metadata": dict(problem.metadata), "completion": completion}
            for problem, completion in questions
        ]
        body = json.dumps({"items": items}, default=str).encode()
        headers = {"Content-Type": "application/json"}
        answer = request(self._url, body, headers, seconds=self._timeout, most_bytes=_answer_bytes(len(items)))
        if answer.status != 200:
            raise ValueError(f"HTTP Error {answer.status}: {answer.body[:_MOST_ERROR_CHARACTERS].decode(errors='replace')}")
        return rewards_in(answer.body, len(items))

    def _verdict(self, reward: Any) -> Verdict:
        if reward is None:
            return Verdict.failed(f"reward service {self._url} had no reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            return Verdict.failed(f"the reward of {self._url} is {shown(reward)}, which is no number")
        return verdict_from(lambda: reward, f"the reward of {self._url}")

    def close(self) -> None:
        """Nothing to end."""


def rewards_in(body: bytes, count: int) -> list[Any]:
    """The `count` rewards in the body of an answer; their types are not checked.

    Raises:
        ValueError: the body is no JSON, or holds no list of `count` rewards.
    """
    answer = parse_json(body, most_bytes=_answer_bytes(count))
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise ValueError(f'{{"rewards": [...]}} is needed, found {shown(answer)}')
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count} completions")
    return rewards


def _answer_bytes(count: int) -> int:
    """Most bytes that the answer to `count` questions may have."""
    return (1 << 20) + 4096 * count
