"""An engine joins a trainer that has been going for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbridge_rl.core.errors import EngineMismatch, StoreError
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.store.weight_store import Head, WeightStore
from mbridge_rl.sync.trainer.engines import Engine
from mbridge_rl.sync.transports.shared_memory import store_wire


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
    engine.begin_update(committed_update(store, head, requests, timeout))
    engine.commit_update(head.version, requests, timeout)
    return head.version


def committed_update(store: WeightStore, head: Head, requests: str = "keep", timeout: float = 600.0) -> dict[str, Any]:
    """An update to what a store holds, as `Engine.begin_update` takes it: it says which fill all workers have to load. They
    open and verify it when the update begins, and nobody fills it anew until they have committed it."""
    wire = store_wire(store, head.token, head.fill) | {"committed": True}
    names = {"version": head.version, "fingerprint": head.fingerprint, "mode": "staged", "wire": wire, "delta": None}
    return names | {"timeout": timeout, "requests": requests}


def live_update(store: WeightStore) -> tuple[dict[str, Any], dict[str, Any]]:
    """The update to what is live in a store now, and what the trainer said of it when it introduced itself.

    Raises:
        StoreError: nothing was committed there.
    """
    head = store.head()
    if head is None:
        raise StoreError(f"nothing was committed to the weight store {store.name!r} in {store.directory}")
    return committed_update(store, head), store.description(head.fingerprint)
