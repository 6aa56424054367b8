"""The `mbridge-rl` command. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mbridge_rl.commands.convert import convert
from mbridge_rl.commands.doctor import doctor
from mbridge_rl.commands.inspect import inspect
from mbridge_rl.commands.models import models
from mbridge_rl.commands.plan import plan
from mbridge_rl.commands.train import print_summary, report, sync_report, train
from mbridge_rl.commands.verify import verify
from mbridge_rl.terminal import Terminal

app = typer.Typer(
    name="mbridge-rl",
    help="Weights of RL post-training, between Megatron-core trainers, Hugging Face checkpoints and vLLM engines: both ways, "
    "online, bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DemoModel(StrEnum):
    """The families for which the demo can make a tiny model."""

    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3-moe"
    LLAMA = "llama"


@app.callback()
def _describe() -> None:
    """Makes typer treat `demo` as a subcommand, whatever the number of commands."""


@app.command()
def demo(
    model: Annotated[DemoModel, typer.Option(help="Family of the tiny random policy.")] = DemoModel.QWEN3,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size of the trainer.")] = 2,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel size of the trainer.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallel size of the trainer (qwen3-moe).")] = 1,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA adapters; the engine gets merged weights.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps at most; it stops early at 93% right.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the random checkpoint, the draws and the sampling.")] = 0,
    run_dir: Annotated[Path, typer.Option(help="Where checkpoints, metrics and the report go.")] = Path("runs/demo"),
) -> None:
    """Teach a tiny model to add digits, with every part real: Megatron-core trains, vLLM rolls out, the bridge refits.

    A random checkpoint is warmed up by supervised steps until a quarter of the hundred sums are right, then GRPO runs until
    nearly all are. After every optimizer step the engine receives the new weights and proves by digest that it holds them.
    No GPU is needed; the trainer runs on tp x pp (x ep) processes of this machine.
    """
    from mbridge_rl.core.errors import BridgeError
    from mbridge_rl.training.run.demo import DemoOptions, run_demo

    options = DemoOptions(run_dir, model.value, tp=tp, pp=pp, ep=ep, lora=lora, steps=steps, seed=seed)
    try:
        summary = run_demo(options)
    except (BridgeError, ImportError) as error:
        _fail(error)
    print_summary(summary, run_dir)


app.command()(models)
app.command()(train)
app.command()(report)
app.command()(sync_report)
app.command()(plan)
app.command()(inspect)
app.command()(convert)
app.command()(verify)
app.command()(doctor)


def _fail(error: Exception) -> None:
    Terminal(stderr=True).line(f"{type(error).__name__}: {error}")
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `mbridge-rl` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
