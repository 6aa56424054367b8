"""Configuration files: YAML and `name.name=value` overrides into dataclasses, checked field by field.

Any dataclass is a schema: its fields' names, types and defaults are the file's. Its `PRESETS`, `{name: {choice: fields}}`, are
names that stand for several fields, of which those that the file sets itself win. An error names the path of the wrong field,
what was found there and what is allowed, and the nearest name where one was misspelt. All errors of a file come at once.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mbridge_rl.core.errors import BridgeError

T = TypeVar("T")


class ConfigError(BridgeError, ValueError):
    """A configuration that cannot be run; every line names a field."""


def read_config(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """The dataclass `cls` from a YAML file, with `trainer.learning_rate=1e-4`-like overrides applied first.

    Raises:
        ConfigError: the file cannot be read or parsed, or fields are unknown, missing or of a wrong type.
    """
    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, found {_kind(found)}")
    return parse_config(cls, with_overrides(found or {}, overrides))


def parse_config(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """The dataclass `cls` from nested mappings.

    Raises:
        ConfigError: naming every field that is unknown, missing or of a wrong type.
    """
    problems: list[str] = []
    value = _dataclass(cls, mapping, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return value


def with_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` where `a.b=value` (value in YAML) is set.

    Raises:
        ConfigError: an override is not of this form, or goes through something that is not a mapping.
    """
    result = _copied(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"{override!r}: write an override as section.field=value, as in trainer.learning_rate=1e-4")
        section = result
        for depth, name in enumerate(names[:-1]):
            inner = section.get(name)
            if inner is None:
                inner = section[name] = {}
            if not isinstance(inner, dict):
                raise ConfigError(f"{override!r}: {'.'.join(names[: depth + 1])} is {_kind(inner)}, not a section")
            section = inner
        try:
            section[names[-1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is no YAML: {error}") from error
    return result


def as_mapping(config: Any) -> Any:
    """A dataclass as plain values that YAML and JSON can hold; `parse_config` makes the same dataclass of it."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: as_mapping(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, tuple | list):
        return [as_mapping(item) for item in config]
    if isinstance(config, Mapping):
        return {name: as_mapping(value) for name, value in config.items()}
    return config


def _dataclass(cls: type[Any], found: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(found, Mapping):
        problems.append(f"{path or 'the configuration'}: a section with fields is needed, found {_kind(found)}")
        return None
    hints = get_type_hints(cls)
    known = [field for field in fields(cls) if field.init]
    before = len(problems)
    presets = getattr(cls, "PRESETS", {})
    names = [*presets, *(field.name for field in known)]
    for name in presets.keys() & found.keys():
        found = _with_preset(name, presets[name], found, path, problems)
    for name in found:
        if name not in names:
            problems.append(f"{_joined(path, name)}: there is no such field; {_nearest(str(name), names)}")
    values: dict[str, Any] = {}
    for field in known:
        where = _joined(path, field.name)
        if field.name in found:
            values[field.name] = _value(hints[field.name], found[field.name], where, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{where}: is missing; {_described(hints[field.name])} is needed")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:  # names its fields
        problems.append(str(error))
        return None
    except (BridgeError, ValueError, TypeError) as error:  # what the dataclass itself checks
        problems.append(f"{path or 'the configuration'}: {error}")
        return None


def _with_preset(
    name: str, choices: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any], path: str, problems: list[str]
) -> Mapping[str, Any]:
    chosen = found[name]
    if not isinstance(chosen, str) or chosen not in choices:
        problems.append(f"{_joined(path, name)}: {chosen!r} is none of {', '.join(choices)}{_suggestion(str(chosen), choices)}")
        chosen = None
    stated = {other: value for other, value in found.items() if other != name}
    return stated if chosen is None else {**choices[chosen], **stated}


def _value(hint: Any, found: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return found
    if origin in (Union, types.UnionType):
        if found is None and type(None) in arguments:
            return None
        others = [argument for argument in arguments if argument is not type(None)]
        for other in others[:-1]:
            trial: list[str] = []
            value = _value(other, found, path, trial)
            if not trial:
                return value
        return _value(others[-1], found, path, problems)
    if is_dataclass(hint):
        return _dataclass(hint, {} if found is None else found, path, problems)
    if origin is Literal:
        if found in arguments and type(found) in {type(argument) for argument in arguments}:
            return found
        choices = [str(argument) for argument in arguments]
        problems.append(f"{path}: {found!r} is none of {', '.join(choices)}{_suggestion(str(found), choices)}")
        return None
    if origin in (tuple, list, Sequence):
        return _sequence(hint, found, path, problems)
    if origin in (dict, Mapping):
        if isinstance(found, Mapping):
            return {name: _value(arguments[1], value, _joined(path, name), problems) for name, value in found.items()}
    else:
        accepted, value = _plain(hint, found)
        if accepted:
            return value
    problems.append(f"{path}: {_described(hint)} is needed, found {_kind(found)}")
    return None


def _sequence(hint: Any, found: Any, path: str, problems: list[str]) -> Any:
    arguments = get_args(hint)
    if not isinstance(found, list | tuple):
        problems.append(f"{path}: {_described(hint)} is needed, found {_kind(found)}")
        return None
    variadic = get_origin(hint) is not tuple or (len(arguments) == 2 and arguments[1] is Ellipsis)
    if not variadic and len(found) != len(arguments):
        problems.append(f"{path}: {len(arguments)} values are needed, found {len(found)}")
        return None
    hints = [arguments[0]] * len(found) if variadic else list(arguments)
    values = [
        _value(item, value, f"{path}[{index}]", problems) for index, (item, value) in enumerate(zip(hints, found, strict=True))
    ]
    return tuple(values) if get_origin(hint) is tuple else values


def _plain(hint: Any, found: Any) -> tuple[bool, Any]:
    """Whether `found` can stand for a plain type, and what it then is."""
    if hint is float:
        if isinstance(found, int | float) and not isinstance(found, bool):
            return True, float(found)
        try:  # YAML 1.1 reads 1e-4 as text
            return (True, float(found)) if isinstance(found, str) else (False, None)
        except ValueError:
            return False, None
    if hint is int and isinstance(found, bool):
        return False, None
    if hint is Path:
        return isinstance(found, str | Path), Path(found) if isinstance(found, str | Path) else None
    return isinstance(hint, type) and isinstance(found, hint), found


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if argument is type(None) else _described(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list, Sequence):
        return f"a list ({_described(arguments[0])} each)"
    if origin in (dict, Mapping) or is_dataclass(hint):
        return "a section"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return plain.get(hint, str(hint))


def _kind(found: Any) -> str:
    if isinstance(found, Mapping):
        return "a section"
    if isinstance(found, list | tuple):
        return "a list"
    return "nothing" if found is None else f"{found!r}"


def _nearest(name: str, names: Sequence[str]) -> str:
    return f"fields here are {', '.join(names)}{_suggestion(name, names)}"


def _suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _joined(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _copied(value: Any) -> Any:
    return {name: _copied(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value
