"""The adapters that an engine serves, by name and version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError, listed
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterSlotsInfo, AdapterUpdate
from mbridge_rl.sync.vllm.lora.adapter_slots import BASE, in_slots, served_adapters

_HOLD_SECONDS = 600.0  # until an engine must have stopped generating


class Served(NamedTuple):
    """An adapter in its slot."""

    name: str
    slot_id: int
    version: int

    @property
    def label(self) -> str:
        """The name of the adapter in a request to vLLM. It has the version, so that the prefix cache never gives the keys and
        values of one version to another."""
        return BASE if self.name == BASE else f"{self.name}@{self.version}"

    @property
    def request(self) -> Any:
        """vLLM's `LoRARequest`."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.label, self.slot_id, "memory")


class AdapterSlots:
    """The named, versioned adapters of an engine, which are the same on all its workers. The workers hold the list of them, so
    another client that connects later finds them.

    Args:
        in_workers: runs `call(worker, *args)` in all workers and returns their results, or raises the first error.
        claim: returns the slot id of a new adapter, from its name, its first update, and the adapters that are served.
        release: undoes `claim`, by the adapter's name.
    """

    def __init__(
        self,
        in_workers: Callable[..., list[Any]],
        claim: Callable[[str, AdapterUpdate, Mapping[str, Served]], int],
        release: Callable[[str], None],
    ) -> None:
        self._in_workers, self._claim, self._release = in_workers, claim, release
        self._without_lora = False

    def info(self) -> AdapterSlotsInfo:
        """The result of `WorkerAdapters.info` in the first worker."""
        return self._call("info")[0]

    def put(self, update: AdapterUpdate) -> AdapterReport:
        """Installs an adapter, or replaces it: on all workers, or on none.

        Raises:
            DigestMismatch, EngineMismatch: the adapter before it serves on.
        """
        name = update.adapter
        if name == BASE:
            raise EngineMismatch(f"{BASE!r} names what base rows have: give the adapter another name")
        served = self._served()
        if name in served:
            reports = self._replace(served[name].slot_id, "stage", update)
        else:
            self._require_room(served)
            if BASE not in served:
                self._install(BASE, update, served, "stage_zero")
                served = self._served()
            reports = self._install(name, update, served, "stage", update)
        first = reports[0]
        return AdapterReport(name, update.version, first.tensors, first.bytes, first.digest, first.proven)

    def withdraw(self, name: str) -> Served:
        """Stops serving the adapter; its slot has to be freed afterwards (`free`)."""
        adapter = self._known(name)
        self._release(name)
        return adapter

    def free(self, adapter: Served) -> None:
        self._call("remove", adapter.slot_id)

    def digests(self, name: str) -> dict[str, str]:
        """The digest of every factor as the slots hold it now, 16 hex digits.

        Raises:
            DigestMismatch: workers hold different adapters.
        """
        by_worker = self._call("digests", self._known(name).slot_id)
        if any(digests != by_worker[0] for digests in by_worker):
            raise DigestMismatch(f"the workers' slots of adapter {name} hold different adapters")
        return by_worker[0]

    def versions(self) -> dict[str, int]:
        return {name: adapter.version for name, adapter in self._served().items() if name != BASE}

    def for_prompts(self, names: str | Sequence[str | None] | None, count: int) -> list[Served] | None:
        """The adapter that answers each of `count` prompts; `None` if there are no adapters.

        Base rows get a zero adapter: on CPUs vLLM would apply the last adapter of a mixed batch to rows that have none.

        Args:
            names: the name of the adapter of all prompts, or one per prompt; `None` is the base model.
            count: the number of prompts.
        """
        served = self._served()
        by_prompt = [names] * count if names is None or isinstance(names, str) else names
        if BASE not in served and not any(by_prompt):
            return None
        return [self._known(name or BASE, served) for name in by_prompt]

    def _served(self) -> dict[str, Served]:
        slots = None if self._without_lora else self._in_workers(served_adapters)[0]
        self._without_lora = slots is None
        return {slot.name: Served(slot.name, slot.slot_id, slot.version) for slot in slots or ()}

    def _call(self, call: str, *args: Any) -> list[Any]:
        return self._in_workers(in_slots, call, *args)

    def _install(self, name: str, update: AdapterUpdate, served: Mapping[str, Served], stage: str, *args: Any) -> list[Any]:
        """Installs an adapter in a slot of its own."""
        slot_id = self._claim(name, update, served)
        try:
            return self._replace(slot_id, stage, *args)
        except BaseException:
            self._release(name)
            raise

    def _replace(self, slot_id: int, stage: str, *args: Any) -> list[Any]:
        try:
            self._call(stage, slot_id, *args)
            reports = self._call("commit", slot_id)
        except BaseException:
            self._call("revert", slot_id)
            raise
        self._call("settle", slot_id)
        return reports

    def _require_room(self, served: Mapping[str, Served]) -> None:
        slots, others = self.info().slots, served.keys() - {BASE}
        if len(others) + 2 > slots:
            raise EngineMismatch(
                f"the engine has {slots} LoRA slots, one of them for base rows, and holds {listed(others) or 'no adapter'}: "
                f"start it with max_loras={len(others) + 2} or remove one"
            )

    def _known(self, name: str, served: Mapping[str, Served] | None = None) -> Served:
        served = self._served() if served is None else served
        if name not in served:
            raise SyncError(f"the engine holds no adapter {name!r}; found {listed(served.keys() - {BASE}) or 'none'}")
        return served[name]


