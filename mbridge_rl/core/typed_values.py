"""Reads untrusted values (YAML, JSON) into dataclasses and checks them field by field.

Any dataclass is a schema: the values must fit its fields' names, types and defaults. A number's bounds are part of its type,
`Annotated[int, Range(least=1)]`. Numbers are always finite, whole numbers fit 64 bits, and text is Unicode without NUL, so that
later code need not check this. The dataclass's `PRESETS`, `{name: {choice: fields}}`, are names that stand for several fields;
fields that are also set explicitly override the preset. An error names the path of the wrong field, its value and the allowed
values, and the nearest name for a misspelt one. All errors are reported together.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mbridge_rl.core.errors import BridgeError

T = TypeVar("T")

_MOST_CHARACTERS = 120  # of a value in an error
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


_MOST = 2**31 - 1  # largest number of anything that is counted


@dataclass(frozen=True)
class Range:
    """Bounds of a number. `least` and `most` are allowed themselves, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        if self.most == _MOST:  # a technical bound that would only distract
            del bounds["at most"]
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


Seed = Annotated[int, Range(0, _MOST)]  # every random generator takes such a seed, with a rank's number added to it
AtLeastZero = Annotated[int, Range(0, _MOST)]
AtLeastOne = Annotated[int, Range(1, _MOST)]
Bytes = Annotated[int, Range(1, 2**50)]
Threads = Annotated[int, Range(1, 4096)]
Share = Annotated[float, Range(0.0, 1.0)]
Positive = Annotated[float, Range(above=0.0)]
NotNegative = Annotated[float, Range(least=0.0)]
Seconds = Annotated[float, Range(above=0.0, most=1e8)]  # larger time-outs of threads and sockets overflow


def read_fields(
    cls: type[T],
    values: object,
    problems: list[str],
    *,
    path: str = "",
    others: Literal["refuse", "ignore"] = "refuse",
    text_numbers: bool = False,
) -> T | None:
    """Makes the dataclass `cls` from nested mappings; returns `None` and adds a line to `problems` for every wrong field.

    Args:
        path: the path of `values` in the input, for the errors.
        others: whether fields that `cls` does not have are errors or are ignored.
        text_numbers: whether text may stand for a number (YAML 1.1 reads `1e-4` as text).
    """
    return _Reader(others == "refuse", text_numbers, problems).dataclass(cls, values, path)


def range_problems(config: Any, path: str = "") -> list[str]:
    """Messages about all fields that are out of range, in a dataclass that was not made by `read_fields` and those inside of
    it."""
    problems: list[str] = []
    for name, hint in _hints(type(config)).items():
        value, where = getattr(config, name), _joined(path, name)
        if is_dataclass(value) and not isinstance(value, type):
            problems += range_problems(value, where)
        elif isinstance(value, int | float) and (problem := _range_problem(hint, value)):
            problems.append(f"{where} {problem}")
    return problems


def _range_problem(hint: Any, number: float) -> str:
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(option) is Annotated and (bounds := _bounds(option)) and number not in bounds:
            return f"must be {bounds}, found {number}"
    return "" if math.isfinite(number) else f"must be a finite number, found {number}"


def _bounds(hint: Any) -> Range | None:
    return next((item for item in get_args(hint)[1:] if isinstance(item, Range)), None)


