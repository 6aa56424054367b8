"""The adapters that an engine serves, by name and version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mbridge_rl.core.errors import listed
from mbridge_rl.sync.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.sync.vllm.adapter_slots import in_slots


class AdapterSlots:
    """The named, versioned adapters of an engine, on all its workers alike.

    Args:
        in_workers: runs `call(worker, *args)` in all workers and returns their results, or raises the first error.
    """

    _BASE = 1  # slot id of the adapter without factors

    def __init__(self, in_workers: Callable[..., list[Any]]) -> None:
        self._in_workers = in_workers
        self._ids: dict[str, int] = {}
        self.versions: dict[str, int] = {}

    def info(self) -> dict[str, Any]:
        """See `WorkerAdapters.info`."""
        return self._call("info")[0]

    def put(self, update: Mapping[str, Any]) -> dict[str, Any]:
        """Installs adapter `update["adapter"]`, or replaces it, as `update["version"]`: on all workers, or on none.

        Returns:
            `adapter`, `version`, `tensors`, `bytes`, `digest` (as `core.digest.combine` gives it) and `proven`, the number of
            tensors that were read back from the slots.

        Raises:
            DigestMismatch, EngineMismatch: the adapter before it serves on.
        """
        name, version = update["adapter"], int(update["version"])
        slot_id = self._slot_id(name)
        reports = self._replace(slot_id, "stage", dict(update))
        self._ids[name], self.versions[name] = slot_id, version
        return {"adapter": name, "version": version, **reports[0]}

    def remove(self, name: str) -> None:
        """Frees the adapter's slot."""
        self._call("remove", self._known(name))
        del self._ids[name], self.versions[name]

    def digests(self, name: str) -> dict[str, str]:
        """Digest of every factor as the slots hold it now.

        Raises:
            DigestMismatch: workers hold different adapters.
        """
        found = self._call("digests", self._known(name))
        if any(other != found[0] for other in found):
            raise DigestMismatch(f"the workers' slots of adapter {name} hold different adapters")
        return found[0]

    def requests(self, names: str | Sequence[str | None] | None, count: int) -> list[Any] | None:
        """vLLM's `LoRARequest` of `count` prompts; `None` if there are no adapters.

        A request's name carries the version, so that the prefix cache never gives one version's keys and values to another.
        Base rows get a zero adapter: on CPUs vLLM would apply the last adapter of a mixed batch to rows that have
        none.
        """
        if names is None and not self._ids:
            return None
        return [self._request(name) for name in ([names] * count if names is None or isinstance(names, str) else names)]

    def _request(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if name is None:
            return LoRARequest("base", self._BASE, "memory")
        slot_id = self._known(name)
        return LoRARequest(f"{name}@{self.versions[name]}", slot_id, "memory")

    def _call(self, call: str, *args: Any) -> list[Any]:
        return self._in_workers(in_slots, call, *args)

    def _replace(self, slot_id: int, stage: str, *args: Any) -> list[Any]:
        try:
            self._call(stage, slot_id, *args)
            reports = self._call("commit", slot_id)
        except BaseException:
            self._call("revert", slot_id)
            raise
        self._call("settle", slot_id)
        return reports

    def _slot_id(self, name: str) -> int:
        """An adapter's slot, a new one for a new adapter."""
        if name in self._ids:
            return self._ids[name]
        slots = self.info()["slots"]
        if len(self._ids) + 2 > slots:
            raise EngineMismatch(
                f"the engine has {slots} LoRA slots, one of them for base rows, and holds {listed(self._ids) or 'no adapter'}: "
                f"start it with max_loras={len(self._ids) + 2} or remove one"
            )
        if not self._ids:
            self._replace(self._BASE, "stage_zero")
        return next(number for number in self._numbers() if number not in self._ids.values())

    def _numbers(self) -> Iterator[int]:
        return iter(range(self._BASE + 1, self._BASE + 2 + len(self._ids)))

    def _known(self, name: str) -> int:
        if name not in self._ids:
            raise SyncError(f"the engine holds no adapter {name!r}; found {listed(self._ids) or 'none'}")
        return self._ids[name]
