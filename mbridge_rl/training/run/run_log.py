"""The log of a run on its first rank: `metrics.jsonl`, `samples.jsonl`, `syncs.jsonl`, the console, TensorBoard, Prometheus.

Every line is complete when it is written, so an unfinished run can be read (`mbridge-rl report RUN`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbridge_rl.core.typed_values import shown
from mbridge_rl.hf.publish import replace_file
from mbridge_rl.sync.record.json_lines import LinesError, json_lines
from mbridge_rl.sync.record.sinks import SYNCS_FILE, JsonLines, Prometheus, Sink, TensorBoard, open_tensorboard
from mbridge_rl.terminal import Terminal
from mbridge_rl.training.metrics import Metrics
from mbridge_rl.training.run.config_file import ConfigError

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
EVENTS_FILE, EVALUATION_FILE = "events.jsonl", "evaluation.jsonl"

_COLUMNS = (
    "step",
    "reward",
    "accuracy",
    "length",
    "entropy",
    "KL train-rollout",
    "ratio-1",
    "stale",
    "tokens/s",
    "refit",
    "digest",
)
_WIDTHS = (5, 7, 8, 7, 7, 16, 8, 5, 8, 9, 16)
_PROOFS = {True: ("equal", "green"), False: ("unverified", "red")}


class RunLog:
    """Args:
        prometheus_port, prometheus_address: where metrics of the syncs are served over HTTP; without a port nothing is served.
        resumed_at: the last step before a resumed run goes on; lines of later steps, by the interrupted run, are dropped.

    Attributes:
        sinks: the sinks for the records of the run's weight syncs.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        console: bool,
        tensorboard: bool,
        prometheus_port: int | None = None,
        prometheus_address: str = "127.0.0.1",
        resumed_at: int = 0,
    ) -> None:
        self._run_dir = run_dir
        self._terminal = Terminal(is_quiet=not console)
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            _cut(run_dir / name, "step", resumed_at)
        _cut(run_dir / SYNCS_FILE, "version", resumed_at)  # the weights before step s + 1 are published again
        self._board = open_tensorboard(run_dir / "tensorboard", purge_step=resumed_at + 1) if tensorboard else None
        self.sinks: list[Sink] = [JsonLines(run_dir / SYNCS_FILE)]
        if self._board is not None:
            self.sinks.append(TensorBoard(self._board))
        self._prometheus = None
        if prometheus_port is not None:
            self._prometheus = Prometheus(prometheus_port, address=prometheus_address, labels={"run": run_dir.name})
            self.sinks.append(self._prometheus)
        self._lines = 0

    def say(self, text: str) -> None:
        """Prints a message about the progress of the run."""
        self._terminal.line((text, "cyan"))

    def warn(self, step: int, event: str) -> None:
        """Records and prints a failure that did not end the run."""
        _append(self._run_dir / EVENTS_FILE, {"step": step, "event": event})
        self._terminal.line((f"step {step}: {event}", "yellow"))

    def step(self, metrics: Metrics, samples: list[dict[str, Any]]) -> None:
        """Records the metrics and samples of a finished step, and prints a line."""
        _append(self._run_dir / METRICS_FILE, metrics)
        for sample in samples:
            _append(self._run_dir / SAMPLES_FILE, {"step": metrics["step"], **sample})
        if self._lines % 40 == 0:
            header = " ".join(f"{name:>{width}}" for name, width in zip(_COLUMNS, _WIDTHS, strict=True))
            self._terminal.line((header, "dim"))
        self._lines += 1
        self._terminal.line(f"{_line(metrics)} ", _PROOFS.get(metrics.get("verified"), ""))
        if self._board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, metrics["step"])
            self._board.flush()

    def evaluation(self, step: int, completions: list[tuple[str, str, float]]) -> None:
        """Records the policy's greedy `(prompt, completion, reward)`; they replace those of the last evaluation."""
        lines = [{"step": step, "prompt": prompt, "completion": text, "reward": reward} for prompt, text, reward in completions]
        replace_file(self._run_dir / EVALUATION_FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._prometheus is not None:
            self._prometheus.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file to which a run may still write; an empty list if there is no file.

    Raises:
        ConfigError: a line is no JSON object.
    """
    if not path.exists():
        return []
    try:
        return json_lines(path)
    except LinesError as error:
        raise ConfigError(str(error)) from error


def _line(metrics: Mapping[str, Any]) -> str:
    cells = (
        f"{metrics['step']}",
        _number(metrics.get("reward"), ".3f"),
        _number(metrics.get("accuracy"), ".0%"),
        _number(metrics.get("length_mean"), ".1f"),
        _number(metrics.get("entropy"), ".3f"),
        _number(metrics.get("kl_train_rollout"), ".1e"),
        _number(metrics.get("ratio_max_deviation"), ".0e"),
        _number(metrics.get("staleness_max"), "d"),
        _number(metrics.get("tokens_per_second"), ".0f"),
        f"{_number(metrics.get('refit_ms'), '.1f')} ms",
        f"{metrics.get('digest') or ''}",
    )
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _number(value: Any, form: str) -> str:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, form)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _cut(path: Path, counter: str, last: int) -> None:
    """Drops lines whose `counter` is beyond `last`, and an incomplete line at the end."""
    lines = [line for line in read_lines(path) if _counted(line, counter, path) <= last]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def _counted(line: Mapping[str, Any], counter: str, path: Path) -> int:
    if type(line.get(counter)) is not int:
        raise ConfigError(f"{path}: every line needs {counter}, a whole number, found {shown(line.get(counter))}")
    return line[counter]
