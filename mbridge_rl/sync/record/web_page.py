"""Makes self-contained HTML pages with plots as SVG and tables. They have no scripts and load nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b", "#0891b2", "#db2777", "#ca8a04")

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 200, 56, 24, 10
_STYLE = """
body{font:14px/1.5 system-ui;margin:2rem auto;max-width:1480px;padding:0 1rem;color:#0f172a}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}figure{display:inline-block;margin:0 1rem 1.2rem 0;vertical-align:top}
figcaption{font-weight:600}table{border-collapse:collapse}
td,th{padding:.15rem .8rem;border-bottom:1px solid #e2e8f0;text-align:left}
pre{background:#f1f5f9;padding:.8rem;overflow:auto;white-space:pre-wrap}.key{margin-right:.8rem;font-size:12px}
"""

Point = tuple[float, float]


def page(title: str, sections: Iterable[str]) -> str:
    """The complete HTML document."""
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        + "\n".join(sections)
        + "\n"
    )


def write_page(path: Path, text: str) -> None:
    """Writes a document. Characters that UTF-8 cannot encode (completions may hold some) are written as escapes."""
    path.write_text(text, "utf-8", "backslashreplace")


def plot(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """A figure with the curves `series`, by name; an empty string if no curve has a point."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> Point:
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
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        if len(points) == 1:
            x, y = at(*points[0])
            marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='{color}'/>")
        marks.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.6'/>")
        keys.append(f"<span class='key' style='color:{color}'>{html.escape(name)} {points[-1][1]:.4g}</span>")
    return figure(title, svg(title, _WIDTH, _HEIGHT, marks), keys)


def figure(title: str, drawing: str, keys: Iterable[str] = ()) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{drawing}<div>{''.join(keys)}</div></figure>"


def svg(title: str, width: int, height: int, marks: Iterable[str]) -> str:
    label = html.escape(title, quote=True)
    return f"<svg width='{width}' height='{height}' role='img' aria-label='{label}'>{''.join(marks)}</svg>"


def table(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = (f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(shown(value))}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>" if values else ""


def records(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """A table of records that have the same fields; an empty string if there is no record."""
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
    rows = ("<tr>" + "".join(f"<td>{html.escape(shown(value))}</td>" for value in line.values()) + "</tr>" for line in lines)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
