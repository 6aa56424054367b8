"""`mbridge-rl plan`: estimates the costs of a refit of engines from a trainer, for any model and layouts, on a laptop."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mbridge_rl.commands.arguments import (
    Dtype,
    model_config,
    pairs,
    readable,
    readable_errors,
    size_in_bytes,
    stages,
    torch_dtype,
    whole_number,
    with_stages,
)
from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    from mbridge_rl.core.estimate import Estimate, PeerTraffic, RefitSchedule, Spread
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.core.model import ModelSpec

_TRAINER = (
    *("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "vocab_multiple", "order", "stages"),
    *("first_stage_layers", "last_stage_layers", "embedding_as_layer", "loss_as_layer"),
)
_ROLLOUT = ("tp", "pp", "ep", "dp", "replicas")
_SHOWN_PEERS = 12


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint directory, a config.json, a bundled name such as kimi-k2, or a recipe of `mbridge-rl train`, "
            "which brings its layouts."
        ),
    ],
    trainer: Annotated[
        str | None,
        typer.Option(
            help="Megatron's layout: tp=8,pp=16,ep=64,etp=1,dp=8 and vpp, cp, order, vocab_multiple. stages=4x13+3x3 splits "
            "layers (thirteen stages of four, then three of three), stages=Et*3|(tt|)*29,m|L as in Megatron, and so do "
            "first_stage_layers=3, last_stage_layers=3, embedding_as_layer=1, loss_as_layer=1; without any the split is as "
            "even as can be. tp=1 if not given."
        ),
    ] = None,
    rollout: Annotated[
        str | None,
        typer.Option(help="An engine's layout and how many there are: tp=16,replicas=8 and pp, dp, ep (experts whole)."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights as they travel.")] = Dtype.BF16,
    bucket: Annotated[
        str, typer.Option(help="What a rank sends or receives in one bucket at most; two are staged.")
    ] = "256MiB",
    trainer_bandwidth: Annotated[float, typer.Option(help="GB/s of a trainer rank, each way.")] = 50.0,
    rollout_bandwidth: Annotated[float, typer.Option(help="GB/s of a rollout rank, each way.")] = 50.0,
    message_microseconds: Annotated[float, typer.Option(help="What a message costs a rank beside its bytes.")] = 10.0,
    rank: Annotated[
        int | None, typer.Option(help="Show the part of one rank: trainer ranks first, then engine by engine.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compile the whole plan at once instead of one layer of each kind.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a refit costs: bytes per rank, balance, buckets, messages, memory and time, without weights or devices.

    Trainer ranks send every byte that a rollout rank keeps straight to it, in buckets; engines hand on to each other what came
    in, so that each byte leaves the trainer once. docs/planning.md says how to read the numbers.
    """
    from mbridge_rl.bridges import model_spec
    from mbridge_rl.core.estimate import Links

    with readable_errors():
        recipe_layout: ParallelLayout | None = None
        if model.endswith((".yaml", ".yml")):
            model, hf_config, recipe_layout, engines = _recipe(model)
            rollout = rollout or engines
        else:
            hf_config = model_config(model)
        began = time.perf_counter()  # only now, since reading a recipe imports most of the library
        spec = model_spec(hf_config)
        if recipe_layout is None or trainer is not None:
            trainer_layout = _trainer_layout(trainer or "tp=1", spec)
        else:
            trainer_layout = recipe_layout
        ends = trainer_layout, *_rollout_layout(rollout or "tp=1", spec)
        refit, facts = _refit(spec, *ends, dtype, size_in_bytes(bucket), exact=exact)
        links = Links(trainer_bandwidth * 1e9, rollout_bandwidth * 1e9, message_microseconds * 1e-6)
        estimate = refit.estimate(links)
        facts = {"model": model, **facts, "seconds_to_plan": round(time.perf_counter() - began, 2)}
        exchanges = None if rank is None else _exchanges(refit, rank, facts)
    if as_json:
        result = facts | {"estimate": _as_json(estimate)}
        if exchanges is not None:
            result |= {"rank": rank, "exchanges": [asdict(exchange) for exchange in exchanges]}
        typer.echo(json.dumps(result, indent=2))
    elif exchanges is None:
        _print_estimate(estimate, facts)
    else:
        _print_exchanges(exchanges, rank or 0, facts)


