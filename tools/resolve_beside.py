"""Which versions pip chooses for this project beside the pins of the frameworks that embed it. Nothing is installed.

    python tools/resolve_beside.py [verl skyrl ...]      all of them if none is named
    python tools/resolve_beside.py --list

It runs the resolver of this Python's pip (`pip install --dry-run`), so it answers for this Python. pip 24 and newer read the
metadata of most packages without downloading them. Where something does not resolve, pip's message is printed and the exit code
is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = ("torch", "megatron-core", "transformers", "vllm", "ray", "numpy", "numba", "peft", "safetensors")
_SECONDS = 1200

# What each framework pins. The extras of verl and SkyRL hold more packages, some of which are not on PyPI or are built from
# source with torch at hand; those pins of the extras that this project has as well are listed here instead.
FRAMEWORKS = {
    "verl": ("verl==0.9.1",),
    "verl-with-vllm": ("verl==0.9.1", "torch==2.11.0", "transformers==5.9.0", "vllm==0.24.0"),
    "skyrl": ("skyrl==0.4.0",),
    "skyrl-with-vllm": ("skyrl==0.4.0", "torch==2.13.0", "ray==2.57.0", "vllm==0.30.0"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Resolves, prints one line for each framework, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("frameworks", nargs="*", choices=[*FRAMEWORKS, []], help="all if none is named")
    parser.add_argument("--list", action="store_true", help="print what each framework pins")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name}: {', '.join(pins)}" for name, pins in FRAMEWORKS.items()))
        return 0
    failed = False
    for name in options.frameworks or FRAMEWORKS:
        try:
            versions = resolved((*FRAMEWORKS[name], str(ROOT)))
        except subprocess.CalledProcessError as error:
            failed = True
            print(f"{name}: does not resolve beside {', '.join(FRAMEWORKS[name])}\n{error.stderr.strip()}", flush=True)
            continue
        shown = ", ".join(f"{package} {versions[package]}" for package in SHOWN if package in versions)
        print(f"{name}: {', '.join(FRAMEWORKS[name])} and this project resolve to {shown}", flush=True)
    return int(failed)


def resolved(requirements: Sequence[str]) -> dict[str, str]:
    """The version of every package that pip would install for `requirements`, by normalized name.

    Raises:
        subprocess.CalledProcessError: they do not resolve; `stderr` is pip's message.
    """
    with tempfile.TemporaryDirectory(prefix="mbridge-resolve-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", str(report), *requirements]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        entries = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in entries}


if __name__ == "__main__":
    sys.exit(main())
