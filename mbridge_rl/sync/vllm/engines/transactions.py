"""The engine's side of a sync, for every kind of engine: calls of its workers, while generation is held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mbridge_rl.core.errors import EngineUnusable, SyncError
from mbridge_rl.distributed.arena import SHARED_MEMORY
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.messages import (
    Announcement,
    CommitReport,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerStatus,
)
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.joining import load_live_version
from mbridge_rl.sync.vllm.lora.adaptable_engine import AdaptableEngine
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.worker.payload_receiver import merged_report


class TransactionalEngine(AdaptableEngine):
    """The methods that `sync.weight_sync.WeightSync` calls on an engine (`sync.trainer.engines.Engine`)."""

    def __init__(self) -> None:
        self._streaming_pause: Stopwatch | None = None  # measures the pause of the streaming update under way
        self._turn = threading.RLock()  # one transaction at a time, from any thread
        self._open: UpdateRequest | None = None  # the update that the workers receive
        self._disagreement: str | None = None  # why the workers may hold different weights

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        """Learns where the announced tensors land in each worker. Raises what `Receiver.describe` raises."""
        return self._in_workers(worker_calls.describe, announcement)

    def adopt(self, introduction: Introduction) -> None:
        """Tells each worker what every later update brings; see `PayloadReceiver.adopt`."""
        self._in_workers(worker_calls.adopt, introduction)

    def begin(self, request: UpdateRequest) -> None:
        """Starts to receive. The engine goes on generating during a staged update, and is held during a streaming one."""
        with self._turn:
            self._open = None
            if request.mode == "streaming":
                self._streaming_pause = _paused()
                self._hold(request.requests, request.timeout)
            try:
                self._in_workers(worker_calls.begin, request)
            except BaseException:
                self._resume()
                raise
            self._open = request

    def status(self) -> list[WorkerStatus]:
        """The status of every worker."""
        return self._in_workers(worker_calls.status)

    def commit(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> CommitReport:
        """Serves the weights that arrived, as `version`. Generation pauses meanwhile, and caches are dropped afterwards.

        Args:
            version: the version of the open update.
            requests: what happens to requests in flight; see `RequestRunner.hold`.
            timeout: seconds to wait for them.

        Returns:
            The report, with `seconds["pause"]`, in which the engine did not generate.

        Raises:
            SyncError: no update to this version is open; or the commit failed in a worker, and then all refuse to generate.
        """
        with self._turn:
            return self._commit(version, self._take_open(version).fill, requests, timeout)

    def _commit(self, version: int, fill: str, requests: InFlight, timeout: float) -> CommitReport:
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
        seconds = {**report.seconds, "pause": watch.seconds["pause"]}
        return replace(report, seconds=seconds, spans=(*report.spans, *watch.spans))

    def _take_open(self, version: int) -> UpdateRequest:
        """The open update, which a commit of `version` closes."""
        if self._open is None or self._open.version != version:
            begun = "none is open" if self._open is None else f"the open update is to version {self._open.version}"
            raise SyncError(f"version {version} cannot be committed: {begun}; begin has to come before commit")
        request, self._open = self._open, None
        return request

    def _commit_in_workers(self, version: int, fill: str) -> CommitReport:
        """Commits in all workers. If one fails, none of them serves, because they may hold different weights then."""
        self._disagreement = f"not all workers of the engine have committed version {version}, and a complete sync has to come"
        try:
            report = merged_report(self._call_workers(worker_calls.commit, version, fill))
        except BaseException as error:
            self._disagreement = f"version {version} was lost, and a complete sync has to come: {error}"
            with suppress(Exception):  # a worker may be out of reach; the engine itself refuses anyway
                self._call_workers(worker_calls.lose, version, str(error), fill)
            raise
        self._disagreement = None
        return report

    def abort(self, reason: str) -> None:
        """Drops an open update. If live weights were written, the engine refuses to generate until the next update."""
        with self._turn:
            self._open = self._streaming_pause = None
            self._call_workers(worker_calls.abort, reason)
            self._resume()

    def publish(self, paths: Sequence[str]) -> list[str]:
        """Lets every worker write its image, with digests, to its own path of `paths`; returns the fingerprints of their
        routes."""
        self._require_agreement()
        return self._in_workers(worker_calls.publish, list(paths))

    def catch_up(self, name: str, directory: str | None = None) -> CommitReport:
        """Serves the live version of a weight store, without the trainer. The engine decides for all its workers which fill
        that is; each worker opens and verifies its image of that fill before any of them writes.

        Args:
            name: the name of the store.
            directory: its directory; by default shared memory.

        Raises:
            SyncError: nothing was committed to the store, or another version was committed since; the old version serves on.
                EngineMismatch: the store belongs to another engine layout or model.
        """
        with self._turn:
            return load_live_version(self, WeightStore(name, directory or SHARED_MEMORY))

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
        if refusals := [identity.refusal for identity in identities if identity.refusal is not None]:
            return refusals[0]
        return self._disagreement or _disagreement([identity.fill for identity in identities])

    def _require_agreement(self) -> None:
        fills = [identity.fill for identity in self._call_workers(worker_calls.identity)]
        if (reason := self._disagreement or _disagreement(fills)) is not None:
            raise EngineUnusable(reason)

    def _in_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """As `_call_workers`, but if a worker fails, the others drop the update as well, so that none of them serves it."""
        try:
            return self._call_workers(call, *args)
        except Exception as error:
            self._call_workers(worker_calls.abort, str(error))
            raise


def _disagreement(fills: Sequence[str | None]) -> str | None:
    if len(set(fills)) == 1:
        return None
    return f"the engine's workers hold weights of different syncs (fills by worker: {list(fills)}): a complete sync has to come"


def _paused() -> Stopwatch:
    watch = Stopwatch("engine")
    watch.begin("pause")
    return watch
