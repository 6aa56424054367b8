"""`mbridge-rl train`, `report` and `sync-report`: run a recipe, and report on its training and its syncs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mbridge_rl.commands.arguments import readable_errors
from mbridge_rl.terminal import Terminal


def train(
    config: Annotated[Path, typer.Argument(help="A recipe in YAML, such as those of examples/recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to set, as in trainer.learning_rate=1e-4 layout.tp=2.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint, or begin where there is none.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, the model, the layout and the task; start nothing.")
    ] = False,
) -> None:
    """Train a policy by reinforcement: Megatron-core trains, vLLM samples, and every step's weights are proven to arrive.

    Runs on this machine's devices or processors, on the ranks of torchrun, or on Ray (runner.kind=ray). docs/running.md
    describes the fields of a recipe.
    """
    with readable_errors():
        from mbridge_rl.training.run.config import load_run_config

        run = load_run_config(config, overrides or [])
        if check:
            from mbridge_rl.training.run.recipe_run import check_run

            check_run(run, resume=resume)
            typer.echo(f"{config} can be run: {run.model.path} on {run.layout.world_size} ranks, {run.layout}")
            return
        from mbridge_rl.training.run.recipe_run import run_training
        from mbridge_rl.training.run.report import write_report

        summary = run_training(run, resume=resume)
        if not summary:  # under torchrun on other ranks than the first
            return
        report = write_report(run.run_dir)
    print_summary(summary, run.run_dir)
    typer.echo(f"report: {report}")


def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder; the run may still be going on.")],
    output: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html if not given.")] = None,
) -> None:
    """Write a run's metrics as one self-contained HTML page with plots."""
    with readable_errors():
        from mbridge_rl.training.run.report import write_report

        typer.echo(str(write_report(run_dir, output)))


def sync_report(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a file of its syncs (syncs.jsonl); it may still be written.")],
    output: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/sync-report.html if not given.")] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Also draw a picture, with matplotlib: the page's name with .png.")
    ] = False,
    version: Annotated[int | None, typer.Option(help="The sync whose timeline is drawn; the last if not given.")] = None,
) -> None:
    """Show where the time of a run's weight syncs went: a timeline of every rank, engine and worker, as self-contained HTML."""
    with readable_errors():
        from mbridge_rl.sync.record.timeline_page import write_page, write_png

        page = write_page(run, output, version)
        typer.echo(str(page))
        if png:
            typer.echo(str(write_png(run, page.with_suffix(".png"), version)))


def print_summary(summary: dict[str, object], run_dir: Path) -> None:
    """Prints a run's summary on the terminal."""
    table = Table(show_header=False, title=f"{run_dir}/summary.json")
    for name, value in summary.items():
        table.add_row(name, str(value))
    Terminal(wraps=True).print(table)
