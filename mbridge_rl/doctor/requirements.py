"""The bounds of this library's own metadata, and which versions its tests ran with."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

DISTRIBUTION = "mbridge-rl"
_TESTED = "tested_versions.json"
_LOWER_BOUNDS = (">=", "==", "~=")


@dataclass(frozen=True)
class Bound:
    """Which versions of one package this library admits.

    Attributes:
        name: the package's normalized name.
        specifier: the versions.
        extra: the extra of this library that asks for it; `None` where every installation needs it.
    """

    name: str
    specifier: SpecifierSet
    extra: str | None = None

    def __str__(self) -> str:
        """The bounds with the lower one first, such as `>=0.32,<0.33`."""
        return ",".join(sorted(map(str, self.specifier), key=lambda one: one[0] == "<"))

    def admits(self, version: str) -> bool:
        """Whether `version` is within the bounds, whatever its build. A version that cannot be read is not refused."""
        try:
            return self.specifier.contains(Version(version).public, prereleases=True)
        except InvalidVersion:
            return True

    def is_too_old(self, version: str) -> bool:
        """Whether `version` lies below the bounds."""
        lowest = [Version(one.version) for one in self.specifier if one.operator in _LOWER_BOUNDS]
        try:
            return bool(lowest) and Version(version) < max(lowest)
        except InvalidVersion:
            return False


@dataclass(frozen=True)
class Supported:
    """What this library's metadata says: the bounds of Python, and those of every package that an installation or an extra
    asks for."""

    python: SpecifierSet
    bounds: tuple[Bound, ...]

    def always(self) -> list[Bound]:
        """The packages that every installation needs."""
        return [bound for bound in self.bounds if bound.extra is None]

    def of_extras(self, *, leave_out: Iterable[str] = ("test",)) -> list[Bound]:
        """The packages of the extras."""
        unwanted = set(leave_out)
        return [bound for bound in self.bounds if bound.extra is not None and bound.extra not in unwanted]


def supported() -> Supported:
    """The bounds of the code that is running: those of its checkout, or of the installed package's metadata.

    A checkout comes first, since the metadata of an editable package is as old as its installation.

    Raises:
        ImportError: neither was found, for example where the package's folder was copied alone.
    """
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text())["project"]
        if canonicalize_name(project["name"]) == DISTRIBUTION:
            return from_project(project)
    try:
        own_metadata = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            f"{Path(__file__).parents[1]} is neither in a checkout of mbridge_rl nor an installed package, so nothing says "
            "which versions it needs: install it with pip"
        ) from error
    return from_metadata(own_metadata["Requires-Python"] or "", metadata.requires(DISTRIBUTION) or [])


def from_project(project: Mapping[str, Any]) -> Supported:
    """The bounds of the table `project` of a pyproject.toml."""
    bounds = [_bound(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        bounds += [_bound(text, extra) for text in texts]
    return Supported(SpecifierSet(project["requires-python"]), tuple(bounds))


def from_metadata(requires_python: str, requires: Sequence[str]) -> Supported:
    """The bounds of an installed distribution."""
    bounds = []
    for text in requires:
        marker = Requirement(text).marker
        extra = next((value for value in _extras_in(str(marker or ""))), None)
        bounds.append(_bound(text, extra))
    return Supported(SpecifierSet(requires_python), tuple(bounds))


def _extras_in(marker: str) -> list[str]:
    """The names of extras in a marker such as `extra == "ray"`."""
    return [part.split('"')[1] for part in marker.split("extra == ")[1:]]


def _bound(text: str, extra: str | None = None) -> Bound:
    requirement = Requirement(text)
    return Bound(canonicalize_name(requirement.name), requirement.specifier, extra)


class RecordedVersions:
    """The versions that this library's tests ran with, by package; `tools/compatibility_table.py` writes the file."""

    def __init__(self, environments: Sequence[Mapping[str, Any]]) -> None:
        self._versions: dict[str, set[str]] = {}
        for environment in environments:
            for name, version in {"python": environment["python"], **environment["packages"]}.items():
                self._versions.setdefault(name, set()).add(version)

    @staticmethod
    def load() -> RecordedVersions:
        """What is recorded in this package."""
        return RecordedVersions(json.loads((files("mbridge_rl.doctor") / _TESTED).read_text())["environments"])

    def knows(self, name: str) -> bool:
        """Whether the tests record versions of this package."""
        return name in self._versions

    def covers(self, name: str, version: str) -> bool:
        """Whether the tests ran with a version of the same minor release: 0.19.2 stands for 0.19.1."""
        return any(_minor(version) == _minor(tested) for tested in self._versions.get(name, ()))

    def versions(self, name: str) -> list[str]:
        """The tested versions of a package, oldest first, without the names of builds."""
        public = {version.partition("+")[0] for version in self._versions.get(name, ())}
        return sorted(public, key=Version)


def _minor(version: str) -> tuple[int, ...] | str:
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return version