class AdaptableEngine(ABC):
    """The adapter methods of an engine of any kind, which `sync.adapter_sync.AdapterSync` calls."""

    _first_slot_id = 1

    @cached_property
    def _adapters(self) -> AdapterSlots:
        return AdapterSlots(self._call_workers, self._claim_slot, self._release_slot)

    def adapter_info(self) -> AdapterSlotsInfo:
        """The dtype and number of the LoRA slots, and the largest rank; see `adapter_slots.WorkerAdapters.info`."""
        return self._adapters.info()

    def put_adapter(self, update: AdapterUpdate) -> AdapterReport:
        """Installs an adapter, or replaces one in place; see `AdapterSlots.put`. Requests
        in flight that are kept (`RequestRunner.hold`) go on with the new adapter and compute their keys and values anew."""
        with self._holding(update.requests, update.timeout):
            report = self._adapters.put(update)
            if update.is_policy:
                self._serve(update.version)
            else:
                self._forget()
        return report

    def remove_adapter(self, adapter: str) -> None:
        """Frees an adapter's slot after the requests in flight are answered."""
        withdrawn = self._adapters.withdraw(adapter)
        with self._holding("wait", _HOLD_SECONDS):
            self._adapters.free(withdrawn)

    def adapter_versions(self) -> dict[str, int]:
        """The adapters that are served, and their versions."""
        return self._adapters.versions()

    def adapter_digests(self, adapter: str) -> dict[str, str]:
        """The digest of every factor of an adapter as its slot holds it now."""
        return self._adapters.digests(adapter)

    def _claim_slot(self, name: str, update: AdapterUpdate, served: Mapping[str, Served]) -> int:
        taken = {adapter.slot_id for adapter in served.values()}
        return next(number for number in count(self._first_slot_id) if number not in taken)

    def _release_slot(self, name: str) -> None:  # noqa: B027  most kinds keep no list of their own
        """Undoes `_claim_slot`, because the adapter is removed or could not be installed."""

    @abstractmethod
    def _call_workers(self, call: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs `call(worker, *args)`, where `extension` lists the function `call`, in all workers; returns their results or
        raises the first error."""

    @contextmanager
    def _holding(self, requests: InFlight, timeout: float) -> Iterator[None]:
        self._hold(requests, timeout)
        try:
            yield
        finally:
            self._resume()

    @abstractmethod
    def _hold(self, requests: InFlight, timeout: float) -> None:
        """Stops generating until `_resume`; see `RequestRunner.hold`."""

    @abstractmethod
    def _resume(self) -> None:
        """Goes on generating, unless the engine is unusable."""

    @abstractmethod
    def _serve(self, version: int) -> None:
        """Labels the policy with `version`, and drops the keys and values of other versions."""

    @abstractmethod
    def _forget(self) -> None:
        """Drops the keys and values of requests that are held."""
