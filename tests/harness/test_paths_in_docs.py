"""Every file and folder that README, the pages of docs, docstrings and help texts name exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "mbridge_rl").rglob("*.py"))
_FILE = r"(?:[\w.-]+/)+[\w.-]*\.(?:py|md|toml|json|yaml|txt|sh)"
_UNDER = r"(?:mbridge_rl|docs|tests|examples|tools|benchmarks)/[\w./-]+"
PATH = re.compile(rf"(?<![\w/.:$~-])({_FILE}|{_UNDER})(?![\w*{{-])")
OTHERS = {"weight_sync/interfaces.py", "mbridge_rl/timed_out"}  # NeMo-RL's file; a name in the store of a process group
PLACEHOLDERS = ("OWNER", "NAME")
ROOTS = ("", "mbridge_rl", "docs", "mbridge_rl/megatron", "mbridge_rl/sync", "tests", "tests/support")
PACKAGES = ("vllm/", "verl/", "megatron/core/", "transformers/", "torch/")  # of other projects


def paths(text: str) -> Iterator[str]:
    """The relative paths in a text, without trailing punctuation."""
    for match in PATH.finditer(text):
        path = match[1].rstrip("./")
        is_other = path in OTHERS or path.startswith(PACKAGES) or any(word in path for word in PLACEHOLDERS)
        if not is_other:
            yield path


def missing(text: str, folder: Path) -> list[str]:
    """The paths that exist neither from one of the roots nor beside the file."""
    bases = [folder, *(ROOT / root for root in ROOTS)]
    return sorted({path for path in paths(text) if not any((base / path).exists() for base in bases)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    assert missing(page.read_text(), page.parent) == []


def test_docstrings_and_help_texts_name_files_that_exist() -> None:
    named = {str(source.relative_to(ROOT)): missing(source.read_text(), source.parent) for source in SOURCES}
    assert {source: names for source, names in named.items() if names} == {}


def test_the_check_sees_a_file_that_is_not_there() -> None:
    assert missing("see docs/nowhere.md, `sync/nowhere.py` and mbridge_rl/core/plan.py.", ROOT) == [
        "docs/nowhere.md",
        "sync/nowhere.py",
    ]
