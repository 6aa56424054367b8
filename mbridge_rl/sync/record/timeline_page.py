"""Shows the syncs of a run as a page: how long each took and why, and what every rank, engine and worker did at which time.

The page is plain HTML and SVG. The same timeline as a picture (`write_png`) needs matplotlib.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mbridge_rl.core.errors import BridgeError, missing_extra
from mbridge_rl.sync.record.phases import OUTER, PLAN
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.record.sinks import SYNCS_FILE, read_syncs
from mbridge_rl.sync.record.timeline import Span
from mbridge_rl.sync.record.web_page import figure, page, plot, records, svg, table
from mbridge_rl.sync.record.web_page import write_page as write_document

PHASE_COLORS = {
    "check": "#94a3b8",
    "encode": "#a16207",
    "begin": "#64748b",
    "transfer": "#2563eb",
    "pack": "#60a5fa",
    "wire": "#f59e0b",
    "verify": "#16a34a",
    "decide": "#db2777",
    "commit": "#9333ea",
    "report": "#cbd5e1",
    "pause": "#dc2626",
    "hold": "#fca5a5",
    "serve": "#f472b6",
    "receive": "#0891b2",
    "stage": "#67e8f9",
    "load": "#7c3aed",
    "write": "#c4b5fd",
    "settle": "#a8a29e",
    "derive": "#78716c",
}
_OTHER_COLOR = "#0f172a"

_ROW, _BAR, _LABEL, _DRAWN = 16, 11, 170, 1120  # pixels
_LISTED = 60


class Row(NamedTuple):
    """One row of a timeline: a lane with its outermost phases, or one inner phase of the lane above."""

    label: str
    spans: list[Span]


def rows(report: SyncReport) -> list[Row]:
    """The rows of a sync's timeline, trainer first. The phase before the sync (`plan`) is left out."""
    lines = []
    spans = [span for span in report.spans if span.phase != PLAN]
    for lane in sorted({span.lane for span in spans}, key=_place):
        of_lane = sorted((span for span in spans if span.lane == lane), key=lambda span: span.start)
        lines.append(Row(lane, [span for span in of_lane if not span.inside]))
        for phase in dict.fromkeys(span.phase for span in of_lane if span.inside):
            lines.append(Row(f"· {phase}", [span for span in of_lane if span.inside and span.phase == phase]))
    return lines


def _place(lane: str) -> tuple[bool, list[tuple[int, str]]]:
    """A sort key for lanes: ranks come first, every engine before its workers, all by number."""
    return lane.startswith("engine"), [(int(word), "") if word.isdigit() else (-1, word) for word in lane.split()]


def write_page(run: Path, output: Path | None = None, version: int | None = None) -> Path:
    """Writes the page of a run's syncs and returns its path.

    Args:
        run: a run's folder, or a file of `sinks.JsonLines`.
        output: the path of the page; by default `sync-report.html` in the folder.
        version: the version whose timeline is drawn first, before those of the first, the slowest, the last and failed syncs.

    Raises:
        BridgeError: no sync was recorded there, or none of this version.
    """
    reports = read_syncs(run)
    output = output or _folder(run) / "sync-report.html"
    picked = [] if version is None else [picked_sync(reports, version)]
    good = [report for report in reports if not report.error] or reports
    notable = [*picked, good[-1], max(good, key=lambda report: report.seconds), good[0]]
    notable += [report for report in reports if report.error or report.retries][-3:]
    sections = [
        f"<h1>{html.escape(str(run))}</h1><p>{_heading(reports)}</p>",
        table(summary(reports)),
        "<h2>By version</h2>",
        plot("Seconds by phase, rank 0", {phase: _curve(reports, "rank", phase) for phase in OUTER}),
        plot("Slowest rank (s)", {phase: _curve(reports, "rank", phase) for phase in ("pack", "wire")}),
        plot(
            "Slowest worker (s)", {phase: _curve(reports, "worker", phase) for phase in ("receive", "load", "verify", "derive")}
        ),
        plot("Engines pause (s)", {"pause": _curve(reports, "engine", "pause")}),
        plot("GB/s", {"gigabytes_per_second": [(report.version, report.gigabytes_per_second) for report in good]}),
        "<h2>Timelines</h2><p>Bars reach from the first to the last moment of a phase; what took turns with others is solid "
        "for as long as it took.</p>",
        *(timeline(report) for report in {id(report): report for report in notable}.values()),
        records(f"The last {_LISTED} syncs", [_line(report) for report in reports[-_LISTED:]]),
    ]
    write_document(output, page(f"{run.name}: syncs", sections))
    return output


