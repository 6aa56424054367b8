"""One sync on the engine's side, whatever kind of engine it is: in terms of its workers, and of holding what it generates."""

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
    """What `sync.weight_sync.WeightSync` asks of an engine (`sync.trainer.engines.Engine`); arguments and results are plain
    JSON types."""

    def __init__(self) -> None:
        self._streaming_pause: Stopwatch | None = None  # of a streaming update that is under way
        self._turn = threading.RLock()  # one transaction at a time, from whatever threads its calls come
        self._open: tuple[int, str | None] | None = None  # version and fill of the update that its workers were told to bring
        self._disagreement: str | None = None  # why the workers perhaps do not all hold the same

    def describe_workers(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Learn where the announced tensors (`init_info`) land in each worker; see `Receiver.prepare` for what is raised."""
        self._in_workers(worker_calls.initialize, info)
        return self._in_workers(worker_calls.describe)

    def adopt_route(self, introduction: dict[str, Any]) -> None:
        """What every later update brings to each worker; see `PayloadReceiver.adopt`."""
        self._in_workers(worker_calls.adopt, introduction)

    def begin_update(self, update: dict[str, Any]) -> None:
        """Start to receive; a staged update leaves the engine generating, a streaming one holds it until it ends.

        Args:
            update: `version`, `fingerprint`, `mode`, `wire`, `timeout` (seconds).
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
        """See `PayloadReceiver.status`, of every worker."""
        return self._in_workers(worker_calls.status)

    def commit_update(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> dict[str, Any]:
        """Serve what arrived, as `version`; generation pauses for it. Caches are dropped afterwards.

        Args:
            requests: see `RequestRunner.hold`.

        Returns:
            `sync.worker.payload_receiver.merged_report`, with `seconds["pause"]`: in which the engine did not generate.

        Raises:
            SyncError: no update to this version is open; or what failed in a worker, and then all refuse to generate.
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
        """The fill of the update that a commit ends."""
        if self._open is None or self._open[0] != version:
            begun = "none is open" if self._open is None else f"the open update is to version {self._open[0]}"
            raise SyncError(f"version {version} cannot be committed: {begun}; begin_update has to come before commit_update")
        (_, fill), self._open = self._open, None
        return fill

    def _commit_in_workers(self, version: int, fill: str | None) -> dict[str, Any]:
        """All workers serve the fill, or none serves anything: some may have it then, and others not."""
        self._disagreement = f"not all workers of the engine have committed version {version}, and a complete sync has to come"
        try:
            report = merged_report(self._call_workers(worker_calls.commit_shards, version, fill))
        except BaseException as error:
            self._disagreement = f"version {version} was lost, and a complete sync has to come: {error}"
            with suppress(Exception):  # a worker that cannot be asked; the engine itself refuses anyway
                self._call_workers(worker_calls.lose, version, str(error), fill)
            raise
        self._disagreement = None
        return report

    def abort_update(self, reason: str) -> None:
        """Drop an open update. If live weights were written, the engine refuses to generate until the next one."""
        with self._turn:
            self._open = self._streaming_pause = None
            self._call_workers(worker_calls.abandon, reason)
            self._resume()

    def publish_weights(self, paths: Sequence[str]) -> list[str]:
        """Every worker writes its image, with digests, to its own of `paths`; returns the workers' route fingerprints."""
        self._require_agreement()
        return self._in_workers(worker_calls.publish, list(paths))

    def catch_up(self, name: str, directory: str | None = None) -> dict[str, Any]:
        """Serve the live version of a weight store, without the trainer. The engine decides for all its workers which fill that
        is; each opens and verifies its image of it before any of them writes.

        Raises:
            SyncError: nothing was committed there, or another version since; the old version serves on. EngineMismatch: it is
                the store of another engine layout or model.
        """
        store = WeightStore(name, directory or SHARED_MEMORY)
        with self._turn:
            update, kept = live_update(store)
            mine = self.describe_workers(kept["init_info"])
            if not alike(mine, kept["workers"]):
                raise EngineMismatch(
                    f"the weight store {name!r} is of an engine whose {len(kept['workers'])} workers keep other weights than "
                    f"these {len(mine)}: start the engine with the same parallel sizes and dtype"
                )
            self.adopt_route(kept)
            self._in_workers(worker_calls.catch_up, update)
            try:
                return self._commit(update["version"], update["wire"]["fill"], "keep", update["timeout"])
            except BaseException as error:  # also of the pause: nobody else would drop the update
                with suppress(Exception):
                    self._call_workers(worker_calls.abandon, str(error))
                raise

    def require_usable(self) -> None:
        """
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
        """As `_call_workers`; if one worker fails, the others drop the update too, so that none serves it alone."""
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
