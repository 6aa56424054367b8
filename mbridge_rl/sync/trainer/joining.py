"""An engine joins a trainer that has already synced versions to other engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbridge_rl.core.errors import EngineMismatch, StoreError
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.store.weight_store import Head, WeightStore
from mbridge_rl.sync.trainer.engines import Engine
from mbridge_rl.sync.transports.shared_memory import store_wire


def introduce(engine: Engine, introduction: Mapping[str, Any]) -> set[str]:
    """Gives the engine the introduction of the trainer: what every sync brings to its workers.

    Returns:
        The machine ids of its workers.

    Raises:
        EngineMismatch: the engine's model or layout differs from that of the other engines.
    """
    descriptions = engine.describe_workers(dict(introduction["init_info"]))
    if not alike(descriptions, introduction["workers"]):
        raise EngineMismatch(
            f"the engine that joins keeps its weights on {len(descriptions)} workers in another layout than the "
            f"{len(introduction['workers'])} workers of the other engines: give engines of each layout a WeightSync of their "
            "own"
        )
    engine.adopt_route(dict(introduction))
    return {worker["host"] for worker in descriptions}


def bring_up(engine: Engine, store: WeightStore, fingerprint: str, requests: str, timeout: float) -> int | None:
    """Loads the version that was committed last into a new engine on the store's host.

    Returns:
        That version, or `None` if the store holds no version of this plan.
    """
    head = store.head()
    if head is None or head.fingerprint != fingerprint:
        return None
    engine.begin_update(committed_update(store, head, requests, timeout))
    engine.commit_update(head.version, requests, timeout)
    return head.version


def committed_update(store: WeightStore, head: Head, requests: str = "keep", timeout: float = 600.0) -> dict[str, Any]:
    """The update to the version that a store holds, as `Engine.begin_update` takes it. It names the fill that all workers have
    to load. They open and verify it when the update begins, and nobody fills it anew until they have committed it."""
    wire = store_wire(store, head.token, head.fill) | {"committed": True}
    update = {"version": head.version, "fingerprint": head.fingerprint, "mode": "staged", "wire": wire, "delta": None}
    return update | {"timeout": timeout, "requests": requests}


def live_update(store: WeightStore) -> tuple[dict[str, Any], dict[str, Any]]:
    """The update to the version that is live in a store now, and the introduction of the trainer that wrote it.

    Raises:
        StoreError: nothing was committed to the store.
    """
    head = store.head()
    if head is None:
        raise StoreError(f"nothing was committed to the weight store {store.name!r} in {store.directory}")
    return committed_update(store, head), store.description(head.fingerprint)
