"""Writes README's table of what works from test results: nothing is ticked that no test ran and passed.

python -m pytest --junitxml=runs/tests.xml && python tools/support_table.py runs/tests.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support-table: made by `make support-table` from the test results -->", "<!-- /support-table -->"

FAMILIES = {"llama": "Llama 2, 3.x", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "qwen3-moe": "Qwen3-MoE"}
# Real processes: import, export, save, and logits equal to Transformers'.
AXES = ["tp2", "tp2+sp", "pp2", "pp2-uneven", "pp2xvpp2xtp2", "dp2", "cp2", "ep2", "tp2xep2xetp1", "etp2"]
EXPERT_AXES = {"ep2", "tp2xep2xetp1", "etp2"}
COLUMNS = {
    "all TP PP VPP EP ETP in {1,2,4}, virtual": "test_virtual_ranks::test_round_trips_are_bit_exact",
    "refit in process": "test_vllm_refit::test_refit_equals_a_fresh_engine_and_transformers",
    "refit from Megatron ranks": "test_refit_end_to_end::test_refitted_engine_equals_a_fresh_one_and_transformers",
    "refit, engine TP2": "test_vllm_refit::test_tensor_parallel_engine",
}


def passed_tests(report: Path) -> set[str]:
    """`file::test[id]` of every test that ran and passed."""
    return {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in ElementTree.parse(report).iter("testcase")
        if not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped"))
    }


def family_of(test_id: str) -> str:
    """The longest family name that the test's id begins with."""
    name = test_id.replace("_", "-").replace("llama3", "llama")
    return max((family for family in FAMILIES if name.startswith(family)), key=len, default="")


def ids_of(family: str, passed: set[str], test: str) -> list[str]:
    """The ids of the family's passed cases of `file::test`."""
    found = [match[1] for name in passed if (match := re.fullmatch(rf"{re.escape(test)}\[(.*)\]", name))]
    return sorted(name for name in found if family_of(name) == family)


def table(passed: set[str]) -> str:
    """A row per family, a column per question."""
    rows = [["family", *COLUMNS, *AXES], ["---"] * (1 + len(COLUMNS) + len(AXES))]
    for family, title in FAMILIES.items():
        answers = [tick(ids_of(family, passed, test)) for test in COLUMNS.values()]
        live = ids_of(family, passed, "test_bridge_live::test_there_and_back")
        answers += [
            tick([name for name in live if name.endswith(f"-{axis}")]) if "moe" in family or axis not in EXPERT_AXES else "-"
            for axis in AXES
        ]
        rows.append([title, *answers])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tick(passed: list[str]) -> str:
    return "yes" if passed else "no"


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{table(passed_tests(Path(sys.argv[1])))}\n\n{END}{after}")


if __name__ == "__main__":
    main()
