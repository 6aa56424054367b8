"""Measures mbridge_rl against its peer and against the machine: one live Megatron model per workload, four gloo processes.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/run.py                                # three minutes on two cores
    python benchmarks/run.py --into docs/performance.md     # and puts the tables there

Ratios within one run are what counts: all ways of doing a thing alternate, and the best of each is compared.
"""

from __future__ import annotations

import os

# Before torch is imported: one thread per rank, as a machine with as many ranks as cores gives them.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import platform
import subprocess
import sys
import warnings
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from measure import Cost, best  # noqa: E402
from models import WORKLOADS, Workload, checkpoint  # noqa: E402
from ranks import run_ranks  # noqa: E402
from scenarios import Bench, Runs  # noqa: E402

PARTS = ("export", "save", "load", "throughput")
BEGIN, END = "<!-- results: benchmarks/run.py --into -->", "<!-- end of results -->"
TITLES = {
    "export": "Export: every rank receives every tensor",
    "save": "Save",
    "load": "Load",
    "throughput": "What the machine can do with the same bytes",
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    lines = [*_machine(), ""]
    for name in arguments.models:
        workload = WORKLOADS[name]
        directory = checkpoint(workload, arguments.folder)
        runs = run_ranks(_rank, workload.layout.world_size, workload, directory, arguments, timeout=1800)[0]
        lines += _tables(workload, directory, runs)
    text = "\n".join(lines)
    print(text)
    if arguments.into is not None:
        _replace_block(arguments.into, text)


def _rank(rank: int, workload: Workload, directory: Path, arguments: argparse.Namespace) -> dict[str, Runs]:
    warnings.filterwarnings("ignore")
    bench = Bench.start(workload, directory, arguments.rounds, with_peer=not arguments.without_peer)
    return {part: getattr(bench, part)() for part in arguments.parts}


def _tables(workload: Workload, directory: Path, runs: dict[str, Runs]) -> list[str]:
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    layout = str(workload.layout).removeprefix("layout(").removesuffix(")")
    lines = [f"### {workload.name}: {workload.architecture}, {nbytes / 1e9:.2f} GB in bf16, {layout}, 4 processes", ""]
    for part, of_part in runs.items():
        lines += [f"**{TITLES[part]}**", ""]
        lines += ["| | best, s | first, s | ratio | processor s | ratio | GB/s | collectives | peak extra memory |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_row(name, costs, of_part, nbytes) for name, costs in of_part.items()]
        lines += [""]
    return lines


def _row(name: str, costs: list[Cost], of_part: Runs, nbytes: int) -> str:
    cost, first = best(costs), costs[0]
    reference = cost if "memcpy" in next(iter(of_part)) else best(of_part[_reference(name, of_part)])
    ratio = f"{reference.seconds / cost.seconds:.1f}" if reference is not cost else ""
    cpu_ratio = f"{reference.cpu_seconds / cost.cpu_seconds:.1f}" if reference is not cost else ""
    return (
        f"| {name} | {cost.seconds:.3f} | {first.seconds:.3f} | {ratio} | {cost.cpu_seconds:.2f} | {cpu_ratio} "
        f"| {nbytes / cost.seconds / 1e9:.2f} | {cost.collectives} | {max(c.peak_bytes for c in costs) / 2**20:.0f} MiB |"
    )


def _reference(name: str, of_part: Runs) -> str:
    """What a way is compared with: the first one, or the first of its kind (`..., cold`; `..., synced`)."""
    kinds = [suffix for suffix in (", synced", ", cold") if name.endswith(suffix)]
    return next((other for other in of_part if other.endswith(kinds[0])), name) if kinds else next(iter(of_part))


def _machine() -> list[str]:
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [
        f"{date.today()}, commit {commit.stdout.strip()}: {os.cpu_count()} cores of {cpu}, {int(memory) / 2**20:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}; load average at the start "
        f"{os.getloadavg()[0]:.1f}."
    ]


def _replace_block(path: Path, text: str) -> None:
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of everything; the best counts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks", help="for checkpoints; on a real disk")
    parser.add_argument("--without-peer", action="store_true", help="without mbridge")
    parser.add_argument("--into", type=Path, help="a file whose results block is replaced")
    return parser.parse_args()


if __name__ == "__main__":
    main()
