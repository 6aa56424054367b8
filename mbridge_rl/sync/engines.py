"""The engines of a sync, as the trainer's first rank drives them: all at once, with a result from each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.sync.engine_side import alike
from mbridge_rl.sync.errors import EngineMismatch, SyncError
from mbridge_rl.sync.report import EngineOutcome
from mbridge_rl.sync.waiting import Patience


class Engine(Protocol):
    """What a sync asks of an engine: `sync.vllm.engine.InProcessEngine` and `sync.vllm.process.EngineProcess` have it.

    All arguments and results are plain JSON types, so that they cross processes, Ray or HTTP alike.
    """

    def describe_workers(self, info: dict[str, Any]) -> list[dict[str, Any]]: ...
    def adopt_route(self, introduction: dict[str, Any]) -> None: ...
    def begin_update(self, update: dict[str, Any]) -> None: ...
    def update_status(self) -> list[dict[str, Any]]: ...
    def commit_update(self, version: int, requests: str = "keep", timeout: float = 600.0) -> dict[str, Any]: ...
    def abort_update(self, reason: str) -> None: ...
    def publish_weights(self, paths: Sequence[str]) -> list[str]: ...


class Engines:
    """One engine, or several replicas of equal layout."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.all = tuple(engines)
        self._pool = ThreadPoolExecutor(max(1, len(self.all)), thread_name_prefix="mbridge-engine")

    def describe(self, info: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The workers of every engine.

        Raises:
            EngineMismatch: the engines are not alike.
        """
        said = self._each(lambda _, engine: engine.describe_workers(info))
        for index, workers in enumerate(said):
            if not alike(workers, said[0]):
                raise EngineMismatch(
                    f"engine {index} keeps its weights in another layout than engine 0: give engines of each layout a "
                    "WeightSync of their own"
                )
        return said

    def adopt(self, introduction: dict[str, Any]) -> None:
        self._each(lambda _, engine: engine.adopt_route(introduction))

    def begin(self, update: dict[str, Any]) -> None:
        def call(index: int, engine: Engine) -> None:
            engine.begin_update({**update, "wire": {**update["wire"], **_of_replica(update["wire"], index)}})

        self._each(call)

    def wait_for_arrival(self, patience: Patience) -> None:
        """Until every worker has everything, verified.

        Raises:
            SyncError: what went wrong in one of them; TransferTimeout.
        """

        def all_arrived() -> bool:
            said = [worker for workers in self._each(lambda _, engine: engine.update_status()) for worker in workers]
            for worker in said:
                if worker["error"]:
                    kind, message = worker["error"]
                    raise _rebuilt(kind, message)
            return all(worker["arrived"] for worker in said)

        patience.wait_for(all_arrived, "not everything arrived at all engines")

    def proofs(self) -> list[list[str | None]]:
        """Of the weights that every worker of every engine serves (`delta.proof_of`)."""
        return self._each(lambda _, engine: [worker["proof"] for worker in engine.update_status()])

    def commit(self, version: int, requests: str, timeout: float) -> tuple[list[EngineOutcome], list[dict[str, Any]]]:
        """Each engine on its own: what fails in one does not hold the others up.

        Returns:
            Every engine's outcome, and the reports of those that committed.

        Raises:
            BridgeError: none of them committed.
        """

        def call(index: int, engine: Engine) -> tuple[EngineOutcome, dict[str, Any] | None]:
            try:
                return EngineOutcome(index, version), engine.commit_update(version, requests, timeout)
            except BridgeError as error:
                failures.append(error)
                return EngineOutcome(index, None, f"{type(error).__name__}: {error}"), None

        failures: list[BridgeError] = []
        found = self._each(call)
        if len(failures) == len(self.all):
            raise failures[0]
        return [outcome for outcome, _ in found], [report for _, report in found if report is not None]

    def abort(self, reason: str) -> None:
        """As far as engines can be reached; one that cannot is dead, or aborts by its own time-out."""

        def call(_: int, engine: Engine) -> None:
            try:
                engine.abort_update(reason)
            except BridgeError:
                return

        self._each(call)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _each(self, call: Callable[[int, Engine], Any]) -> list[Any]:
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


def _of_replica(wire: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Replicas on one host keep images of their own."""
    return {"replica": index, **({"store": f"{wire['store']}.{index}"} if "store" in wire else {})}


def _rebuilt(kind: str, message: str) -> Exception:
    from mbridge_rl.sync import errors

    found = getattr(errors, kind, SyncError)
    return found(message) if isinstance(found, type) and issubclass(found, BridgeError) else SyncError(f"{kind}: {message}")
