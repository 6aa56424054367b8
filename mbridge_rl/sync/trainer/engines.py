"""The engines of a sync: the trainer's first rank calls all of them at once and collects a result from each."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from mbridge_rl.core.errors import BridgeError, EngineMismatch, EngineProcessError, PeerFailed, RanksUnreachable, SyncError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.payload.message_codec import require_message
from mbridge_rl.sync.payload.messages import (
    Announcement,
    CommitReport,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerStatus,
)
from mbridge_rl.sync.record.report import EngineOutcome
from mbridge_rl.sync.transports.waiting import Timeout

_log = logging.getLogger(__name__)

Report = TypeVar("Report")  # an engine's report: `CommitReport`, or `AdapterReport`

_MOST_AT_ONCE = 256  # engines that are called at the same time


class Engine(Protocol):
    """The seven methods that a trainer calls on an engine; every engine class in `sync.vllm` has them. A dead engine raises
    `EngineProcessError`.

    Arguments and results are messages (`payload.messages`) and plain JSON types. A client whose engine is in another process
    sends them through `payload.message_codec`.
    """

    def describe(self, announcement: Announcement) -> Sequence[WorkerDescription]:
        """Learns which tensors every sync brings; returns where each worker keeps them."""
        ...

    def adopt(self, introduction: Introduction) -> None:
        """Learns what every later update brings to each worker."""
        ...

    def begin(self, request: UpdateRequest) -> None:
        """Starts to receive a version and returns."""
        ...

    def status(self) -> Sequence[WorkerStatus]:
        """The progress of every worker."""
        ...

    def commit(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> CommitReport:
        """Serves the version that arrived."""
        ...

    def abort(self, reason: str) -> None:
        """Drops the update that is open."""
        ...

    def publish(self, paths: Sequence[str]) -> Sequence[str]:
        """Lets every worker write its image to its own path; returns the fingerprints of their routes."""
        ...


@dataclass(frozen=True)
class Member:
    """An engine that takes part.

    Attributes:
        number: identifies the engine for as long as it takes part, whatever other engines join and leave.
        hosts: machine ids of its workers.
    """

    number: int
    engine: Engine
    hosts: frozenset[str]


class Engines:
    """One engine, or several replicas of equal layout, which may join and leave between syncs.

    Attributes:
        membership: a counter that grows when an engine joins or leaves.
        turn: the lock that a sync holds while it runs, and that a caller holds who adds or removes an engine.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._members = [Member(number, engine, frozenset()) for number, engine in enumerate(engines)]
        self._numbers = itertools.count(len(self._members))
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="mbridge-engine")
        self.membership, self.turn = 0, threading.Lock()
        self._fill = ""  # the fill of the update that began last

    @property
    def all(self) -> tuple[Engine, ...]:
        return tuple(member.engine for member in self._members)

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset().union(*(member.hosts for member in self._members))

    def admit(self, engine: Engine, hosts: Iterable[str]) -> None:
        self._members.append(Member(next(self._numbers), engine, frozenset(hosts)))
        self.membership += 1

    def dismiss(self, engine: Engine) -> None:
        """Removes an engine.

        Raises:
            SyncError: the engine takes no part.
        """
        if not any(member.engine is engine for member in self._members):
            raise SyncError("this engine takes no part in the sync: it has left, was lost, or never joined")
        self._members = [member for member in self._members if member.engine is not engine]
        self.membership += 1

    def dismiss_lost(self) -> int:
        """Removes the engines that are dead, and returns how many. If all engines are dead, none is removed."""

        def death_of(_: int, engine: Engine) -> EngineProcessError | None:
            try:
                engine.status()
            except EngineProcessError as error:
                return error
            except Exception as error:  # whatever it is, the engine answered, so it is alive
                _log.warning("an engine does not say its status: %s: %s", type(error).__name__, error)
            return None

        deaths = self.each(death_of)
        lost = [(member, error) for member, error in zip(self._members, deaths, strict=True) if error is not None]
        if len(lost) == len(self._members):
            return 0
        for member, error in lost:
            _log.warning("engine %d is lost and takes part no longer: %s", member.number, error)
            self.dismiss(member.engine)
        return len(lost)

    def describe(self, announcement: Announcement) -> list[Sequence[WorkerDescription]]:
        """The descriptions of the workers of every engine.

        Raises:
            EngineMismatch: the engines have different layouts. MessageError: an engine is of another mbridge_rl.
        """

        def call(index: int, engine: Engine) -> list[WorkerDescription]:
            workers = engine.describe(announcement)
            return [require_message(worker, WorkerDescription, f"engine {index}") for worker in workers]

        descriptions = self.each(call)
        for index, workers in enumerate(descriptions):
            if not alike(workers, descriptions[0]):
                raise EngineMismatch(
                    f"engine {index} keeps its weights in another layout than engine 0: give engines of each layout a "
                    "WeightSync of their own"
                )
        self._members = [
            replace(member, hosts=frozenset(worker.host for worker in workers))
            for member, workers in zip(self._members, descriptions, strict=True)
        ]
        return descriptions

    def adopt(self, introduction: Introduction) -> None:
        self.each(lambda _, engine: engine.adopt(introduction))

    def begin(self, request: UpdateRequest) -> None:
        self._fill = request.fill

        def call(index: int, engine: Engine) -> None:
            store = request.store
            if store is not None:  # every replica on a host keeps its own images
                store = replace(store, name=f"{store.name}.{self._members[index].number}")
            engine.begin(replace(request, wire=replace(request.wire, replica=index), store=store))

        self.each(call)

    def wait_for_arrival(self, timeout: Timeout) -> None:
        """Waits until every worker has received and verified everything.

        Raises:
            SyncError: the error of a worker that failed. TransferTimeout: the wait was too long.
        """
        timeout.wait_for(
            lambda: all(worker.arrived for worker in self.require_healthy()), "not everything arrived at all engines"
        )

    def require_healthy(self) -> list[WorkerStatus]:
        """The status of every worker of every engine.

        Raises:
            SyncError: the error of a worker that failed. EngineProcessError: an engine died.
        """
        statuses = [worker for workers in self.each(lambda _, engine: engine.status()) for worker in workers]
        failures = [worker.failure for worker in statuses if worker.failure is not None]
        for failure in sorted(failures, key=lambda failure: failure.error_class is PeerFailed):  # causes come first
            error = failure.error()
            raise error if isinstance(error, BridgeError) else SyncError(str(failure))
        return statuses

    @contextmanager
    def with_engine_errors(self, group: RankGroup) -> Iterator[None]:
        """If the ranks fail inside the block because of an engine, all of them raise the error of that engine. All ranks
        enter the block together."""
        try:
            yield
        except RanksUnreachable:
            raise
        except Exception:
            group.first_rank_does(self._require_own_health)
            raise

    def _require_own_health(self) -> None:
        with suppress(PeerFailed):  # the consequence of an error that the ranks have already
            self.require_healthy()

    def proofs(self) -> list[list[str | None]]:
        """The proofs of the weights that every worker of every engine serves (`packing.proof_of`)."""
        return self.each(lambda _, engine: [worker.proof for worker in engine.status()])

    def commit(self, version: int, requests: InFlight, timeout: float) -> tuple[list[EngineOutcome], list[CommitReport]]:
        """Commits `version` in every engine; results and errors are those of `each_alone`."""

        def call(_: int, engine: Engine) -> CommitReport:
            report = engine.commit(version, requests, timeout)
            if report.fill != self._fill:
                raise SyncError(
                    f"the engine committed fill {report.fill} as version {version}, the trainer meant fill {self._fill}"
                )
            return report

        return self.each_alone(version, call)

    def each_alone(self, version: int, action: Callable[[int, Any], Report]) -> tuple[list[EngineOutcome], list[Report]]:
        """Calls `action`, which brings `version`, for each engine on its own: a failure of one does not stop the others.

        Returns:
            The outcomes of all engines, and the reports of the engines that committed.

        Raises:
            SyncError: no engine committed; it is the error of the first engine, if that is one of this library.
        """

        def call(index: int, engine: Engine) -> tuple[EngineOutcome, Report | None]:
            try:
                return EngineOutcome(index, version), action(index, engine)
            except (
                Exception
            ) as error:  # any error, since other engines may have committed: running out of memory is none of ours
                failures.append(error)
                return EngineOutcome(index, None, f"{type(error).__name__}: {error}"), None

        failures: list[Exception] = []
        results = self.each(call)
        if len(failures) == len(self.all):
            first = failures[0]
            raise first if isinstance(first, BridgeError) else SyncError(f"{type(first).__name__}: {first}") from first
        return [outcome for outcome, _ in results], [report for _, report in results if report is not None]

    def abort(self, reason: str) -> None:
        """Aborts the update in every engine that can be reached. Another engine is dead, or aborts at its own time-out."""

        def call(index: int, engine: Engine) -> None:
            try:
                engine.abort(reason)
            except (
                Exception
            ) as error:  # all ranks raise the error that caused the abort; rank 0 must not raise this one instead
                _log.warning("engine %d did not drop its update: %s: %s", index, type(error).__name__, error)

        self.each(call)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def each(self, call: Callable[[int, Engine], Any]) -> list[Any]:
        """Calls `call(index, engine)` for all engines at once and returns the results. A failure does not stop the other
        calls; one error then reports all failures.

        Raises:
            BridgeError: the error of the only engine; with several engines, an error of the type of the first failure with the
                messages of all.
        """
        futures = [self._pool.submit(call, index, engine) for index, engine in enumerate(self.all)]
        failures = {index: error for index, future in enumerate(futures) if (error := future.exception()) is not None}
        if not failures:
            return [future.result() for future in futures]
        first = next(iter(failures.values()))
        if len(self.all) == 1 or not isinstance(first, Exception):
            raise first
        kind = type(first) if isinstance(first, BridgeError) else SyncError
        messages = "; ".join(f"engine {index}: {type(error).__name__}: {error}" for index, error in failures.items())
        raise kind(f"{len(failures)} of {len(self.all)} engines failed: {messages}") from first


def outcomes_of(
    group: RankGroup,
    version: int,
    replicas: int,
    commit: Callable[[], tuple[list[EngineOutcome], list[Report]]],
) -> tuple[Sequence[EngineOutcome], list[Report]]:
    """Runs `commit` on rank 0 and shares the outcomes of all `replicas` engines with every rank. If all engines committed,
    which is the usual case, this takes one number. All ranks call it together.

    Returns:
        The outcomes, on every rank, and the reports of the engines that committed, on rank 0 (an empty list elsewhere).
    """
    outcomes, reports = group.first_rank_does(commit) or ([EngineOutcome(index, version) for index in range(replicas)], [])
    failed = torch.tensor([sum(outcome.error is not None for outcome in outcomes)])
    if group.maximum(failed).item():
        outcomes = group.share_plain(outcomes, (EngineOutcome,))
    return outcomes, reports
