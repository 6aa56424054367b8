"""`mbridge-rl doctor`: says what is installed, what this machine offers, and what to do about what is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from mbridge_rl.commands.arguments import model_config, readable_errors
from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    from mbridge_rl.doctor.examination import Examination

_STYLES = {"ok": "green", "absent": "dim", "warning": "yellow", "failure": "red"}
_BF16_BYTES = 2
_WIDTH = 150  # a narrower terminal wraps lines instead of words
_UNLIMITED = 10_000


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint directory or a bundled name such as qwen3-0.6b, to compare /dev/shm with its size."),
    ] = None,
    imports: Annotated[
        bool, typer.Option("--imports", help="Also import Megatron-core, Transformers and vLLM: half a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what is installed, what this machine offers, and what to do where something is missing (docs/installing.md).

    The exit code is 1 only if a checkpoint cannot be converted on the CPU or the demo cannot run.
    """
    from mbridge_rl.doctor.examination import examine
    from mbridge_rl.doctor.probe import probe
    from mbridge_rl.doctor.requirements import RecordedVersions, supported

    with readable_errors():
        model_bytes = None if model is None else _bytes_of(model)
        examination = examine(probe(imports=imports), supported(), RecordedVersions.load(), model_bytes)
    if as_json:
        typer.echo(json.dumps(examination.as_json(), indent=1))
    else:
        show(examination, Terminal(wraps=True))
    if not examination.main_job_can_run:
        raise typer.Exit(1)


def _bytes_of(model: str) -> int:
    """The size of a model's weights in bf16, in bytes."""
    from math import prod

    from mbridge_rl.bridges import model_spec

    return _BF16_BYTES * sum(prod(shape) for shape in model_spec(model_config(model)).hf_shapes.values())


def show(examination: Examination, terminal: Terminal) -> None:
    """Prints the findings as a table, the transports as another, and the verdict as one line. What is written to a file has
    one line for each finding, however long."""
    fixed = [Column(name, no_wrap=True) for name in ("", "what", "found", "supported", "tested")]
    table = Table(*fixed, Column("what to do", overflow="fold"), box=SIMPLE)
    for finding in examination.findings:
        cells = (finding.topic, finding.found, finding.supported, finding.tested, finding.advice)
        table.add_row(terminal.styled([(finding.status.value, _STYLES[finding.status.value])]), *cells)
    needed = (
        _WIDTH if terminal.is_terminal else terminal.measure(table, options=terminal.options.update(width=_UNLIMITED)).maximum
    )
    terminal.width = max(terminal.width, needed)
    terminal.print(table)
    transports = Table(Column("", no_wrap=True), Column("transport", no_wrap=True), "", box=SIMPLE)
    for transport in examination.transports:
        mark = ("can work", "green") if transport.works else ("cannot", "dim")
        transports.add_row(terminal.styled([mark]), transport.name, transport.reason)
    terminal.print(transports)
    if examination.main_job_can_run:
        terminal.line("Checkpoints can be converted here, and `mbridge-rl demo` can run.")
    else:
        failures = ", ".join(finding.topic for finding in examination.findings if finding.status.value == "failure")
        terminal.line((f"`mbridge-rl demo` cannot run here because of: {failures}.", "red"))
