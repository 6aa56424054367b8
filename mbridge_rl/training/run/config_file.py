"""Configuration files: YAML and `name.name=value` overrides into dataclasses, checked field by field (`core.typed_values`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.typed_values import FieldsError, kind, read_fields
from mbridge_rl.training.run.yaml_text import MOST_BYTES, YAMLTextError, parse_yaml

T = TypeVar("T")


class ConfigError(BridgeError, FieldsError):
    """A configuration that cannot be run; every line names a field."""


def read_config(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """The dataclass `cls` from a YAML file, with `trainer.learning_rate=1e-4`-like overrides applied first.

    Raises:
        ConfigError: the file cannot be read or parsed, or fields are unknown, missing, of a wrong type or out of range.
    """
    try:
        with Path(path).open("rb") as file:
            mapping = parse_yaml(file.read(MOST_BYTES + 1))
    except YAMLTextError as error:
        raise ConfigError(f"{path} is {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a path with a null byte, for example
        raise ConfigError(f"{path!r}: {error}") from error
    if mapping is not None and not isinstance(mapping, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, found {kind(mapping)}")
    return parse_config(cls, with_overrides(mapping or {}, overrides))


def parse_config(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """The dataclass `cls` from nested mappings.

    Raises:
        ConfigError: fields are unknown, missing, of a wrong type or out of range; the message names all of them.
    """
    problems: list[str] = []
    value = read_fields(cls, mapping, problems, text_numbers=True)
    if value is None:
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
                raise ConfigError(f"{override!r}: {'.'.join(names[: depth + 1])} is {kind(inner)}, not a section")
            section = inner
        try:
            section[names[-1]] = parse_yaml(text)
        except YAMLTextError as error:
            raise ConfigError(f"{override!r}: the value is {error}") from error
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


def _copied(value: Any) -> Any:
    return {name: _copied(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value
