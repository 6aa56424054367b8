"""Writes a run as one self-contained HTML page: plots are SVG, there are no scripts, and nothing is fetched. It can also read
an unfinished run."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.typed_values import shown
from mbridge_rl.hf.json_files import read_json_object
from mbridge_rl.sync.record.web_page import page, plot, records, table, write_page
from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.run_log import EVALUATION_FILE, EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, read_lines
from mbridge_rl.training.run.yaml_text import YAMLTextError, parse_yaml

_MOST_DRAWN = 1e300

PLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward and greedy accuracy", ("reward", "accuracy")),
    ("Spread of rewards", ("reward_std",)),
    ("Loss", ("loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("Entropy (nats)", ("entropy",)),
    ("Length of completions (tokens)", ("length_mean", "length_max")),
    ("Truncated completions (share)", ("truncated",)),
    ("Advantages", ("advantage_mean", "advantage_max")),
    ("Ratio to the old policy: largest |ratio - 1|", ("ratio_max_deviation",)),
    ("Clipped tokens (share)", ("clip_fraction", "clip_fraction_low", "clip_fraction_high")),
    ("KL to the old policy", ("ppo_kl", "policy_kl")),
    ("KL to the reference", ("reference_kl",)),
    ("KL of trainer and engine", ("kl_train_rollout", "mismatch_k3")),
    ("Trainer and engine: |difference of log-probabilities|", ("mismatch_mean", "mismatch_max")),
    ("Effective sample size (share)", ("ess",)),
    ("Staleness of tokens (updates)", ("staleness_mean", "staleness_max")),
    ("Completions of more than one version (share)", ("partial",)),
    ("Groups without variance, thrown away or kept", ("constant_groups", "groups_rejected")),
    ("Rewards that failed", ("rewards_failed",)),
    ("Seconds by phase", ("rollout_seconds", "train_seconds", "sync_seconds", "evaluate_seconds", "checkpoint_seconds")),
    ("Tokens per second", ("tokens_per_second",)),
    ("Refit (ms)", ("refit_ms",)),
    ("Memory (GiB)", ("memory_gib",)),
)
"""Titles and the metrics that are drawn together; metrics that a run does not have are left out."""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the page to `output` (by default `RUN/report.html`) and returns its path.

    Raises:
        ConfigError: the folder holds no run, or a file of the run cannot be read.
    """
    history = read_lines(run_dir / METRICS_FILE)
    if not history:
        raise ConfigError(f"{run_dir / METRICS_FILE} has no complete step: is {run_dir} the folder of a run?")
    if others := [line["step"] for line in history if type(line.setdefault("step", None)) is not int]:
        raise ConfigError(f"{run_dir / METRICS_FILE}: every line needs step, a whole number, found {shown(others[0])}")
    output = output or run_dir / "report.html"
    write_page(output, _page(run_dir, history))
    return output


def _page(run_dir: Path, history: list[dict[str, Any]]) -> str:
    last = history[-1]
    summary = run_dir / "summary.json"
    state = "finished" if summary.exists() else "going on, or interrupted"
    config = run_dir / "config.yaml"
    text = config.read_text("utf-8", "replace") if config.exists() else ""
    sections = [
        f"<h1>{html.escape(str(run_dir))}</h1><p>Step {last['step']} of {html.escape(_planned_steps(text))}, {state}.</p>",
        table(_summary(summary) if summary.exists() else {}),
        "<h2>Metrics</h2>",
        *(plot(title, {name: _points(name, history) for name in names}) for title, names in PLOTS),
        records("What went wrong and was survived", read_lines(run_dir / EVENTS_FILE)),
        records("Last greedy evaluation", read_lines(run_dir / EVALUATION_FILE)[:40]),
        records("Last samples", read_lines(run_dir / SAMPLES_FILE)[-20:]),
        "<h2>The last step</h2>",
        table(last),
        f"<h2>Configuration</h2><pre>{html.escape(text)}</pre>" if text else "",
    ]
    return page(run_dir.name, sections)


def _planned_steps(text: str) -> str:
    try:
        config = parse_yaml(text)
    except YAMLTextError:  # the page shows the configuration's text all the same
        return "?"
    return str(config.get("steps", "?")) if isinstance(config, dict) else "?"


def _summary(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _points(name: str, history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """`(step, value)` for all steps at which a metric is a finite number."""
    return [
        (float(line["step"]), float(line[name]))
        for line in history
        if isinstance(line.get(name), int | float) and abs(line[name]) < _MOST_DRAWN  # false for nan, too
    ]