def _recipe(path: str) -> tuple[str, Any, ParallelLayout, str]:
    """The model's name, its config, the trainer's layout and the engines' layout of a training recipe."""
    from mbridge_rl.training.run.config import load_run_config
    from mbridge_rl.training.run.setup import toy_config

    run = load_run_config(path)
    hf_config = toy_config(run) if run.is_toy else model_config(run.model.path)
    return run.model.path, hf_config, run.layout, f"tp={run.engine.tensor_parallel_size},replicas={run.engine.count}"


def _trainer_layout(text: str, spec: ModelSpec) -> ParallelLayout:
    from mbridge_rl.core.errors import LayoutError

    given = pairs(text, _TRAINER)
    layout: dict[str, Any] = {
        name: whole_number(name, value) for name, value in given.items() if name not in ("order", "stages")
    }
    if "order" in given:
        layout["order"] = given["order"]
    if "stages" in given:
        layout |= stages(given["stages"])
    try:
        return with_stages(layout, spec.num_layers)
    except LayoutError as error:
        hint = "" if "etp" in given or "ep" not in given else ". etp is tp where it is not given: did you mean etp=1?"
        raise LayoutError(f"--trainer {text}: {error}{hint}") from error


def _rollout_layout(text: str, spec: ModelSpec) -> tuple[ParallelLayout, int]:
    """An engine's layout as a Megatron layout, and the number of engines. Without expert parallelism an engine shards each
    expert over all of its ranks; with it, over the ranks that share an expert."""
    from mbridge_rl.core.errors import LayoutError

    sizes = {name: whole_number(name, value) for name, value in pairs(text, _ROLLOUT).items()}
    replicas, ranks, ep = sizes.pop("replicas", 1), sizes.get("tp", 1) * sizes.get("dp", 1), sizes.get("ep", 1)
    if ranks % ep:
        raise LayoutError(f"--rollout {text}: ep={ep} must divide tp*dp = {ranks}")
    return with_stages({**sizes, "etp": ranks // ep if spec.num_experts else None}, spec.num_layers), replicas


def _refit(
    spec: ModelSpec, trainer: ParallelLayout, engine: ParallelLayout, replicas: int, dtype: Dtype, bucket: int, *, exact: bool
) -> tuple[RefitSchedule, dict[str, Any]]:
    """The schedule, and the facts about the model and the layouts that are printed with its costs."""
    from math import prod

    import numpy as np

    from mbridge_rl.core.estimate import RefitSchedule
    from mbridge_rl.core.templates import compile_flows, compile_templates

    flows = (compile_flows if exact else compile_templates)(spec, trainer, engine)
    dtypes = spec.hf_dtypes(torch_dtype(dtype))
    element_bytes = np.array([dtypes[hf_name].itemsize for hf_name in flows.hf_names])
    sizes = np.array([prod(spec.hf_shapes[hf_name]) for hf_name in flows.hf_names])
    refit = RefitSchedule(flows, trainer.world_size, engine.world_size, element_bytes, replicas=replicas, bucket_bytes=bucket)
    return refit, {
        "architecture": spec.architecture,
        "parameters": int(sizes.sum()),
        "tensors": len(sizes),
        "model_bytes": int((sizes * element_bytes).sum()),
        "dtype": dtype.value,
        "trainer": str(trainer),
        "trainer_ranks": trainer.world_size,
        "engine": str(engine),
        "replicas": replicas,
        "rollout_ranks": replicas * engine.world_size,
        "bucket_bytes": bucket,
        "exact": exact,
        "fingerprint": flows.fingerprint,
    }


def _exchanges(refit: RefitSchedule, rank: int, facts: dict[str, Any]) -> list[PeerTraffic]:
    from mbridge_rl.core.errors import LayoutError

    ranks = facts["trainer_ranks"] + facts["rollout_ranks"]
    if not 0 <= rank < ranks:
        raise LayoutError(
            f"--rank {rank}: there are {facts['trainer_ranks']} trainer and {facts['rollout_ranks']} rollout ranks"
        )
    return refit.exchanges(rank)


def _as_json(estimate: Estimate) -> dict[str, Any]:
    spreads = ("sent", "received", "entered", "relayed")
    return asdict(estimate) | {
        name: asdict(getattr(estimate, name)) | {"balance": getattr(estimate, name).balance} for name in spreads
    }


def _print_estimate(estimate: Estimate, facts: dict[str, Any]) -> None:
    terminal = Terminal()
    terminal.line(*_heading(facts))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("per rank", no_wrap=True)
    for name in ("least", "mean", "most", "most / mean", "all ranks"):
        table.add_column(name, justify="right")
    rows: list[tuple[str, Spread]] = [("a trainer rank sends", estimate.sent), ("a rollout rank receives", estimate.received)]
    if facts["replicas"] > 1:
        rows += [("  from trainers", estimate.entered), ("  and hands on", estimate.relayed)]
    for name, spread in rows:
        amounts = [readable(amount) for amount in (spread.minimum, spread.mean, spread.maximum)]
        table.add_row(name, *amounts, f"{spread.balance:.2f}", readable(spread.total))
    Terminal(wraps=True).print(table)
    staging = f"{readable(estimate.trainer_staging)} on a trainer rank, {readable(estimate.rollout_staging)} on a rollout rank"
    lines = {
        "buckets": f"{estimate.buckets:,} of up to {readable(facts['bucket_bytes'])} per rank",
        "messages": f"{estimate.messages:,}, packed from {estimate.rectangles:,} rectangles",
        "staging memory": staging,
        "lower bound": f"{estimate.lower_bound_seconds:.3g} s: the bytes of the busiest link over its bandwidth",
        "prediction": f"{estimate.predicted_seconds:.3g} s: bucket after bucket, each as long as its busiest rank takes",
        "fingerprint": f"{facts['fingerprint']}, planned in {facts['seconds_to_plan']:.1f} s",
    }
    for name, text in lines.items():
        terminal.line((f"{name:<16}", "bold"), text)


def _print_exchanges(exchanges: list[PeerTraffic], rank: int, facts: dict[str, Any]) -> None:
    terminal = Terminal()
    terminal.line(*_heading(facts))
    for sends, verb, preposition in ((True, "sends", "to"), (False, "receives", "from")):
        part = sorted((exchange for exchange in exchanges if exchange.sends is sends), key=lambda exchange: -exchange.nbytes)
        if not part:
            continue
        total, messages = sum(exchange.nbytes for exchange in part), sum(exchange.messages for exchange in part)
        text = f"{verb} {readable(total)} in {messages:,} messages {preposition} {len(part)} ranks"
        terminal.line((_name(rank, facts), "bold"), f" {text}")
        for exchange in part[:_SHOWN_PEERS]:
            line = f"  {_name(exchange.peer, facts):<34}{readable(exchange.nbytes):>12}{exchange.messages:>8,}"
            terminal.line(line)
        if len(part) > _SHOWN_PEERS:
            terminal.line(f"  ... and {len(part) - _SHOWN_PEERS} more (all of them with --json)")


def _heading(facts: dict[str, Any]) -> tuple[tuple[str, str], str]:
    return (facts["model"], "bold"), (
        f" ({facts['architecture']}): {_count(facts['parameters'])} parameters in "
        f"{facts['tensors']:,} tensors, {readable(facts['model_bytes'])} in {facts['dtype']}\n"
        f"{facts['trainer_ranks']:,} trainer ranks, {facts['trainer']}\n"
        f"{facts['rollout_ranks']:,} rollout ranks, {facts['replicas']} x {facts['engine']}\n"
    )


def _count(parameters: int) -> str:
    """A number of parameters as text, in billions, or in millions if billions would round to 0."""
    return f"{parameters / 1e9:,.1f} B" if parameters >= 1e8 else f"{parameters / 1e6:,.2f} M"


def _name(rank: int, facts: dict[str, Any]) -> str:
    if rank < facts["trainer_ranks"]:
        return f"trainer rank {rank}"
    engine, worker = divmod(rank - facts["trainer_ranks"], facts["rollout_ranks"] // facts["replicas"])
    return f"rank {rank} (engine {engine}, rank {worker})"
