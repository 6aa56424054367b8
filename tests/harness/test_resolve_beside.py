"""`tools/resolve_beside.py`: pip's own resolver answers, and where it finds nothing its message is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import resolve_beside
from package_index import make_project, make_wheel


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that asks for torch below 2.14, and a folder of wheels as the only index."""
    for version in ("2.11.0", "2.13.0", "2.14.0"):
        make_wheel(tmp_path / "index", "torch", version)
    make_wheel(tmp_path / "index", "verl", "0.9.1", ["torch<2.13"])
    make_wheel(tmp_path / "index", "skyrl", "0.4.0", ["torch>=2.14"])
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    project = make_project(tmp_path / "project", "fake-rl", ["torch>=2.9,<2.14"], {})
    monkeypatch.setattr(resolve_beside, "ROOT", project)
    return project


def test_it_says_which_versions_come_out(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_beside.main(["verl"]) == 0
    assert capsys.readouterr().out == "verl: verl==0.9.1 and this project resolve to torch 2.11.0\n"


def test_a_conflict_is_shown_and_fails(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_beside.main(["skyrl"]) == 1
    shown = capsys.readouterr().out
    assert "skyrl: does not resolve beside skyrl==0.4.0" in shown
    assert "conflicting dependencies" in shown


@pytest.mark.nightly
@pytest.mark.parametrize("framework", ["verl", "skyrl"])
def test_this_project_resolves_beside(framework: str, tmp_path: Path) -> None:
    """With the packages that are published, by the newest pip: some minutes."""
    if framework == "skyrl" and sys.version_info < (3, 12):
        pytest.skip("skyrl needs Python 3.12")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True, timeout=300)
    command = [str(python), resolve_beside.__file__, framework]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
