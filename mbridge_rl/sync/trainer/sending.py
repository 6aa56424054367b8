"""The loop in which a trainer rank packs its parts and hands them to a transport."""

from __future__ import annotations

from mbridge_rl.sync.payload.route import Route
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.trainer.delta_sender import DeltaSender
from mbridge_rl.sync.trainer.packer import Packer
from mbridge_rl.sync.transports import Outlet


def send_parts(
    rank: int, route: Route, sent: Route, outlet: Outlet, packer: Packer, deltas: DeltaSender | None, watch: Stopwatch
) -> None:
    """Packs and sends the parts of trainer rank `rank`: the encoded changes of a part where there are some, else the full part.

    Args:
        rank: the trainer rank.
        route: what every engine worker receives in a full sync.
        sent: the route that travels: `route`, or that of a delta.
        outlet: this rank's end of the transport.
        packer: packs full parts.
        deltas: has the encoded changes; `None` without deltas.
        watch: gets the phases `pack` and `wire`.
    """
    for (worker, index, part), (_, _, as_sent) in zip(route.parts_of(rank), sent.parts_of(rank), strict=True):
        changes = None if deltas is None else deltas.take(worker, index)
        with watch("wire"):
            into = outlet.place(worker.rank, index, as_sent)
        with watch("pack"):
            if changes is not None:
                into.copy_(changes)
            else:
                packer.pack(worker, part, into)
                if deltas is not None and part.pieces:
                    deltas.hold(worker, index, into)
        with watch("wire"):
            outlet.send(worker.rank, index, as_sent)
    with watch("wire"):
        outlet.finish()
