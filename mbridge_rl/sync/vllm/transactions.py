"""One sync on the engine's side, whatever kind of engine it is: in terms of its workers, and of holding what it generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mbridge_rl.sync.arena import SHARED_MEMORY
from mbridge_rl.sync.engine_side import alike
from mbridge_rl.sync.errors import EngineMismatch, EngineUnusable, StoreError
from mbridge_rl.sync.store import WeightStore
from mbridge_rl.sync.timeline import Stopwatch
from mbridge_rl.sync.vllm import worker_calls
from mbridge_rl.sync.vllm.adapters import AdaptableEngine
from mbridge_rl.sync.vllm.requests import InFlight
from mbridge_rl.sync.worker import merged_report


class TransactionalEngine(AdaptableEngine):
    """What `sync.refit.WeightSync` asks of an engine (`sync.engines.Engine`); arguments and results are plain JSON types."""

    _streaming_pause: Stopwatch | None = None  # of a streaming update that is under way

    def describe_workers(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Learn where the announced tensors (`init_info`) land in each worker; see `Receiver.prepare` for what is raised."""
        self._in_workers(worker_calls.initialize, info)
        return self._in_workers(worker_calls.describe)

    def adopt_route(self, introduction: dict[str, Any]) -> None:
        """What every later update brings to each worker; see `ShardReceiver.adopt`."""
        self._in_workers(worker_calls.adopt, introduction)

    def begin_update(self, update: dict[str, Any]) -> None:
        """Start to receive; a staged update leaves the engine generating, a streaming one holds it until it ends.

        Args:
            update: `version`, `fingerprint`, `mode`, `wire`, `timeout` (seconds).
        """
        if update["mode"] == "streaming":
            self._streaming_pause = _paused()
            self._hold(update.get("requests", "keep"), update["timeout"])
        try:
            self._in_workers(worker_calls.receive_shards, update)
        except BaseException:
            self._resume()
            raise

    def update_status(self) -> list[dict[str, Any]]:
        """See `ShardReceiver.status`, of every worker."""
        return self._in_workers(worker_calls.status)

    def commit_update(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> dict[str, Any]:
        """Serve what arrived, as `version`; generation pauses for it. Caches are dropped afterwards.

        Args:
            requests: see `RequestRunner.hold`.

        Returns:
            `sync.worker.merged_report`, with `seconds["pause"]`: in which the engine did not generate.
        """
        watch = self._streaming_pause or _paused()  # a streaming update has held generation since it began
        self._streaming_pause = None
        with watch("hold"):
            self._hold(requests, timeout)
        try:
            with watch("commit"):
                report = merged_report(self._in_workers(worker_calls.commit_shards, version))
            with watch("serve"):
                self._serve(version)
        finally:
            self._resume()
        watch.end()
        report["seconds"]["pause"] = watch.seconds["pause"]
        report["spans"] += [span.to_json() for span in watch.spans]
        return report

    def abort_update(self, reason: str) -> None:
        """Drop an open update. If live weights were written, the engine refuses to generate until the next one."""
        self._streaming_pause = None
        self._call_workers(worker_calls.abandon, reason)
        self._resume()

    def publish_weights(self, paths: Sequence[str]) -> list[str]:
        """Every worker writes its image, with digests, to its own of `paths`; returns the workers' route fingerprints."""
        return self._in_workers(worker_calls.publish, list(paths))

    def catch_up(self, name: str, directory: str | None = None) -> dict[str, Any]:
        """Serve the live version of a weight store, without the trainer.

        Raises:
            SyncError: nothing was committed there; EngineMismatch: it is the store of another engine layout or model.
        """
        store = WeightStore(name, directory or SHARED_MEMORY)
        head = store.head()
        if head is None:
            raise StoreError(f"nothing was committed to the weight store {name!r} in {store.directory}")
        kept = store.description(head.fingerprint)
        mine = self.describe_workers(kept["init_info"])
        if not alike(mine, kept["workers"]):
            raise EngineMismatch(
                f"the weight store {name!r} is of an engine whose {len(kept['workers'])} workers keep other weights than these "
                f"{len(mine)}: start the engine with the same parallel sizes and dtype"
            )
        self.adopt_route(kept)
        self._hold("keep", 600.0)
        try:
            report = merged_report(self._in_workers(worker_calls.catch_up, name, str(store.directory), head.token))
            self._serve(head.version)
        finally:
            self._resume()
        return report

    def require_usable(self) -> None:
        """
        Raises:
            EngineUnusable: a sync failed half-way; the message names the version that was lost.
        """
        if refused := [reason for reason in self._call_workers(worker_calls.unusable) if reason]:
            raise EngineUnusable(refused[0])

    def _in_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """As `_call_workers`; if one worker fails, the others drop the update too, so that none serves it alone."""
        try:
            return self._call_workers(call, *args)
        except Exception as error:
            self._call_workers(worker_calls.abandon, str(error))
            raise


def _paused() -> Stopwatch:
    watch = Stopwatch("engine")
    watch.begin("pause")
    return watch
