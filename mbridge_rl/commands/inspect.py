"""`mbridge-rl inspect`: shows of which Hugging Face tensors each Megatron tensor is composed, and how it is sharded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mbridge_rl.commands.arguments import (
    layout_of,
    model_config,
    readable_errors,
    takes_layout,
)
from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.core.model import ModelSpec
    from mbridge_rl.core.rules import HFPart, Rule

_PLACES = {
    "first_stage": "first",
    "last_stage": "last",
    "last_stage_copy": "last, a copy of the embedding unless it is the first",
}


@takes_layout
def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, a config.json, or a bundled name such as kimi-k2.")],
    *,
    layout_options: dict[str, Any],
    rank: Annotated[int | None, typer.Option(min=0, help="Show what this rank of the layout holds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The mapping table of a model: {layer} and {expert} stand for every one of them.

    With a layout shapes are also those of a rank; with --rank only what that rank holds is shown, part by part.
    """
    with readable_errors():
        from mbridge_rl.bridges import model_spec

        spec = model_spec(model_config(model))
        layout = layout_of(layout_options, spec.num_layers)
        if layout is not None:
            spec.validate(layout)
        rows = _table(spec, layout) if rank is None else _rank_rows(spec, layout, rank)
    if as_json:
        facts = {
            "model": model,
            "architecture": spec.architecture,
            "layout": None if layout is None else str(layout),
            "rank": rank,
        }
        typer.echo(json.dumps(facts | {"tensors": rows}, indent=2))
    elif rank is None:
        _print_table(rows, with_shards=layout is not None)
    else:
        _print_rank(rows)


def _table(spec: ModelSpec, layout: ParallelLayout | None) -> list[dict[str, Any]]:
    rows = []
    for rule in spec.rules:
        if rule.layers == ():
            continue
        row = {
            "megatron_name": rule.megatron_name,
            "megatron_shape": [*rule.shape[: rule.dim], rule.extent, *rule.shape[rule.dim + 1 :]],
            "hf": [{"hf_name": part.hf_name, "shape": list(part.shape), "taken": _taken(part)} for part in rule.parts],
            "cut": _cut(rule),
            "stage": _stage(rule, spec.num_layers),
            "dtype": None if rule.dtype is None else str(rule.dtype).removeprefix("torch."),
        }
        if layout is not None:
            row["shard_shape"] = list(rule.local_shape(layout))
        rows.append(row)
    return rows


def _taken(part: HFPart) -> str | None:
    """The index range that the part takes of its HF tensor; `None` if it takes the full tensor."""
    fixed = [axis.along is None or axis.count != axis.extent for axis in part.axes]
    if not any(fixed):
        return None
    ranges = []
    for axis in part.axes:
        if axis.along is None:
            ranges.append("{expert}" if axis.index else str(axis.start))
        else:
            ranges.append(":" if axis.count == axis.extent else f"{axis.start}:{axis.start + axis.count}")
    shape = "x".join(str(axis.extent) for axis in part.axes)
    return f"[{', '.join(ranges)}]" + (f" of {shape}" if part.hf_shape else "")


def _cut(rule: Rule) -> str:
    """A description of the axes that shard the tensor, and of the dimension."""
    return f"ep: experts, {_cut_by_tensor(rule)}" if "{expert}" in rule.megatron_name else _cut_by_tensor(rule)


def _cut_by_tensor(rule: Rule) -> str:
    if rule.axis is None:
        return "whole"
    dimension = "rows" if rule.dim == 0 else "columns" if rule.dim == 1 else f"dimension {rule.dim}"
    if rule.groups:
        return f"{rule.axis}: {dimension}, {rule.groups} groups"
    if rule.padded:
        return f"{rule.axis}: {dimension}, padded"
    return f"{rule.axis}: {dimension}" + (" of each part" if len(rule.parts) > 1 else "")


def _stage(rule: Rule, num_layers: int) -> str:
    if rule.placement != "layer":
        return _PLACES.get(rule.placement, rule.placement)
    if rule.layers is None:
        return f"layers 0-{num_layers - 1}"
    return f"layer{'s' * (len(rule.layers) > 1)} {_ranges(rule.layers)}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Formats `(0, 1, 2, 5)` as `0-2, 5`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rank_rows(spec: ModelSpec, layout: ParallelLayout | None, rank: int) -> list[dict[str, Any]]:
    """One row for each tensor of the rank, with the boxes of HF tensors of which it is composed."""
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.core.segments import megatron_side

    side = megatron_side(spec, layout or ParallelLayout(), rank)
    rows = {name: {"megatron_name": name, "shape": list(shape), "parts": []} for name, shape in side.shapes.items()}
    for segment in side.segments:
        ranges = [f"{start}:{start + size}" for start, size in zip(segment.box.start, segment.box.size, strict=True)]
        grid = spec.hf_grid(segment.hf_name)
        factored = "" if grid == spec.hf_shapes[segment.hf_name] else f" of {_shape(grid)}"
        part = {"hf_name": segment.hf_name, "box": f"[{', '.join(ranges)}]{factored}", "offset": segment.offset}
        rows[segment.local_name]["parts"].append(part)
    return list(rows.values())


def _print_table(rows: list[dict[str, Any]], *, with_shards: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("Megatron", "shape", *(["on a rank"] if with_shards else []), "Hugging Face", "shape", "cut by", "where"):
        table.add_column(name, overflow="fold")
    for row in rows:
        names = [part["hf_name"] + (f" {part['taken']}" if part["taken"] else "") for part in row["hf"]]
        table.add_row(
            row["megatron_name"],
            _shape(row["megatron_shape"]),
            *([_shape(row["shard_shape"])] if with_shards else []),
            "\n".join(names),
            "\n".join(_shape(part["shape"]) for part in row["hf"]),
            row["cut"],
            row["stage"] + (f", {row['dtype']}" if row["dtype"] else ""),
        )
    _terminal().print(table)


def _print_rank(rows: list[dict[str, Any]]) -> None:
    terminal = _terminal()
    for row in rows:
        terminal.line(f"{row['megatron_name']} {_shape(row['shape'])}")
        for part in row["parts"]:
            terminal.line(f"    {part['hf_name']}{part['box']}")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _terminal() -> Terminal:
    """A terminal, or an output wide enough that names are not broken."""
    terminal = Terminal()
    return terminal if terminal.is_terminal else Terminal(width=240)
