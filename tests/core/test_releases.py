"""Supported releases of other packages: older ones are refused, newer ones are named once and used."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import pytest

from mbridge_rl.core import releases
from mbridge_rl.core.releases import Releases
from mbridge_rl.hf.versions import TRANSFORMERS
from mbridge_rl.megatron.versions.release import MEGATRON_CORE

PACKAGE = Releases("megatron-core", oldest=(0, 16, 1), newest_tested=(0, 19), reason="its specs differ")


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.16.0rc0.dev1", "0.9"])
def test_an_older_release_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(ImportError, match=rf"megatron-core {version} is too old .*: its specs differ\. Install .*>=0\.16\.1"):
        PACKAGE.check(version)
    assert not PACKAGE.is_tested(version)


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.19.9.post1"])
def test_a_tested_release_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PACKAGE.check(version)
    assert PACKAGE.is_tested(version)


def test_a_newer_release_warns_once() -> None:
    releases._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"megatron-core 0\.20\.0rc0\.dev7 is newer .* \(0\.16\.1 to 0\.19\)"):
        PACKAGE.check("0.20.0rc0.dev7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PACKAGE.check("0.20.0rc0.dev7")
    assert not PACKAGE.is_tested("0.20.0rc0.dev7")


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(ImportError, match=r"says that its version is 'unknown'; expected one such as 0\.16\.1"):
        PACKAGE.check("unknown")


@pytest.mark.parametrize("package", [MEGATRON_CORE, TRANSFORMERS], ids=lambda package: package.package)
def test_the_bounds_of_the_installation_are_the_tested_releases(package: Releases) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [requirement] = [line for line in project["dependencies"] if line.startswith(package.package)]
    *major, minor = package.newest_tested
    oldest, above = ".".join(map(str, package.oldest)), ".".join(map(str, [*major, minor + 1]))
    assert requirement == f"{package.package}>={oldest},<{above}"
