"""What a person sees of a demo run: live progress on the terminal, and the reward curve."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from mbridge_rl.training.loop import Metrics

_HEADER = f"{'step':>5} {'reward':>7} {'accuracy':>8}  {'KL train-rollout':>16} {'ratio-1':>8} {'refit':>9}  digest"


class DemoDisplay:
    """A progress bar with a line per step above it; on ranks that are not `visible`, nothing."""

    def __init__(self, title: str, steps: int, *, visible: bool) -> None:
        self.visible = visible
        self._console = Console(quiet=not visible, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not visible,
        )
        self._task = self._progress.add_task("starting", total=steps)
        self._title = title
        self._has_header = False

    def __enter__(self) -> DemoDisplay:
        self._console.print(f"[bold]mbridge-rl demo[/]: {self._title}")
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def phase(self, text: str) -> None:
        """What happens now."""
        self._console.print(f"[cyan]{text}[/]")
        self._progress.update(self._task, description=text.split(":")[0].split(";")[0])

    def step(self, metrics: Metrics) -> None:
        """A step is done."""
        if not self._has_header:
            self._console.print(f"[dim]{_HEADER}[/]")
            self._has_header = True
        accuracy = "" if metrics["accuracy"] is None else f"{metrics['accuracy']:.0%}"
        proof = "[green]equal[/]" if metrics["verified"] else "[red]unverified[/]"
        self._console.print(
            f"{metrics['step']:>5} {metrics['reward']:>7.3f} {accuracy:>8}  {metrics['kl_train_rollout']:>16.1e} "
            f"{metrics['ratio_max_deviation']:>8.0e} {metrics['refit_ms']:>6.1f} ms  {metrics['digest']} {proof}",
            soft_wrap=True,
        )
        self._progress.advance(self._task)


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """The end of a run, on the terminal."""
    from rich.table import Table

    table = Table(show_header=False, title=f"{run_dir}/summary.json")
    for name, value in summary.items():
        table.add_row(name, str(value))
    Console().print(table)


def plot_rewards(history: list[Metrics], accuracies: dict[int, float], path: Path) -> None:
    """Mean reward of the sampled completions and greedy accuracy over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [metrics["step"] for metrics in history]
    axes.plot(steps, [metrics["reward"] for metrics in history], color="tab:blue", label="reward (sampled, hard sums first)")
    axes.plot(list(accuracies), list(accuracies.values()), "o-", color="tab:orange", label="greedy accuracy, all 100 sums")
    axes.set(xlabel="GRPO step", ylabel="fraction right", ylim=(0, 1.02), title="vLLM rolls out, Megatron trains")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
