"""An engine joins a trainer that has already synced versions to other engines, or catches up without the trainer: it adopts the
trainer's introduction and loads the version that a weight store holds."""

from __future__ import annotations

from contextlib import suppress

from mbridge_rl.core.errors import EngineMismatch, StoreError
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.payload.messages import CommitReport, Introduction, UpdateRequest, WorkerDescription
from mbridge_rl.sync.store.weight_store import Head, WeightStore
from mbridge_rl.sync.trainer.engines import Engine
from mbridge_rl.sync.transports.shared_memory import store_wire


def introduce(engine: Engine, introduction: Introduction) -> list[WorkerDescription]:
    """Gives the engine the introduction of the trainer: what every sync brings to its workers.

    Returns:
        The descriptions of its workers.

    Raises:
        EngineMismatch: the engine's model or layout differs from that of the other engines.
    """
    descriptions = engine.describe(introduction.announcement)
    if not alike(descriptions, introduction.workers):
        raise EngineMismatch(
            f"the engine keeps its weights on {len(descriptions)} workers in another layout than the "
            f"{len(introduction.workers)} workers that the weights are of: start it with the same parallel sizes and dtype, or "
            "give engines of each layout a WeightSync of their own"
        )
    engine.adopt(introduction)
    return descriptions


def load_committed(
    engine: Engine, store: WeightStore, head: Head, requests: InFlight = "keep", timeout: float = 600.0
) -> CommitReport:
    """Loads the version that `head` names from a store on the engine's host. All workers open and verify the fill when the
    update begins, and nobody fills it anew until they have committed it."""
    wire = store_wire(store, head.token, head.fill, committed=True)
    try:
        engine.begin(UpdateRequest(head.version, head.fill, head.fingerprint, "staged", wire, timeout, requests))
        return engine.commit(head.version, requests, timeout)
    except BaseException as error:  # also an error of the pause, after which nobody else would drop the update
        with suppress(Exception):
            engine.abort(str(error))
        raise


def load_live_version(engine: Engine, store: WeightStore) -> CommitReport:
    """Introduces the engine to the trainer that wrote the store, and loads the live version.

    Raises:
        StoreError: nothing was committed to the store, or another version was committed since. EngineMismatch: the store is of
            another engine layout or model. MessageError: another mbridge_rl wrote the store.
    """
    head = store.head()
    if head is None:
        raise StoreError(f"nothing was committed to the weight store {store.name!r} in {store.directory}")
    introduce(engine, introduction_of(store, head))
    return load_committed(engine, store, head)


def introduction_of(store: WeightStore, head: Head) -> Introduction:
    """The introduction of the trainer that committed `head`."""
    return Introduction.from_json(store.description(head.fingerprint))
