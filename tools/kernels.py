"""Runs the tests that compare numbers with the arithmetic of other processors, and prints a table.

python tools/kernels.py                                              # all of VARIANTS: hours on two cores
python tools/kernels.py zen threads-2 -- tests/training/test_grpo_step.py     # some of them, with arguments for pytest

Which kernels compute a sum depends on the processor: torch's own, MKL's, oneDNN's and OpenBLAS's (NumPy's) choose by what they
find, and each can be told to choose as on an older one. Sums are then taken in another order and rounded otherwise, which no
test may mind. Without paths, the files that import `tests/support/tolerance.py` are run. The table says for each variant in
which libraries results changed at all, and the largest share of its tolerance that a comparison used.

vLLM's own C++ kernels take no such orders: it loads the AVX512 or the AVX2 build of them by what the processor has. What it
computes through torch follows the variants.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent

VARIANTS: dict[str, dict[str, str]] = {
    "native": {},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},  # no vector instructions; draws other random numbers, too
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},  # DNNL_MAX_CPU_ISA is an older name of it
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "openblas-haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "openblas-zen": {"OPENBLAS_CORETYPE": "Zen"},
    "threads-2": {"MBRIDGE_TEST_THREADS": "2"},
    # All together, as on a processor without AVX512, such as an AMD EPYC before Zen 4.
    "zen": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Zen",
    },
    "oldest": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
    },
}
"""Environment variables by the variant's name."""

# What each library computes of the same numbers.
PROBE = """
import hashlib, os, numpy, torch
torch.set_num_threads(int(os.environ.get("MBRIDGE_TEST_THREADS", "1")))
draw = numpy.random.default_rng(0).standard_normal
a, b = (torch.from_numpy(draw(shape, dtype=numpy.float32)) for shape in ((300, 700), (700, 500)))
results = {
    "torch": [a.softmax(-1), a.sum()],
    "MKL": [a @ b, a @ b[:, 0]],
    "oneDNN": [torch.nn.functional.gelu(a), (a.bfloat16() @ b.bfloat16()).float()],
    "NumPy": [torch.from_numpy(a.numpy() @ b.numpy())],
}
for name, values in results.items():
    print(name, hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest())
"""


@dataclass(frozen=True)
class Outcome:
    """Of a variant: counts of tests, names of those that failed, and the shares of tolerances with what was compared."""

    passed: int
    failed: tuple[str, ...]
    skipped: int
    minutes: float
    shares: tuple[tuple[float, str], ...]


def main(arguments: list[str]) -> int:
    """Returns how the process ends: 1 where a test failed under a variant."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:cut] or list(VARIANTS), arguments[cut + 1 :]
    if unknown := [name for name in names if name not in VARIANTS]:
        print(f"unknown variants {', '.join(unknown)}: choose from {', '.join(VARIANTS)}", file=sys.stderr)
        return 2
    if not any(option.startswith("tests") for option in options):
        options += numeric_files()
    native, table = probe({}), Table("variant", "results change in", "passed", "failed", "skipped", "minutes", "largest share")
    outcomes = {}
    for name in names:
        changed = [library for library, digest in probe(VARIANTS[name]).items() if digest != native[library]]
        outcome = outcomes[name] = run(VARIANTS[name], options)
        share, what = max(outcome.shares, default=(0.0, ""))
        counts = outcome.passed, len(outcome.failed), outcome.skipped, round(outcome.minutes, 1)
        table.add_row(name, ", ".join(changed) or "nothing", *map(str, counts), f"{share:.2f} {what}")
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(table)
    for name, outcome in outcomes.items():
        for test in outcome.failed:
            console.print(f"{name}: {test}")
    return int(any(outcome.failed or not outcome.passed for outcome in outcomes.values()))


def numeric_files() -> list[str]:
    """Test files that compare numbers up to rounding."""
    imports = re.compile(r"^from tolerance import", re.MULTILINE)
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if imports.search(path.read_text()))


def probe(environment: dict[str, str]) -> dict[str, str]:
    """Digest of the same computation by library."""
    program = [sys.executable, "-c", PROBE]
    printed = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in printed.splitlines())


def run(environment: dict[str, str], options: list[str]) -> Outcome:
    """All of it in one pytest, whose output is shown."""
    with tempfile.TemporaryDirectory(prefix="mbridge-kernels-") as folder:
        log, report = Path(folder) / "shares.jsonl", Path(folder) / "report.xml"
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *options]
        subprocess.run(command, env=os.environ | environment | {"MBRIDGE_TOLERANCE_LOG": str(log)}, cwd=ROOT, check=False)
        minutes = (time.monotonic() - started) / 60
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return Outcome(
        passed=len(cases) - len(failed) - len(skipped),
        failed=tuple(f"{case.get('classname')}::{case.get('name')}" for case in failed),
        skipped=len(skipped),
        minutes=minutes,
        shares=tuple((line["share"], f"{line['what']} {line['test']}") for line in lines),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
