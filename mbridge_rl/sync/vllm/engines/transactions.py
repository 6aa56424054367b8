"""The engine's side of a sync, for every kind of engine: calls of its workers, while generation is held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mbridge_rl.core.errors import EngineMismatch, EngineUnusable, SyncError
from mbridge_rl.distributed.arena import SHARED_MEMORY
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.joining import live_update
from mbridge_rl.sync.vllm.lora.adaptable_engine import AdaptableEngine
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.worker.payload_receiver import merged_report


class TransactionalEngine(AdaptableEngine):
    """The methods that `sync.weight_sync.WeightSync` calls on an engine (`sync.trainer.engines.Engine`); arguments and results
    are plain JSON types."""

    def __init__(self) -> None:
        self._streaming_pause: Stopwatch | None = None  # measures the pause of the streaming update under way
        self._turn = threading.RLock()  # one transaction at a time, from any thread
        self._open: tuple[int, str | None] | None = None  # version and fill of the update that the workers receive
        self._disagreement: str | None = None  # why the workers may hold different weights

    def describe_workers(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Learns where the announced tensors (`init_info`) land in each worker; returns the workers' descriptions. Raises what
        `Receiver.prepare` raises."""
        self._in_workers(worker_calls.initialize, info)
        return self._in_workers(worker_calls.describe)

    def adopt_route(self, introduction: dict[str, Any]) -> None:
        """Tells each worker what every later update brings; see `PayloadReceiver.adopt`."""
        self._in_workers(worker_calls.adopt, introduction)

    def begin_update(self, update: dict[str, Any]) -> None:
        """Starts to receive. The engine goes on generating during a staged update, and is held during a streaming one.

        Args:
            update: `version`, `fingerprint`, `mode`, `wire`, `timeout` (seconds), `requests`, `delta`.
        """
        with self._turn:
            self._open = None
            if update["mode"] == "streaming":
                self._streaming_pause = _paused()
                self._hold(update.get("requests", "keep"), update["timeout"])
            try:
                self._in_workers(worker_calls.receive_shards, update)
            except BaseException:
                self._resume()
                raise
            self._open = update["version"], update["wire"].get("fill")

    def update_status(self) -> list[dict[str, Any]]:
        """The status of every worker; see `PayloadReceiver.status`."""
        return self._in_workers(worker_calls.status)

    def commit_update(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> dict[str, Any]:
        """Serves the weights that arrived, as `version`. Generation pauses meanwhile, and caches are dropped afterwards.

        Args:
            version: the version of the open update.
            requests: what happens to requests in flight; see `RequestRunner.hold`.
            timeout: seconds to wait for them.

        Returns:
            `sync.worker.payload_receiver.merged_report`, with `seconds["pause"]`, in which the engine did not generate.

        Raises:
            SyncError: no update to this version is open; or the commit failed in a worker, and then all refuse to generate.
        """
        with self._turn:
            return self._commit(version, self._opened(version), requests, timeout)

    def _commit(self, version: int, fill: str | None, requests: InFlight, timeout: float) -> dict[str, Any]:
        watch = self._streaming_pause or _paused()  # a streaming update has held generation since it began
        self._streaming_pause = None
        with watch("hold"):
            self._hold(requests, timeout)
        try:
            with watch("commit"):
                report = self._commit_in_workers(version, fill)
            with watch("serve"):
                self._serve(version)
        finally:
            self._resume()
        watch.end()
        report["seconds"]["pause"] = watch.seconds["pause"]
        report["spans"] += [span.to_json() for span in watch.spans]
        return report

    def _opened(self, version: int) -> str | None:
        """The fill of the open update, which a commit of `version` closes."""
        if self._open is None or self._open[0] != version:
            begun = "none is open" if self._open is None else f"the open update is to version {self._open[0]}"
            raise SyncError(f"version {version} cannot be committed: {begun}; begin_update has to come before commit_update")
        (_, fill), self._open = self._open, None
        return fill

    def _commit_in_workers(self, version: int, fill: str | None) -> dict[str, Any]:
        """Commits in all workers. If one fails, none of them serves, because they may hold different weights then."""
        self._disagreement = f"not all workers of the engine have committed version {version}, and a complete sync has to come"
        try:
            report = merged_report(self._call_workers(worker_calls.commit_shards, version, fill))
        except BaseException as error:
            self._disagreement = f"version {version} was lost, and a complete sync has to come: {error}"
            with suppress(Exception):  # a worker may be out of reach; the engine itself refuses anyway
                self._call_workers(worker_calls.lose, version, str(error), fill)
            raise
        self._disagreement = None
        return report

    def abort_update(self, reason: str) -> None:
        """Drops an open update. If live weights were written, the engine refuses to generate until the next update."""
        with self._turn:
            self._open = self._streaming_pause = None
            self._call_workers(worker_calls.abandon, reason)
            self._resume()

    def publish_weights(self, paths: Sequence[str]) -> list[str]:
        """Lets every worker write its image, with digests, to its own path of `paths`; returns the fingerprints of their
        routes."""
        self._require_agreement()
        return self._in_workers(worker_calls.publish, list(paths))

    def catch_up(self, name: str, directory: str | None = None) -> dict[str, Any]:
        """Serves the live version of a weight store, without the trainer. The engine decides for all its workers which fill
        that is; each worker opens and verifies its image of that fill before any of them writes.

        Args:
            name: the name of the store.
            directory: its directory; by default shared memory.

        Raises:
            SyncError: nothing was committed to the store, or another version was committed since; the old version serves on.
                EngineMismatch: the store belongs to another engine layout or model.
        """
        store = WeightStore(name, directory or SHARED_MEMORY)
        with self._turn:
            update, introduction = live_update(store)
            own_workers = self.describe_workers(introduction["init_info"])
            if not alike(own_workers, introduction["workers"]):
                raise EngineMismatch(
                    f"the weight store {name!r} is of an engine whose {len(introduction['workers'])} workers keep other "
                    f"weights than these {len(own_workers)}: start the engine with the same parallel sizes and dtype"
                )
            self.adopt_route(introduction)
            self._in_workers(worker_calls.catch_up, update)
            try:
                return self._commit(update["version"], update["wire"]["fill"], "keep", update["timeout"])
            except BaseException as error:  # also an error of the pause, after which nobody else would drop the update
                with suppress(Exception):
                    self._call_workers(worker_calls.abandon, str(error))
                raise

    def require_usable(self) -> None:
        """Checks that the engine may generate.

        Raises:
            EngineUnusable: a sync failed half-way; the message names the version that was lost.
        """
        if (reason := self._refusal()) is not None:
            raise EngineUnusable(reason)

    def _refusal(self) -> str | None:
        """Why the engine must not generate; `None` if it may."""
        identities = self._call_workers(worker_calls.identity)
        if refused := [identity["refuses"] for identity in identities if identity["refuses"]]:
            return refused[0]
        return self._disagreement or _disagreement([identity["fill"] for identity in identities])

    def _require_agreement(self) -> None:
        fills = [identity["fill"] for identity in self._call_workers(worker_calls.identity)]
        if (reason := self._disagreement or _disagreement(fills)) is not None:
            raise EngineUnusable(reason)

    def _in_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """As `_call_workers`, but if a worker fails, the others drop the update as well, so that none of them serves it."""
        try:
            return self._call_workers(call, *args)
        except Exception as error:
            self._call_workers(worker_calls.abandon, str(error))
            raise


def _disagreement(fills: Sequence[str | None]) -> str | None:
    if len(set(fills)) == 1:
        return None
    return f"the engine's workers hold weights of different syncs (fills by worker: {list(fills)}): a complete sync has to come"


def _paused() -> Stopwatch:
    watch = Stopwatch("engine")
    watch.begin("pause")
    return watch
