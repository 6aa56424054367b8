"""`mbridge-rl models`: lists the families that have a bridge, with the results of the tests for each."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from mbridge_rl.terminal import Terminal

_WIDTH = 108  # names of architectures are long; a narrower terminal wraps lines instead of words


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the model families that have a bridge, with what the tests have shown of each (docs/models.md explains)."""
    from mbridge_rl.bridges import FAMILIES
    from mbridge_rl.bridges.unsupported import UNSUPPORTED

    rows = json.loads((files("mbridge_rl.bridges") / "tested.json").read_text())
    listed = {architecture for row in rows for architecture in row["architectures"]}
    untested = [architecture for architecture in FAMILIES if architecture not in listed]
    if as_json:
        typer.echo(json.dumps({"families": rows, "untested": untested, "unsupported": UNSUPPORTED}, indent=1))
        return
    terminal = Terminal(wraps=True)
    terminal.width = max(terminal.width, _WIDTH)
    questions = list(rows[0]["answers"])
    table = Table(Column("family", no_wrap=True), *questions, box=SIMPLE)
    for row in rows:
        architectures = "\n".join(row["architectures"])
        table.add_row(terminal.styled([f"{row['family']}\n", (architectures, "dim")]), *row["answers"].values())
    for architecture in untested:
        table.add_row(terminal.styled([(architecture, "dim")]), *("untested" for _ in questions))
    terminal.print(table)
    for architecture, reason in sorted(UNSUPPORTED.items()):
        terminal.line(f"no bridge for {architecture}: {reason}")
