"""Collects the facts about this machine and this environment."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import platform
import re
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mbridge_rl.doctor.facts import Interface, Machine, SharedMemory, Torch

_SHARED_MEMORY = Path("/dev/shm")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_SIOCGIFADDR = 0x8915  # the request for the address of an interface
# Modules that `probe(imports=True)` tries, by distribution. vLLM's is the same for both of its distributions.
_IMPORTS = {"megatron-core": "megatron.core", "transformers": "transformers.models.llama.modeling_llama", "vllm": "vllm"}
_IMPORT_SECONDS = 180


def probe(*, imports: bool = False) -> Machine:
    """The facts about this machine. It imports torch, which takes some seconds.

    Args:
        imports: also import Megatron-core, Transformers and vLLM, each in a process of its own; half a minute.
    """
    packages = _packages()
    return Machine(
        python=platform.python_version(),
        packages=packages,
        torch_builds=_torch_builds(packages),
        torch=_torch(),
        has_nvidia_driver=_NVIDIA_DRIVER.exists(),
        shared_memory=_shared_memory(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        interfaces=_interfaces(),
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        host_address=_host_address(),
        expandable_segments="expandable_segments:True" in _allocator_options(),
        import_errors=_import_errors() if imports else {},
    )


def _packages() -> dict[str, str]:
    """The version of every installed distribution, and of a Megatron-core that is on the path without being installed."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a damaged distribution has none
            versions.setdefault(str(canonicalize_name(name)), distribution.version)
    if "megatron-core" not in versions and (version := _megatron_on_the_path()) is not None:
        versions["megatron-core"] = version
    return versions


def _megatron_on_the_path() -> str | None:
    """The version of a Megatron-LM whose folder is on PYTHONPATH, read from its sources without importing them."""
    for folder in sys.path:
        source = Path(folder or ".") / "megatron" / "core" / "package_info.py"
        if source.is_file():
            numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", source.read_text(), re.MULTILINE))
            return ".".join(numbers.get(part, "0") for part in ("MAJOR", "MINOR", "PATCH"))
    return None


def _torch_builds(packages: Mapping[str, str]) -> dict[str, str]:
    """Which torch the installed companions of torch ask for, where they ask for one release."""
    builds = {}
    for name in _COMPANIONS:
        if name not in packages:
            continue
        for text in metadata.requires(name) or []:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if canonicalize_name(requirement.name) == "torch" and (
                exact := re.match(r"==\s*(\S+)$", str(requirement.specifier))
            ):
                builds[name] = exact[1]
    return builds


def _torch() -> Torch:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library is missing
        return Torch(error=_one_line(error), has_gloo=False)
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if _has_cuda(torch) else ()
    distributed = torch.distributed.is_available()
    return Torch(
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus and torch.distributed.is_nccl_available() else None,
        has_gloo=distributed and torch.distributed.is_gloo_available(),
        gpus=gpus,
        peers_reach_each_other=all(
            torch.cuda.can_device_access_peer(one, other)
            for one in range(len(gpus))
            for other in range(len(gpus))
            if one != other
        ),
    )


def _has_cuda(torch: object) -> bool:
    return bool(torch.cuda.is_available())  # type: ignore[attr-defined]


def _shared_memory() -> SharedMemory | None:
    if not _SHARED_MEMORY.is_dir():
        return None
    sizes = os.statvfs(_SHARED_MEMORY)
    return SharedMemory(total=sizes.f_blocks * sizes.f_frsize, free=sizes.f_bavail * sizes.f_frsize)


def _limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _interfaces() -> tuple[Interface, ...]:
    interfaces = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no IPv4 address
            interfaces.append(Interface(name, socket.inet_ntoa(answer[20:24])))
    return tuple(interfaces)


def _host_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _allocator_options() -> str:
    return ",".join(os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))


def _import_errors() -> dict[str, str]:
    """Which of the large packages cannot be imported, and the last line of the error."""
    errors = {}
    for name, module in _IMPORTS.items():
        if not _is_there(module):
            continue
        command = [sys.executable, "-c", f"import {module}"]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=True)
        except subprocess.CalledProcessError as error:
            errors[name] = _one_line(error.stderr.strip() or f"exit code {error.returncode}")
        except subprocess.TimeoutExpired:
            errors[name] = f"the import takes more than {_IMPORT_SECONDS} s"
    return errors


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _one_line(error: object) -> str:
    """The last line of an error's text, which holds the reason."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
