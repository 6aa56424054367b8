"""The phases of a sync on a trainer rank, and the sum that collects those of all ranks, with a few numbers for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.record.timeline import Span

PLAN = "plan"  # the phase in which a WeightSync is made, once
OUTER = ("check", "encode", "begin", "transfer", "verify", "decide", "commit")
PHASES = (*((phase, "") for phase in OUTER), ("pack", "transfer"), ("wire", "transfer"))

LANES = 32  # the most trainer ranks in a report, which must stay short and readable whatever the number of ranks


def lane(rank: int) -> str:
    return f"rank {rank}"


def of_other_ranks(spans: Sequence[Span], group: RankGroup) -> list[Span]:
    """The spans of the other ranks; of more than `LANES` ranks, only of those that took longest to transfer. All ranks call it
    together.

    Args:
        spans: this rank's own spans.
        group: the trainer ranks.
    """
    own_spans = {(span.phase, span.inside): span for span in spans}
    table = torch.zeros(group.size, len(PHASES), 3, dtype=torch.int64)  # [ranks, phases, (start, end, busy)], nanoseconds
    for position, phase in enumerate(PHASES):
        if phase in own_spans:
            span = own_spans[phase]
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