class _Reader:
    def __init__(self, refuses_others: bool, text_numbers: bool, problems: list[str]) -> None:
        self._refuses_others, self._text_numbers, self._problems = refuses_others, text_numbers, problems

    def dataclass(self, cls: type[Any], given: object, path: str) -> Any:
        if not isinstance(given, Mapping):
            self._wrong(path, f"a section with fields is needed, found {kind(given)}")
            return None
        before = len(self._problems)
        presets = getattr(cls, "PRESETS", {})
        known = _fields(cls)
        names = [*presets, *(field.name for field in known)]
        for name in presets.keys() & given.keys():
            given = self._with_preset(name, presets[name], given, path)
        if self._refuses_others:
            for name in given:
                if name not in names:
                    self._wrong(_joined(path, name), f"there is no such field; {_nearest(str(name), names)}")
        values: dict[str, Any] = {}
        for field in known:
            where, hint = _joined(path, field.name), _hints(cls)[field.name]
            if field.name in given:
                values[field.name] = self._value(hint, given[field.name], where)
            elif field.default is MISSING and field.default_factory is MISSING:
                self._wrong(where, f"is missing; {described(hint)} is needed")
        if len(self._problems) > before:
            return None
        try:
            return cls(**values)
        except FieldsError as error:  # its message names the fields
            self._problems.append(str(error))
        except (BridgeError, ValueError, TypeError) as error:  # the dataclass's own checks
            self._wrong(path, str(error))
        return None

    def _with_preset(
        self, name: str, choices: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], path: str
    ) -> Mapping[str, Any]:
        chosen = given[name]
        if not isinstance(chosen, str) or chosen not in choices:
            suggestion = _suggestion(str(chosen), choices)
            self._wrong(_joined(path, name), f"{shown(chosen)} is none of {', '.join(choices)}{suggestion}")
            chosen = None
        stated = {other: value for other, value in given.items() if other != name}
        return stated if chosen is None else {**choices[chosen], **stated}

    def _value(self, hint: Any, given: Any, path: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return self._anything(given, path)
        if origin in (Union, types.UnionType):
            return self._one_of(arguments, given, path)
        if origin is Annotated:
            return self._annotated(hint, given, path)
        if is_dataclass(hint):
            if isinstance(given, hint):  # type: ignore[arg-type]
                return given
            return self.dataclass(hint, {} if given is None else given, path)  # type: ignore[arg-type]
        if origin is Literal:
            if any(given == choice and type(given) is type(choice) for choice in arguments):
                return given
            choices = [str(argument) for argument in arguments]
            self._wrong(path, f"{shown(given)} is none of {', '.join(choices)}{_suggestion(str(given), choices)}")
            return None
        if origin in (tuple, list, Sequence):
            return self._sequence(hint, given, path)
        if origin in (dict, Mapping):
            if isinstance(given, Mapping):
                return self._mapping(arguments[1], given, path)
        else:
            accepted, value = self._plain(hint, given)
            if accepted:
                return value
        self._wrong(path, f"{described(hint)} is needed, found {kind(given)}")
        return None

    def _anything(self, given: Any, path: str) -> Any:
        """Checks a value that may be anything that JSON can hold."""
        if isinstance(given, Mapping):
            return self._mapping(Any, given, path)
        if isinstance(given, list | tuple):
            return [self._anything(value, f"{path}[{index}]") for index, value in enumerate(given)]
        hint = type(given) if type(given) in (int, float, str) else None
        if given is None or isinstance(given, bool) or (hint is not None and self._plain(hint, given)[0]):
            return given
        self._wrong(path, f"text, a finite number, true, false, nothing, a list or a section is needed, found {shown(given)}")
        return None

    def _one_of(self, options: Sequence[Any], given: Any, path: str) -> Any:
        if given is None and type(None) in options:
            return None
        types_to_try = [option for option in options if option is not type(None)]
        for option in types_to_try[:-1]:
            trial = _Reader(self._refuses_others, self._text_numbers, [])
            value = trial._value(option, given, path)
            if not trial._problems:
                return value
        return self._value(types_to_try[-1], given, path)

    def _annotated(self, hint: Any, given: Any, path: str) -> Any:
        before = len(self._problems)
        value = self._value(get_args(hint)[0], given, path)
        bounds = _bounds(hint)
        if bounds is not None and len(self._problems) == before and value not in bounds:
            self._problems.append(f"{path} must be {bounds}, found {shown(given)}")
        return value

    def _mapping(self, hint: Any, given: Mapping[Any, Any], path: str) -> dict[str, Any]:
        values = {}
        for name, value in given.items():
            if not isinstance(name, str) or not is_text(name):
                self._wrong(path, f"names must be text, found {shown(name)}")
            values[name] = self._value(hint, value, _joined(path, name))
        return values

    def _sequence(self, hint: Any, given: Any, path: str) -> Any:
        arguments = get_args(hint)
        if not isinstance(given, list | tuple):
            self._wrong(path, f"{described(hint)} is needed, found {kind(given)}")
            return None
        variadic = get_origin(hint) is not tuple or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if not variadic and len(given) != len(arguments):
            self._wrong(path, f"{len(arguments)} values are needed, found {len(given)}")
            return None
        hints = [arguments[0]] * len(given) if variadic else list(arguments)
        values = [
            self._value(item, value, f"{path}[{index}]") for index, (item, value) in enumerate(zip(hints, given, strict=True))
        ]
        return tuple(values) if get_origin(hint) is tuple else values

    def _plain(self, hint: Any, given: Any) -> tuple[bool, Any]:
        """Whether the value fits a plain type, and the value converted to that type."""
        if hint is float:
            return self._number(given)
        if hint is int:
            return type(given) is int and -(2**63) <= given < 2**63, given
        if hint is Path:
            is_path = isinstance(given, Path) or (isinstance(given, str) and given != "" and is_text(given))
            return is_path, Path(given) if is_path else None
        if hint is str:
            return isinstance(given, str) and is_text(given), given
        return isinstance(hint, type) and isinstance(given, hint), given

    def _number(self, given: Any) -> tuple[bool, Any]:
        if isinstance(given, bool) or not isinstance(given, (int, float, str) if self._text_numbers else (int, float)):
            return False, None
        try:
            number = float(given)
        except (ValueError, OverflowError):
            return False, None
        return math.isfinite(number), number

    def _wrong(self, path: str, problem: str) -> None:
        self._problems.append(f"{path or 'the configuration'}: {problem}")


class FieldsError(ValueError):
    """A dataclass's own checks failed, and the message names the paths of the fields."""


def is_text(text: str) -> bool:
    """Whether `text` is Unicode that files, sockets and terminals accept: without NUL and without halves of surrogate pairs."""
    return _NO_TEXT.search(text) is None


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MOST_CHARACTERS
        self.maxlevel = 3

    def repr_int(self, number: int, level: int) -> str:
        return repr(number) if number.bit_length() <= 4 * _MOST_CHARACTERS else f"a number of {number.bit_length():,} bits"


def shown(given: object) -> str:
    """A value as text for an error message; a long one is cut."""
    return _Shown().repr(given)


def kind(given: object) -> str:
    """A description of a value that has the wrong type, for an error message."""
    if isinstance(given, Mapping):
        return "a section"
    if isinstance(given, list | tuple):
        return "a list"
    return "nothing" if given is None else shown(given)


def described(hint: Any) -> str:
    """A description of the values that a type allows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if argument is type(None) else described(argument) for argument in arguments)
    if origin is Annotated:
        bounds = _bounds(hint)
        return described(arguments[0]) + (f" {bounds}" if bounds is not None else "")
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list, Sequence):
        return f"a list ({described(arguments[0])} each)"
    if origin in (dict, Mapping) or is_dataclass(hint):
        return "a section"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path", list: "a list"}
    return plain.get(hint, str(hint))


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in _fields(cls)}


@functools.cache
def _fields(cls: type[Any]) -> tuple[Field[Any], ...]:
    return tuple(field for field in fields(cls) if field.init)


def _nearest(name: str, names: Sequence[str]) -> str:
    return f"fields here are {', '.join(names)}{_suggestion(name, names)}"


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:_MOST_CHARACTERS], names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _joined(path: str, name: Any) -> str:
    text = name if isinstance(name, str) else str(name)
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return f"{path}.{text}" if path else text
