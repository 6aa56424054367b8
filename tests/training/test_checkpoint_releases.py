"""A checkpoint that one release of Megatron-core writes goes on under another.

`MBRIDGE_OTHER_PYTHON` names the interpreter of another environment, `MBRIDGE_OTHER_PATH` what goes before this one's PYTHONPATH
there. Without the first, the other interpreter is a new process of this one: the test then says only that resuming works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_releases
import pytest
import torch
from families import FAMILIES
from tiny import saved_model
from tolerance import assert_near, forward

import mbridge_rl

OTHER_PYTHON, OTHER_PATH = os.environ.get("MBRIDGE_OTHER_PYTHON", sys.executable), os.environ.get("MBRIDGE_OTHER_PATH", "")
PROGRAM = Path(checkpoint_releases.__file__)


def _run(python: str, path: str, *arguments: object) -> Any:
    python_path = [path, str(PROGRAM.parent), str(Path(mbridge_rl.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, python_path))}
    command = [python, "-W", "ignore", str(PROGRAM), *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return torch.load(arguments[-1], weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "direction",
    # Without another interpreter both directions are the same.
    ["written-here", pytest.param("written-there", marks=() if "MBRIDGE_OTHER_PYTHON" in os.environ else pytest.mark.nightly)],
)
@pytest.mark.parametrize(("variant", "case"), [("qwen3-tied", "sharded-bf16"), ("nemotron-h", "one-rank")])
def test_the_other_release_goes_on(variant: str, case: str, direction: str, tmp_path: Path) -> None:
    """Weights, master weights, moments and random numbers are those that were saved, bit for bit, and the next losses agree."""
    if variant in FAMILIES:
        source = tmp_path / variant
        FAMILIES[variant].checkpoint(source)
    else:
        source = saved_model(variant, tmp_path)
    here, there = (sys.executable, os.environ.get("PYTHONPATH", "")), (OTHER_PYTHON, OTHER_PATH)
    first, second = (here, there) if direction == "written-here" else (there, here)
    saved = _run(*first, "save", case, source, tmp_path / "checkpoints", tmp_path / "saved.pt")
    resumed = _run(*second, "resume", case, source, tmp_path / "checkpoints", tmp_path / "resumed.pt")
    for (saved_state, saved_draws, saved_losses), (state, draws, losses) in zip(saved, resumed, strict=True):
        assert state.keys() == saved_state.keys()
        assert [name for name, tensor in saved_state.items() if not torch.equal(state[name], tensor)] == []
        assert torch.equal(draws, saved_draws)
        assert_near(losses, saved_losses, forward(layers=5, width=256), what="losses")
