"""An engine joins a trainer that has been going for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbridge_rl.sync.engine_side import alike
from mbridge_rl.sync.engines import Engine
from mbridge_rl.sync.errors import EngineMismatch
from mbridge_rl.sync.store import WeightStore


def introduce(engine: Engine, introduction: Mapping[str, Any]) -> set[str]:
    """The newcomer learns what every sync will bring to its workers; returns their hosts.

    Raises:
        EngineMismatch: its model or layout is not the others'.
    """
    said = engine.describe_workers(dict(introduction["init_info"]))
    if not alike(said, introduction["workers"]):
        raise EngineMismatch(
            f"the engine that joins keeps its weights on {len(said)} workers in another layout than the "
            f"{len(introduction['workers'])} of those that are there: give engines of each layout a WeightSync of their own"
        )
    engine.adopt_route(dict(introduction))
    return {worker["host"] for worker in said}


def bring_up(engine: Engine, store: WeightStore, fingerprint: str, requests: str, timeout: float) -> int | None:
    """A newcomer on the store's host gets the version that was committed last, as a sync of its own; returns that version, and
    `None` where the store holds none of this plan."""
    head = store.head()
    if head is None or head.fingerprint != fingerprint:
        return None
    wire = {"kind": "store", "name": store.name, "directory": str(store.directory), "token": head.token}
    update = {"version": head.version, "fingerprint": fingerprint, "mode": "staged", "wire": wire, "delta": None}
    engine.begin_update({**update, "timeout": timeout, "requests": requests})
    engine.commit_update(head.version, requests, timeout)
    return head.version
