"""The engines of a sync, as the trainer's first rank drives them: all at once, with a result from each."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from mbridge_rl.core.errors import BridgeError, EngineMismatch, EngineProcessError, PeerFailed, RanksUnreachable, SyncError
from mbridge_rl.core.failure import Failure
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.payload.engine_side import alike
from mbridge_rl.sync.record.report import EngineOutcome
from mbridge_rl.sync.transports.waiting import Timeout

_log = logging.getLogger(__name__)

_MOST_AT_ONCE = 256  # engines that are asked at the same time


class Engine(Protocol):
    """What a sync asks of an engine; every kind in `sync.vllm` has it. One that is dead raises `EngineProcessError`.

    All arguments and results are plain JSON types, so that they cross processes, Ray or HTTP alike.
    """

    def describe_workers(self, info: dict[str, Any]) -> list[dict[str, Any]]: ...
    def adopt_route(self, introduction: dict[str, Any]) -> None: ...
    def begin_update(self, update: dict[str, Any]) -> None: ...
    def update_status(self) -> list[dict[str, Any]]: ...
    def commit_update(self, version: int, requests: str = "keep", timeout: float = 600.0) -> dict[str, Any]: ...
    def abort_update(self, reason: str) -> None: ...
    def publish_weights(self, paths: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True)
class Member:
    """An engine that takes part.

    Attributes:
        number: its own for as long as it does, whoever joins and leaves.
        hosts: of its workers.
    """

    number: int
    engine: Engine
    hosts: frozenset[str]


class Engines:
    """One engine, or several replicas of equal layout, which may join and leave between syncs.

    Attributes:
        generation: changes with every one that joins or leaves.
        turn: held by a sync while it runs, and by whoever changes the members.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._members = [Member(number, engine, frozenset()) for number, engine in enumerate(engines)]
        self._numbers = itertools.count(len(self._members))
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="mbridge-engine")
        self.generation, self.turn = 0, threading.Lock()
        self._fill = ""  # of the update that began last

    @property
    def all(self) -> tuple[Engine, ...]:
        return tuple(member.engine for member in self._members)

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset().union(*(member.hosts for member in self._members))

    def admit(self, engine: Engine, hosts: Iterable[str]) -> None:
        self._members.append(Member(next(self._numbers), engine, frozenset(hosts)))
        self.generation += 1

    def dismiss(self, engine: Engine) -> None:
        """
        Raises:
            SyncError: it takes no part.
        """
        if not any(member.engine is engine for member in self._members):
            raise SyncError("this engine takes no part in the sync: it has left, was lost, or never joined")
        self._members = [member for member in self._members if member.engine is not engine]
        self.generation += 1

    def dismiss_lost(self) -> int:
        """How many engines were found dead and take part no longer. Where all are, none is dismissed."""

        def ask(_: int, engine: Engine) -> EngineProcessError | None:
            try:
                engine.update_status()
            except EngineProcessError as error:
                return error
            except BridgeError:
                pass  # it lives, and has its own trouble
            return None

        found = self.each(ask)
        lost = [(member, error) for member, error in zip(self._members, found, strict=True) if error is not None]
        if len(lost) == len(self._members):
            return 0
        for member, error in lost:
            _log.warning("engine %d is lost and takes part no longer: %s", member.number, error)
            self.dismiss(member.engine)
        return len(lost)

    def describe(self, info: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The workers of every engine.

        Raises:
            EngineMismatch: the engines are not alike.
        """
        said = self.each(lambda _, engine: engine.describe_workers(info))
        for index, workers in enumerate(said):
            if not alike(workers, said[0]):
                raise EngineMismatch(
                    f"engine {index} keeps its weights in another layout than engine 0: give engines of each layout a "
                    "WeightSync of their own"
                )
        self._members = [
            replace(member, hosts=frozenset(worker["host"] for worker in workers))
            for member, workers in zip(self._members, said, strict=True)
        ]
        return said

    def adopt(self, introduction: dict[str, Any]) -> None:
        self.each(lambda _, engine: engine.adopt_route(introduction))

    def begin(self, update: dict[str, Any]) -> None:
        self._fill = update["wire"]["fill"]

        def call(index: int, engine: Engine) -> None:
            wire = {**update["wire"], "replica": index}
            if "store" in wire:  # replicas on one host keep images of their own
                wire["store"] = f"{wire['store']}.{self._members[index].number}"
            engine.begin_update({**update, "wire": wire})

        self.each(call)

    def wait_for_arrival(self, timeout: Timeout) -> None:
        """Until every worker has everything, verified.

        Raises:
            SyncError: what went wrong in one of them; TransferTimeout.
        """

        timeout.wait_for(
            lambda: all(worker["arrived"] for worker in self.require_healthy()), "not everything arrived at all engines"
        )

    def require_healthy(self) -> list[dict[str, Any]]:
        """The status of every worker of every engine.

        Raises:
            SyncError: what went wrong in one of them; EngineProcessError: an engine died.
        """
        said = [worker for workers in self.each(lambda _, engine: engine.update_status()) for worker in workers]
        failures = [Failure.from_json(worker["error"]) for worker in said if worker["error"]]
        for failure in sorted(failures, key=lambda failure: failure.error_class is PeerFailed):  # causes come first
            error = failure.error()
            raise error if isinstance(error, BridgeError) else SyncError(str(failure))
        return said

    @contextmanager
    def with_engine_errors(self, group: RankGroup) -> Iterator[None]:
        """Where ranks fail inside because of an engine, all of them raise what went wrong in there. On all ranks together."""
        try:
            yield
        except RanksUnreachable:
            raise
        except Exception:
            group.first_rank_does(self._require_own_health)
            raise

    def _require_own_health(self) -> None:
        with suppress(PeerFailed):  # it comes of what the ranks know already
            self.require_healthy()

    def proofs(self) -> list[list[str | None]]:
        """Of the weights that every worker of every engine serves (`packing.proof_of`)."""
        return self.each(lambda _, engine: [worker["proof"] for worker in engine.update_status()])

    def commit(self, version: int, requests: str, timeout: float) -> tuple[list[EngineOutcome], list[dict[str, Any]]]:
        """See `each_alone`."""

        def call(_: int, engine: Engine) -> dict[str, Any]:
            report = engine.commit_update(version, requests, timeout)
            if (fill := report.get("fill", self._fill)) != self._fill:
                raise SyncError(f"the engine committed fill {fill} as version {version}, the trainer meant fill {self._fill}")
            return report

        return self.each_alone(version, call)

    def each_alone(
        self, version: int, action: Callable[[int, Any], dict[str, Any]]
    ) -> tuple[list[EngineOutcome], list[dict[str, Any]]]:
        """Gives `version` to each engine on its own: what fails in one does not hold the others up.

        Returns:
            Every engine's outcome, and the reports of those that committed.

        Raises:
            BridgeError: none of them committed.
        """

        def call(index: int, engine: Engine) -> tuple[EngineOutcome, dict[str, Any] | None]:
            try:
                return EngineOutcome(index, version), action(index, engine)
            except BridgeError as error:
                failures.append(error)
                return EngineOutcome(index, None, f"{type(error).__name__}: {error}"), None

        failures: list[BridgeError] = []
        found = self.each(call)
        if len(failures) == len(self.all):
            raise failures[0]
        return [outcome for outcome, _ in found], [report for _, report in found if report is not None]

    def abort(self, reason: str) -> None:
        """As far as engines can be reached; one that cannot is dead, or aborts by its own time-out."""

        def call(index: int, engine: Engine) -> None:
            try:
                engine.abort_update(reason)
            except Exception as error:  # all ranks raise what led here; rank 0 must not raise this instead
                _log.warning("engine %d did not drop its update: %s: %s", index, type(error).__name__, error)

        self.each(call)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def each(self, call: Callable[[int, Engine], Any]) -> list[Any]:
        """Every engine's answer. If some fail, the others have been asked as well, and one error tells of all.

        Raises:
            BridgeError: the only engine's own error, or of the first failed one's type with every engine's message.
        """
        futures = [self._pool.submit(call, index, engine) for index, engine in enumerate(self.all)]
        failures = {index: error for index, future in enumerate(futures) if (error := future.exception()) is not None}
        if not failures:
            return [future.result() for future in futures]
        first = next(iter(failures.values()))
        if len(self.all) == 1 or not isinstance(first, Exception):
            raise first
        kind = type(first) if isinstance(first, BridgeError) else SyncError
        said = "; ".join(f"engine {index}: {type(error).__name__}: {error}" for index, error in failures.items())
        raise kind(f"{len(failures)} of {len(self.all)} engines failed: {said}") from first


def outcomes_of(
    group: RankGroup,
    version: int,
    replicas: int,
    commit: Callable[[], tuple[list[EngineOutcome], list[dict[str, Any]]]],
) -> tuple[Sequence[EngineOutcome], list[dict[str, Any]]]:
    """Runs `commit` on rank 0 and tells every rank what became of each of the `replicas` engines; where all committed, which is
    nearly always, in one number. All ranks together.

    Returns:
        The outcomes, on every rank; the reports of the engines that committed, on rank 0 alone.
    """
    outcomes, reports = group.first_rank_does(commit) or ([EngineOutcome(index, version) for index in range(replicas)], [])
    failed = torch.tensor([sum(outcome.error is not None for outcome in outcomes)])
    if group.maximum(failed).item():
        outcomes = group.share_plain(outcomes, (EngineOutcome,))
    return outcomes, reports
