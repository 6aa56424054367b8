"""Writes what works from test results: README, docs/models.md and the table of `mbridge-rl models`. Nothing is ticked that no
test ran and passed.

python -m pytest --junitxml=runs/tests.xml && python tools/support_table.py runs/tests.xml

The sweep of all config fields is in the report of `make nightly`. A table whose tests are in no report stays as it is.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from families import FAMILIES  # noqa: E402
from families.family import Family  # noqa: E402

from mbridge_rl.bridges.unsupported import UNSUPPORTED  # noqa: E402

TARGETS = {"README.md": "families", "docs/models.md": "families fields axes notes unsupported"}
TESTED = ROOT / "mbridge_rl" / "bridges" / "tested.json"

# Column -> the test of tests/bridges/test_families.py that answers it, for every family.
QUESTIONS = {
    "import, export": "test_names_and_round_trips",
    "logits": "test_logits",
    "on real ranks": "test_sharded",
    "LoRA": "test_lora",
    "refit": "test_refit",
}
# What a field's other values come to, in tests/bridges/test_config_fields.py.
FIELD_ANSWERS = ("equal", "refused", "no legal value", "of other families")
# Axis by axis, with bits and logits, for these variants of tests/distributed/test_bridge_live.py.
AXES = ["tp2", "tp2+sp", "pp2", "pp2-uneven", "pp2xvpp2xtp2", "dp2", "cp2", "ep2", "tp2xep2xetp1", "etp2"]
EXPERT_AXES = {"ep2", "tp2xep2xetp1", "etp2"}
REFERENCES = ["llama", "qwen2", "qwen3", "qwen3-moe"]


def passed_tests(report: Path) -> set[str]:
    """`file::test[id]` of every test that ran and passed."""
    return {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in ElementTree.parse(report).iter("testcase")
        if not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped"))
    }


def swept_fields(report: Path) -> dict[str, dict[str, str]]:
    """By variant, how many fields of its config got which answer, of every sweep that ran and passed."""
    passed = passed_tests(report)
    return {
        case.get("name", "").partition("[")[2].rstrip("]"): {
            str(item.get("name")): str(item.get("value")) for item in case.iter("property")
        }
        for case in ElementTree.parse(report).iter("testcase")
        if f"test_config_fields::{case.get('name')}" in passed and case.get("name", "").startswith("test_every_field[")
    }


def by_title() -> dict[str, list[Family]]:
    titles: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        titles.setdefault(family.title, []).append(family)
    return titles


def answer(question: str, families: Iterable[Family], passed: set[str]) -> str:
    """`yes` if every variant passed that could be asked, `-` where none could (docs/models.md says why), else `no`."""
    applicable = [family for family in families if not _reason(question, family)]
    if not applicable:
        return "-"
    if not all(f"test_families::{QUESTIONS[question]}[{family.variant}]" in passed for family in applicable):
        return "no"
    return layouts(applicable) if question == "on real ranks" else "yes"


def layouts(families: Iterable[Family]) -> str:
    """The real processes of `test_sharded`, such as `TP2 PP2 EP2`."""
    shown = []
    for family in families:
        axes = [(axis, getattr(family.layout, axis)) for axis in ("tp", "pp", "vpp", "ep", "cp", "dp")]
        shown.append(" ".join(f"{axis.upper()}{size}" for axis, size in axes if size > 1))
    return ", ".join(dict.fromkeys(shown))


def _reason(question: str, family: Family) -> str | None:
    """Why a question cannot be asked of this family on this machine."""
    options = {"refit": family.engine, "LoRA": family.lora}.get(question)
    return options if isinstance(options, str) else None


def tested(passed: set[str]) -> list[dict[str, object]]:
    return [
        {
            "family": title,
            "architectures": sorted({family.architecture for family in families}),
            "answers": {question: answer(question, families, passed) for question in QUESTIONS},
        }
        for title, families in by_title().items()
    ]


def markdown(rows: list[list[str]]) -> str:
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body])


def families_table(passed: set[str]) -> str:
    return markdown([["family", *QUESTIONS], *([row["family"], *row["answers"].values()] for row in tested(passed))])


def axes_table(passed: set[str]) -> str:
    def cell(variant: str, axis: str) -> str:
        if axis in EXPERT_AXES and "moe" not in variant:
            return "-"
        return "yes" if f"test_bridge_live::test_there_and_back[{variant}-{axis}]" in passed else "no"

    rows = [[variant, *(cell(variant, axis) for axis in AXES)] for variant in REFERENCES]
    return markdown([["variant", *AXES], *rows])


def fields_table(swept: dict[str, dict[str, str]]) -> str:
    rows = [
        [family.title, family.architecture, *(swept[family.variant].get(answer, "0") for answer in FIELD_ANSWERS)]
        for family in FAMILIES.values()
        if family.variant in swept
    ]
    return markdown([["family", "architecture", *FIELD_ANSWERS], *rows])


def notes(_: set[str]) -> str:
    """Which questions were not asked, and why."""
    lines = [
        f"* {family.title} ({family.variant}), {question}: {reason}"
        for family in FAMILIES.values()
        for question in QUESTIONS
        if (reason := _reason(question, family))
    ]
    return "\n".join(lines) or "None."


def unsupported(_: set[str]) -> str:
    return "\n".join(f"* `{architecture}`: {reason}" for architecture, reason in sorted(UNSUPPORTED.items())) or "None."


def main() -> None:
    reports = [Path(argument) for argument in sys.argv[1:]]
    passed = set().union(*map(passed_tests, reports))
    swept = {variant: answers for report in reports for variant, answers in swept_fields(report).items()}
    made = {"notes": notes, "unsupported": unsupported}
    if any(test.startswith("test_families::") for test in passed):
        made |= {"families": families_table, "axes": axes_table}
        TESTED.write_text(json.dumps(tested(passed), indent=1) + "\n")
    if swept:
        made["fields"] = lambda _: fields_table(swept)
    for path, sections in TARGETS.items():
        text = (ROOT / path).read_text()
        for section in [section for section in sections.split() if section in made]:
            begin, end = f"<!-- {section}: made by `make support-table` from test results -->", f"<!-- /{section} -->"
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n\n{made[section](passed)}\n\n{end}{after}"
        (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
