"""Text that is not ours is shown as it is, wherever the library writes to a terminal or a page: it styles, steers and ends
nothing."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner

import mbridge_rl
from mbridge_rl.cli import app
from mbridge_rl.commands import plan, train, verify
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.terminal import Terminal
from mbridge_rl.training.rollout.rewards import Problem, verdict_of
from mbridge_rl.training.run.report import write_report
from mbridge_rl.training.run.run_log import EVENTS_FILE, RunLog

LIBRARY = Path(mbridge_rl.__file__).parent

# What rich would take for markup, an emoji or a link. Without escape codes these come out as they went in.
MARKUP = ("[/INST]", "[/]", "[red]", "3 [/answer]", "\\[/x\\]", "[link=file:///etc/passwd]x", ":smile:", "[[b]]", "[b]bold[/b]")
# What a terminal would obey, or what no file can hold, and how it is spelled out.
STEERING = {
    "\x1b[2J": r"\x1b[2J",
    "a\rb": r"a\rb",
    "\x9b31m": r"\x9b31m",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\x00": r"\x00",
    "\ud800": r"\ud800",
}


def written(show: Any, encoding: str = "utf-8", **how: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    show(Terminal(file=file, width=200, **how))
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def in_table(text: str) -> Table:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    return table


@pytest.mark.parametrize("text", [*MARKUP, *STEERING])
def test_a_terminal_shows_text_as_it_is(text: str) -> None:
    expected = STEERING.get(text, text)
    assert written(lambda terminal: terminal.line(text)) == expected + "\n"
    assert written(lambda terminal: terminal.line(text, (text, "bold"))) == expected * 2 + "\n"
    assert written(lambda terminal: terminal.print(text)) == expected + "\n"
    assert written(lambda terminal: terminal.print(in_table(text)), wraps=True).count(expected) == 3
    assert written(lambda terminal: terminal.print(in_table(text))).count(expected) == 3


def test_what_an_encoding_lacks_is_spelled_out() -> None:
    assert written(lambda terminal: terminal.line("é😀", ("é", "red")), "ascii") == "\\xe9\\U0001f600\\xe9\n"


def test_styles_are_beside_the_text() -> None:
    shown = written(lambda terminal: terminal.line(("[/INST]", "red"), " after"), force_terminal=True, color_system="standard")
    assert shown == "\x1b[31m[/INST]\x1b[0m after\n"


def test_nothing_else_makes_a_console() -> None:
    """Markup is off in `Terminal` alone: nobody may take rich's own console, its markup, or its `print`."""
    for path in LIBRARY.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("rich") or name in ("rich.table", "rich.box"), f"{path} imports {name}"


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.parametrize("text", [*MARKUP, *STEERING])
def test_a_run_goes_on_whatever_a_completion_holds(
    text: str, is_shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reward(problem: Problem, completion: str) -> float:
        return float(completion)  # the error quotes the completion

    verdict = verdict_of(reward, Problem("1+1"), text)
    assert verdict.error
    log = RunLog(tmp_path, console=is_shown, tensorboard=False)
    log.say(text)
    log.warn(1, f"1 of 8 rewards failed: {verdict.error} {text}")
    log.step({"step": 1, "verified": True, "digest": text}, [{"prompt": text, "completion": text}])
    log.evaluation(1, [(text, text, 1.0)])
    log.close()
    shown = capsys.readouterr().out
    assert (STEERING.get(text, text) in shown) is is_shown
    assert ("equal" in shown) is is_shown
    assert text in json.loads((tmp_path / EVENTS_FILE).read_text())["event"]
    assert "\x1b" not in write_report(tmp_path).read_text("utf-8") or text == "\x1b[2J"


@pytest.mark.parametrize("text", [*MARKUP, *STEERING])
def test_commands_show_names_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = STEERING.get(text, text)
    train.print_summary({"model": text, text: 1}, Path("x"))
    verify._print(Path(text), ParallelLayout(), [{"check": "logits", "equal": True, "result": text}], [text])
    facts = {
        **{"model": text, "architecture": text, "parameters": 1, "tensors": 1, "model_bytes": 1, "dtype": "bf16"},
        **{"trainer_ranks": 1, "trainer": text, "rollout_ranks": 1, "replicas": 1, "engine": text},
    }
    plan._print_exchanges([], 0, facts)
    assert capsys.readouterr().out.count(expected) >= 8


@pytest.mark.parametrize("text", ["[/INST]", "[red]", "[/]"])
@pytest.mark.parametrize(
    "arguments",
    [["{}"], ["plan", "{}"], ["inspect", "{}"], ["train", "{}"], ["plan", "kimi-k2", "--trainer", "{}=1"], ["report", "{}"]],
)
def test_errors_of_commands_quote_what_was_given(text: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [argument.format(text) for argument in arguments])
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert text in result.output
