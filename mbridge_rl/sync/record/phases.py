"""The phases of a sync on a trainer rank, and how all ranks' are brought together: a few numbers each, in one sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.record.timeline import Span

PLAN = "plan"  # once, when a WeightSync is made
OUTER = ("check", "encode", "begin", "transfer", "verify", "decide", "commit")
PHASES = (*((phase, "") for phase in OUTER), ("pack", "transfer"), ("wire", "transfer"))

LANES = 32  # of trainer ranks in a record: it must stay readable, and short, whatever the number of ranks


def lane(rank: int) -> str:
    return f"rank {rank}"


def of_other_ranks(spans: Sequence[Span], group: RankGroup) -> list[Span]:
    """The spans of the other ranks or, of more than `LANES`, of those that took longest to transfer. All ranks together.

    Args:
        spans: this rank's own.
    """
    mine = {(span.phase, span.inside): span for span in spans}
    table = torch.zeros(group.size, len(PHASES), 3, dtype=torch.int64)  # [ranks, phases, (start, end, busy)], nanoseconds
    for position, phase in enumerate(PHASES):
        if phase in mine:
            span = mine[phase]
            times = [round(seconds * 1e9) for seconds in (span.start, span.end, span.busy)]
            table[group.rank, position] = torch.tensor(times)
    table = group.sum(table)
    slowest = table[:, OUTER.index("transfer"), 2].argsort(descending=True)[:LANES].sort().values.tolist()
    return [
        Span(lane(rank), phase, inside, *(nanoseconds / 1e9 for nanoseconds in table[rank, position].tolist()))
        for rank in slowest
        if rank != group.rank
        for position, (phase, inside) in enumerate(PHASES)
        if table[rank, position, 0]
    ]
