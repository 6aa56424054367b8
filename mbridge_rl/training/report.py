"""A run as one self-contained HTML page: plots as SVG, no scripts, nothing fetched. A run that is going on can be read, too."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mbridge_rl.training.config_file import ConfigError
from mbridge_rl.training.run_log import EVALUATION_FILE, EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, read_lines

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
"""Titles and the metrics that are drawn together; what a run does not have is left out."""

_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 200, 56, 24, 10
_STYLE = """
body{font:14px/1.5 system-ui;margin:2rem auto;max-width:1480px;padding:0 1rem;color:#0f172a}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}figure{display:inline-block;margin:0 1rem 1.2rem 0;vertical-align:top}
figcaption{font-weight:600}table{border-collapse:collapse}
td,th{padding:.15rem .8rem;border-bottom:1px solid #e2e8f0;text-align:left}
pre{background:#f1f5f9;padding:.8rem;overflow:auto;white-space:pre-wrap}.key{margin-right:.8rem;font-size:12px}
"""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the page and returns where.

    Raises:
        ConfigError: the folder holds no run.
    """
    history = read_lines(run_dir / METRICS_FILE)
    if not history:
        raise ConfigError(f"{run_dir / METRICS_FILE} has no complete step: is {run_dir} the folder of a run?")
    output = output or run_dir / "report.html"
    output.write_text(_page(run_dir, history))
    return output


def _page(run_dir: Path, history: list[dict[str, Any]]) -> str:
    last = history[-1]
    summary = run_dir / "summary.json"
    state = "finished" if summary.exists() else "going on, or interrupted"
    config = run_dir / "config.yaml"
    text = config.read_text() if config.exists() else ""
    steps = (yaml.safe_load(text) or {}).get("steps", "?") if text else "?"
    sections = [
        f"<h1>{html.escape(str(run_dir))}</h1><p>Step {last['step']} of {steps}, {state}.</p>",
        _table(json.loads(summary.read_text()) if summary.exists() else {}),
        "<h2>Metrics</h2>",
        *(_plot(title, names, history) for title, names in PLOTS),
        _lines("What went wrong and was survived", read_lines(run_dir / EVENTS_FILE)),
        _lines("Last greedy evaluation", read_lines(run_dir / EVALUATION_FILE)[:40]),
        _lines("Last samples", read_lines(run_dir / SAMPLES_FILE)[-20:]),
        "<h2>The last step</h2>",
        _table(last),
        f"<h2>Configuration</h2><pre>{html.escape(text)}</pre>" if text else "",
    ]
    title = html.escape(run_dir.name)
    return f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>" + "\n".join(sections) + "\n"


def _plot(title: str, names: Sequence[str], history: list[dict[str, Any]]) -> str:
    """One figure, or nothing if the run has none of these metrics."""
    series = {name: _points(name, history) for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - 8), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    marks = []
    for value in (low, (low + high) / 2, high):
        _, y = at(first, value)
        marks.append(f"<line x1='{_LEFT}' x2='{_WIDTH - 8}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e2e8f0'/>")
        marks.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end' font-size='11'>{value:.3g}</text>")
    for value, anchor in ((first, "start"), (last, "end")):
        x, _ = at(value, low)
        marks.append(f"<text x='{x:.1f}' y='{_HEIGHT - 6}' text-anchor='{anchor}' font-size='11'>{value:g}</text>")
    keys = []
    for (name, points), color in zip(series.items(), _COLORS, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        if len(points) == 1:
            x, y = at(*points[0])
            marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='{color}'/>")
        marks.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.6'/>")
        keys.append(f"<span class='key' style='color:{color}'>{html.escape(name)} {points[-1][1]:.4g}</span>")
    svg = f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{html.escape(title)}'>{''.join(marks)}</svg>"
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<div>{''.join(keys)}</div></figure>"


def _points(name: str, history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Steps at which a metric is a finite number."""
    return [
        (float(line["step"]), float(line[name]))
        for line in history
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(_shown(value))}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>" if values else ""


def _lines(title: str, lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
    rows = ("<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in line.values()) + "</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
