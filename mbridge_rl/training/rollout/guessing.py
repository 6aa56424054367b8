"""A toy task of several turns: the policy guesses a hidden digit, and after every guess it reads whether the digit is larger or
smaller.

The prompt `?` is the same for all ten digits, so that four guesses that ignore the answers find at most four of the ten digits.
To find all ten a policy has to use all three answers: one that has learnt binary search writes episodes such as `?4>7<5>6`.
"""

from __future__ import annotations

from mbridge_rl.training.rollout.rewards import Problem

PROMPT, LARGER, SMALLER = "?", ">", "<"
DIGITS = "0123456789"


def hidden_digits() -> list[Problem]:
    """The ten games; `answer` is the hidden digit, which the policy does not see."""
    return [Problem(PROMPT, digit) for digit in DIGITS]


class GuessingGame:
    """The environment (`training.rollout.episodes.Environment`) of one game. The last digit of a turn is the guess.

    Its reward is 1 where the digit was found, otherwise 0.
    """

    def __init__(self, problem: Problem) -> None:
        self._hidden = problem.answer
        self._is_solved = False

    def respond(self, turn: str) -> str | None:
        guesses = [character for character in turn if character in DIGITS]
        if not guesses:
            return PROMPT
        self._is_solved = guesses[-1] == self._hidden
        if self._is_solved:
            return None
        return LARGER if self._hidden > guesses[-1] else SMALLER

    def reward(self) -> float:
        return float(self._is_solved)
