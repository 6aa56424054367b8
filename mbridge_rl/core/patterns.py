"""Matches untrusted regular expressions against names of linears in bounded time.

Python's matcher backtracks, and can take exponential time that nothing interrupts. It is used only for patterns with few
repeated letters. Any other pattern is evaluated on sets of positions: the positions that the first part can reach, those that
the second part can reach from them, and so on. Each set is computed once, however many ways lead to a position. The result,
whether a name matches, is the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

# The parser of `re`, which compiles from the same tree. It has no public name.
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from mbridge_rl.core.errors import BridgeError

_MOST_CHARACTERS = 10_000
_MOST_REPEATS = 2  # repeats in a pattern for Python's matcher, whose time is then cubic in the length of the name
_LETTERS = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_MOST_STEPS = 20_000
_MANY_STEPS, _MOST_WITH_MANY = 5_000, 10


class PatternError(BridgeError, ValueError):
    """The text is no regular expression, or one that cannot be matched in bounded time."""


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of PEFT's `rank_pattern` or `alpha_pattern` matches the full name of a linear: the full name, or its end
    from a dot on.

    Raises:
        PatternError: the pattern is no regular expression, or cannot be matched in bounded time.
    """
    return _matcher(pattern)(name)


def require_pattern(pattern: str) -> None:
    """Raises PatternError if `pattern_matches` would raise it for every name."""
    _matcher(pattern)


@functools.lru_cache(1 << 14)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if len(pattern) > _MOST_CHARACTERS:
        raise PatternError(f"a pattern of {len(pattern):,} characters; at most {_MOST_CHARACTERS:,} are allowed")
    in_peft = rf"(.*\.)?({pattern})$"
    try:
        tree = _parser.parse(in_peft)
        if _is_simple(_parser.parse(pattern)):
            compiled = re.compile(in_peft)
            return lambda name: compiled.match(name) is not None
        return _Walk(pattern, tree)
    except PatternError:
        raise
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise PatternError(f"{pattern[:100]!r} is no regular expression: {error}") from error


def _is_simple(tree: Iterable[Any]) -> bool:
    """Whether a pattern is a sequence of letters of which few are repeated."""
    repeats = [value for code, value in tree if code in (op.MAX_REPEAT, op.MIN_REPEAT)]
    letters = [node for _, _, body in repeats for node in body]
    others = [node for node in tree if node[0] not in (op.MAX_REPEAT, op.MIN_REPEAT, op.AT)]
    return len(letters) == len(repeats) <= _MOST_REPEATS and all(code in _LETTERS for code, _ in [*letters, *others])


class _Walk:
    """Matches a pattern by sets of positions."""

    def __init__(self, pattern: str, tree: Any) -> None:
        self._pattern, self._tree, self._with_many = pattern, tree, 0
        self._text, self._steps = "", 0
        self._require_supported(tree)

    def __call__(self, name: str) -> bool:
        self._text, self._steps = name, 0
        matches = bool(self._after(self._tree, {0}))
        self._with_many += self._steps > _MANY_STEPS
        if self._with_many > _MOST_WITH_MANY:
            raise self._too_slow()
        return matches

    def _after(self, tree: Iterable[Any], positions: set[int]) -> set[int]:
        """The positions at which a match of the tree can end if it begins at one of `positions`."""
        for code, value in tree:
            if not positions:
                break
            positions = self._after_node(code, value, positions)
        return positions

    def _after_node(self, code: Any, value: Any, positions: set[int]) -> set[int]:
        self._steps += len(positions)
        if self._steps > _MOST_STEPS:
            raise self._too_slow()
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._after_repeat(*value, positions)
        if code is op.BRANCH:
            return set().union(*(self._after(branch, positions) for branch in value[1]))
        if code is op.SUBPATTERN and not value[1] and not value[2]:
            return self._after(value[3], positions)
        if code is op.AT:
            return {position for position in positions if self._is_at(value, position)}
        if code in (op.ASSERT, op.ASSERT_NOT) and value[0] == 1:
            return {start for start in positions if bool(self._after(value[1], {start})) is (code is op.ASSERT)}
        if code in _LETTERS:
            text = self._text
            return {start + 1 for start in positions if start < len(text) and _admits(code, value, text[start])}
        raise self._unsupported(code)

    def _require_supported(self, tree: Iterable[Any]) -> None:
        """Raises PatternError where a part of the pattern is of a kind that `_after_node` does not know."""
        for code, value in tree:
            if code in (op.MAX_REPEAT, op.MIN_REPEAT):
                self._require_supported(value[2])
            elif code is op.BRANCH:
                for branch in value[1]:
                    self._require_supported(branch)
            elif code is op.SUBPATTERN and not value[1] and not value[2]:
                self._require_supported(value[3])
            elif code in (op.ASSERT, op.ASSERT_NOT) and value[0] == 1:
                self._require_supported(value[1])
            elif code is not op.AT and code not in _LETTERS:
                raise self._unsupported(code)

    def _unsupported(self, code: Any) -> PatternError:
        return PatternError(f"{self._pattern[:100]!r}: {str(code).lower()} is not supported")

    def _after_repeat(self, least: int, most: int, tree: Any, positions: set[int]) -> set[int]:
        # More rounds than there are positions reach no further positions.
        for _ in range(min(least, len(self._text) + 1)):
            positions = self._after(tree, positions)
        reached, newest = set(positions), positions
        for _ in range(min(most - least, len(self._text) + 1)):
            newest = self._after(tree, newest) - reached
            if not newest:
                break
            reached |= newest
        return reached

    def _is_at(self, place: Any, position: int) -> bool:
        text = self._text
        if place in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return position == 0
        if place in (op.AT_END, op.AT_END_STRING):
            return position == len(text) or (place is op.AT_END and text[position:] == "\n")
        before, after = (0 <= index < len(text) and _is_word(text[index]) for index in (position - 1, position))
        return (before != after) is (place is op.AT_BOUNDARY)

    def _too_slow(self) -> PatternError:
        return PatternError(f"{self._pattern[:100]!r} takes too long to match: it repeats what is repeated; simplify it")


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda letter: _is_word(letter),
    op.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    op.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    op.CATEGORY_NOT_WORD: lambda letter: not _is_word(letter),
}


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _admits(code: Any, value: Any, letter: str) -> bool:
    if code is op.ANY:
        return letter != "\n"
    if code in (op.LITERAL, op.NOT_LITERAL):
        return (ord(letter) == value) is (code is op.LITERAL)
    is_negated, inside = False, False
    for kind, item in value:
        if kind is op.NEGATE:
            is_negated = True
        elif kind is op.RANGE:
            inside = inside or item[0] <= ord(letter) <= item[1]
        elif kind is op.LITERAL:
            inside = inside or ord(letter) == item
        else:
            inside = inside or _CATEGORIES[item](letter)
    return inside is not is_negated
