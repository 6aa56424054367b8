"""Every example runs as a script copied out of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(example: str, folder: Path, *arguments: str) -> str:
    script = shutil.copy(_EXAMPLES / example, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), *arguments]
    completed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.mark.slow
def test_toy_rlhf(tmp_path: Path) -> None:
    output = _run("toy_rlhf.py", tmp_path, "--steps", "15")
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d+)", output)]
    assert len(rewards) == 15
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5
    assert len(set(re.findall(r"digest (\w{16})", output))) == 15
    accuracy = re.search(r"greedy accuracy after 15 steps: (\d+)%", output)
    assert accuracy is not None
    assert int(accuracy[1]) > 50
    assert len((_EXAMPLES / "toy_rlhf.py").read_text().splitlines()) < 150


@pytest.mark.slow
def test_refit_in_process(tmp_path: Path) -> None:
    output = _run("refit_in_process.py", tmp_path)
    assert "the refit changed the answers: True" in output
    assert "the refitted engine equals the fresh one: True" in output


@pytest.mark.slow
def test_convert_checkpoint(tmp_path: Path) -> None:
    output = _run("convert_checkpoint.py", tmp_path, "--tp", "4", "--pp", "2")
    assert "rank 7:" in output
    assert "came back bit for bit" in output