def write_png(run: Path, output: Path | None = None, version: int | None = None) -> Path:
    """Draws the phases of all syncs, and the timeline of one sync, as a picture; returns its path.

    Args:
        run: a run's folder, or a file of `sinks.JsonLines`.
        output: the path of the picture; by default `sync-report.png` in the folder.
        version: the version whose timeline is drawn; by default the last one that was committed.

    Raises:
        BridgeError: as `write_page`. ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("a PNG needs matplotlib, which the HTML page does not", "plots") from error
    reports = read_syncs(run)
    good = [report for report in reports if not report.error] or reports
    chosen = good[-1] if version is None else picked_sync(reports, version)
    lines = rows(chosen)
    drawing = Figure(figsize=(13, 3.6 + 0.22 * len(lines)), layout="constrained")
    over_versions, over_time = drawing.subplots(2, 1, height_ratios=(3.0, 0.22 * len(lines) + 0.6))
    _draw_versions(over_versions, reports)
    _draw_timeline(over_time, chosen, lines)
    output = output or _folder(run) / "sync-report.png"
    drawing.savefig(output, dpi=110)
    return output


def picked_sync(reports: Sequence[SyncReport], version: int) -> SyncReport:
    """The last report of a version.

    Raises:
        BridgeError: there is none.
    """
    of_version = [report for report in reports if report.version == version]
    if not of_version:
        versions = [report.version for report in reports]
        raise BridgeError(f"no sync of version {version} was recorded; there are {min(versions)} to {max(versions)}")
    return of_version[-1]


def summary(reports: Sequence[SyncReport]) -> dict[str, Any]:
    """The numbers of all committed syncs together."""
    good = [report for report in reports if not report.error]
    counts: dict[str, Any] = {
        "committed, failed, retries": f"{len(good)}, {len(reports) - len(good)}, {sum(report.retries for report in reports)}",
    }
    if not good:
        return counts
    last = good[-1]
    explained = [sum(report.phases.values()) / report.seconds for report in good]
    plan = max((report.slowest.get("rank", {}).get(PLAN, 0.0) for report in good), default=0.0)
    return counts | {
        "last version and digest": f"{last.version}, {last.digest} ({'verified' if last.verified else 'not verified'})",
        "way": f"{last.mode}, {last.transport}, {last.buckets} buckets",
        "bytes per sync": f"{last.nbytes:,} in {last.tensors} tensors",
        "seconds, median and longest": f"{_median(good, 'seconds'):.4g}, {max(report.seconds for report in good):.4g}",
        "pause, median and longest": f"{_median(good, 'pause_seconds'):.4g}, {max(r.pause_seconds for r in good):.4g}",
        "GB/s, median": _median(good, "gigabytes_per_second"),
        "plan (once, before the first), s": plan,
        "share of the wall time that phases explain, least": f"{min(explained):.2%}",
    }


def timeline(report: SyncReport) -> str:
    """One sync as a figure."""
    lines = rows(report)
    scale = _DRAWN / max(report.seconds, 1e-9)
    marks, height = [], _ROW * len(lines) + 24
    for tick in range(6):
        x = _LABEL + _DRAWN * tick / 5
        label = f"{1e3 * report.seconds * tick / 5:.4g} ms"
        marks.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{height - 20}' stroke='#e2e8f0'/>")
        marks.append(f"<text x='{x:.1f}' y='{height - 6}' text-anchor='middle' font-size='11'>{label}</text>")
    for number, (label, spans) in enumerate(lines):
        y, size = _ROW * number + 2, 10 if label.startswith("·") else 12
        marks.append(f"<text x='{_LABEL - 8}' y='{y + 10}' text-anchor='end' font-size='{size}'>{html.escape(label)}</text>")
        for span in spans:
            x, width, busy = (
                _LABEL + scale * (span.start - report.started),
                scale * (span.end - span.start),
                scale * span.busy,
            )
            color = PHASE_COLORS.get(span.phase, _OTHER_COLOR)
            tooltip = f"{span.lane}: {span.phase}, {1e3 * span.busy:.3f} ms"
            marks.append(f"<g><title>{html.escape(tooltip)}</title>")
            marks.append(f"<rect x='{x:.1f}' y='{y}' width='{width:.2f}' height='{_BAR}' fill='{color}' opacity='.3'/>")
            marks.append(f"<rect x='{x:.1f}' y='{y}' width='{busy:.2f}' height='{_BAR}' fill='{color}'/></g>")
    used = dict.fromkeys(span.phase for _, spans in lines for span in spans)
    keys = (
        f"<span class='key' style='color:{PHASE_COLORS.get(phase, _OTHER_COLOR)}'>■ {html.escape(phase)}</span>"
        for phase in used
    )
    title = f"Version {report.version}: {1e3 * report.seconds:.4g} ms, {report.gigabytes_per_second:.3g} GB/s"
    title += f", {report.retries} retries" if report.retries else ""
    title += f", {report.error}" if report.error else ""
    return figure(title, svg(title, _LABEL + _DRAWN + 40, height, marks), keys)


def _draw_versions(axes: Any, reports: Sequence[SyncReport]) -> None:
    positions, bottom = range(len(reports)), [0.0] * len(reports)
    for phase in (*OUTER, "report"):
        heights = [1e3 * report.phases.get(phase, 0.0) for report in reports]
        axes.bar(positions, heights, 0.9, bottom, color=PHASE_COLORS[phase], label=phase)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    failed = [position for position, report in enumerate(reports) if report.error]
    if failed:
        axes.plot(failed, [bottom[position] for position in failed], "x", color=PHASE_COLORS["pause"], label="failed")
    step = max(1, len(reports) // 20)
    axes.set_xticks(list(positions)[::step], [str(report.version) for report in reports][::step])
    axes.set(xlabel="version", ylabel="ms of rank 0", title="Syncs by phase")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _draw_timeline(axes: Any, report: SyncReport, lines: Sequence[Row]) -> None:
    for number, (_, spans) in enumerate(lines):
        for span in spans:
            start, extent, busy = (1e3 * value for value in (span.start - report.started, span.end - span.start, span.busy))
            color = PHASE_COLORS.get(span.phase, _OTHER_COLOR)
            axes.broken_barh([(start, extent)], (number - 0.4, 0.8), color=color, alpha=0.3)
            axes.broken_barh([(start, busy)], (number - 0.4, 0.8), color=color, label=span.phase)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, 1e3 * report.seconds)
    axes.set(xlabel="ms", title=f"Version {report.version}: {1e3 * report.seconds:.4g} ms, digest {report.digest}")
    by_phase = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(by_phase.values(), by_phase.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _heading(reports: Sequence[SyncReport]) -> str:
    return f"Versions {reports[0].version} to {reports[-1].version}, of {SYNCS_FILE}."


def _line(report: SyncReport) -> dict[str, Any]:
    return {
        "version": report.version,
        "ms": 1e3 * report.seconds,
        "GB/s": report.gigabytes_per_second,
        "pause ms": 1e3 * report.pause_seconds,
        **{f"{phase} ms": 1e3 * report.phases.get(phase, 0.0) for phase in OUTER},
        "attempts": report.attempts,
        "digest": report.digest or "",
        "error": report.error,
    }


def _curve(reports: Sequence[SyncReport], side: str, phase: str) -> list[tuple[float, float]]:
    if side == "rank" and phase in OUTER:
        return [(report.version, report.phases[phase]) for report in reports if phase in report.phases]
    points = [(report.version, report.slowest.get(side, {}).get(phase)) for report in reports]
    return [(version, seconds) for version, seconds in points if seconds is not None]


def _median(reports: Sequence[SyncReport], name: str) -> float:
    return statistics.median(getattr(report, name) for report in reports)


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent
