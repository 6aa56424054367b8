"""The contracts of the newest vLLM, of which there is no CPU build: its Python modules are imported from the wheel, without its
kernels, and our classes are used as it would use them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

pytest.importorskip("vllm")

NEWEST = "0.33.0"
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.nightly
@pytest.mark.slow
def test_our_classes_fit_the_newest_vllm(tmp_path: Path) -> None:
    wheels, modules = tmp_path / "wheels", tmp_path / "modules"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), f"vllm=={NEWEST}"]
    downloaded = subprocess.run(pip, capture_output=True, text=True, timeout=900)
    assert downloaded.returncode == 0, downloaded.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(modules, [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")])
    directory, _ = tiny_checkpoint(tmp_path, "llama3-tied")
    path = os.pathsep.join([str(modules), str(SUPPORT), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, str(SUPPORT / "newest_vllm.py"), str(directory)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-6000:]
    assert finished.stdout.splitlines()[-1] == f"fits vLLM at {modules / 'vllm'}"
