"""Adapters in a vLLM worker's LoRA slots: checked, staged, swapped and proven, without files and without patching vLLM.

Where every element of an adapter lands is learned by sending vLLM's own code numbers instead of weights: each element of every
factor gets its own, goes the way of a real adapter (renaming, packing into fused layers, slicing for tensor parallelism), and
is read back from a scratch slot. So the slots can be read in PEFT's coordinates, and their digests are the trainer's.

`B` comes multiplied by the adapter's scale, which makes vLLM's own scaling a no-op: it would change a tensor in place.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.errors import listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.errors import DigestMismatch, EngineMismatch, SyncError

_STACKS = ("lora_a_stacked", "lora_b_stacked")


@dataclass(frozen=True)
class _Adapter:
    """An adapter that was checked on arrival.

    Attributes:
        model: vLLM's `LoRAModel`; a base row's is zero.
        tensors: what it is made of.
        arrived: all elements in the order of `tensors`, flat; the elements that this worker keeps have positions in it.
        landings: `(LoRA layer, stack, which of the stack, positions + 1)`; 0 where nothing lands.
        digests: of each tensor, as the trainer has it.
    """

    model: Any
    tensors: tuple[HFTensor, ...] = ()
    arrived: Tensor | None = None
    landings: tuple[tuple[nn.Module, str, int, Tensor], ...] = ()
    digests: Mapping[str, int] | None = None


class WorkerAdapters:
    """The LoRA slots of one worker. An adapter is known by its `slot_id`, a positive number."""

    def __init__(self, manager: Any) -> None:
        self._worker_manager, self._manager = manager, manager._adapter_manager
        self._staged: dict[int, _Adapter] = {}
        self._live: dict[int, _Adapter] = {}
        self._before: dict[int, _Adapter | None] = {}

    @property
    def info(self) -> dict[str, Any]:
        """What a trainer must fit: dtype of the slots, their number, the largest rank.

        Raises:
            EngineMismatch: this engine cannot compute with adapters at all.
        """
        config = self._worker_manager.lora_config
        if self._manager._is_moe and self._worker_manager.device.type == "cpu":
            raise EngineMismatch(
                "vLLM computes experts beside LoRA with Triton kernels, which have no CPU form: start the engine without LoRA "
                "and sync merged weights (WeightSync)"
            )
        return {
            "dtype": str(config.lora_dtype).removeprefix("torch."),
            "slots": min(config.max_loras, config.max_cpu_loras or config.max_loras),
            "max_rank": config.max_lora_rank,
        }

    def stage(self, slot_id: int, update: Mapping[str, Any]) -> None:
        """Reads an adapter out of shared memory and checks all of it; no slot changes.

        Raises:
            DigestMismatch: bytes are not the trainer's; EngineMismatch: the engine has no place for them.
        """
        tensors = tuple(
            HFTensor(name, getattr(torch, dtype), tuple(shape), word)
            for name, dtype, shape, word in zip(
                update["names"], update["dtypes"], update["shapes"], update["words"], strict=True
            )
        )
        self._require_fitting(tensors, update["rank"])
        digests = {name: int(text, 16) for name, text in zip(update["names"], update["digests"], strict=True)}
        with Arena.attach(update["arena_path"], update["arena_nbytes"]) as arena:
            views = [arena.view(at, tensor.shape, tensor.dtype) for tensor, at in zip(tensors, update["offsets"], strict=True)]
            arrived = torch.cat([view.flatten() for view in views])  # the arena is the trainer's: it is filled again
        _require_digests(_by_name(tensors, arrived), tensors, digests, "arrived with other bytes")
        model = self._lora_model(slot_id, _by_name(tensors, arrived.clone()), update["rank"], arrived.dtype)
        self._staged[slot_id] = _Adapter(model, tensors, arrived, self._landings(slot_id, tensors, update["rank"]), digests)

    def stage_zero(self, slot_id: int) -> None:
        """An adapter that changes nothing, for rows that are to see the base model alone."""
        zero = self._manager.create_dummy_lora(slot_id, 1, self._worker_manager.embedding_modules)
        self._staged[slot_id] = _Adapter(zero, digests={})

    def commit(self, slot_id: int) -> dict[str, Any]:
        """Puts the staged adapter into its slot, in place of what was there, and proves it.

        Raises:
            DigestMismatch: the slot does not hold what was staged; `revert` brings the one before back.
        """
        adapter = self._staged.pop(slot_id)
        self._before[slot_id] = self._live.get(slot_id)
        self._install(slot_id, adapter)
        found = self._read(slot_id, adapter, fill=adapter.arrived)
        _require_digests(found, adapter.tensors, adapter.digests or {}, "are not in their slot")
        nbytes = sum(tensor.nbytes for tensor in adapter.tensors)
        return {"tensors": len(found), "bytes": nbytes, "digest": combine(adapter.digests or {}), "proven": len(found)}

    def revert(self, slot_id: int) -> None:
        """Undoes `stage` and, if it came that far, `commit`: the adapter before serves again."""
        self._staged.pop(slot_id, None)
        if slot_id not in self._before:
            return
        before = self._before.pop(slot_id)
        if before is None:
            self.remove(slot_id)
        else:
            self._install(slot_id, before)

    def settle(self, slot_id: int) -> None:
        """The commit stands on all workers: what was there before is forgotten."""
        self._before.pop(slot_id, None)

    def remove(self, slot_id: int) -> None:
        """Frees the slot."""
        self._manager.remove_adapter(slot_id)
        self._live.pop(slot_id, None)

    def digests(self, slot_id: int) -> dict[str, str]:
        """Digest of every tensor as the slot holds it now, 16 hex digits. With tensor parallelism a worker holds a part; the
        rest counts as it arrived.

        Raises:
            SyncError: there is no such adapter, or vLLM dropped it from its slots.
        """
        if slot_id not in self._live:
            raise SyncError(f"no adapter has slot id {slot_id}; found {listed(self._live)}")
        adapter = self._live[slot_id]
        found = self._read(slot_id, adapter, fill=adapter.arrived)
        return {tensor.hf_name: f"{digest(found[tensor.hf_name], tensor.word_elements):016x}" for tensor in adapter.tensors}

    def _install(self, slot_id: int, adapter: _Adapter) -> None:
        self._manager.remove_adapter(slot_id)
        self._live.pop(slot_id, None)
        self._manager.add_adapter(adapter.model)
        self._manager.activate_adapter(slot_id)
        self._live[slot_id] = adapter

    def _require_fitting(self, tensors: tuple[HFTensor, ...], rank: int) -> None:
        info = self.info
        others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} - {info["dtype"]}
        if others:
            raise EngineMismatch(f"the engine's LoRA slots are {info['dtype']}, the adapter is {listed(others)}")
        if rank > info["max_rank"]:
            raise EngineMismatch(
                f"the adapter has rank {rank}, the engine takes {info['max_rank']}: start it with max_lora_rank"
            )

    def _lora_model(self, slot_id: int, tensors: dict[str, Tensor], rank: int, dtype: torch.dtype) -> Any:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        model = LoRAModel.from_lora_tensors(
            slot_id,
            tensors,
            PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []}),
            device="cpu",
            dtype=dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        model.is_3d_lora_weight = False
        return model

    def _landings(
        self, slot_id: int, tensors: tuple[HFTensor, ...], rank: int
    ) -> tuple[tuple[nn.Module, str, int, Tensor], ...]:
        """Sends every element's own number through vLLM's packing and slicing.

        Raises:
            EngineMismatch: an element of no layer with LoRA, or of a kind of layer that can't be read back.
        """
        numbers = torch.arange(1, 1 + sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors), dtype=torch.int64)
        numbered = self._lora_model(slot_id, _by_name(tensors, numbers), rank, torch.int64)
        self._manager._create_merged_loras_inplace(numbered)
        landings, landed = [], torch.zeros(len(numbers) + 1, dtype=torch.bool)
        for name, layer in self._manager.modules.items():
            factors = self._manager._get_lora_layer_weights(numbered, name)
            if not factors:
                continue
            scratch = _scratch(name, layer)
            scratch.set_lora(0, factors.lora_a, factors.lora_b)
            for stack in _STACKS:
                for index, positions in enumerate(getattr(scratch, stack)):
                    landings.append((layer, stack, index, positions[0]))
                    landed[positions.flatten()] = True
        homeless = [name for name, found in _by_name(tensors, landed[1:]).items() if not found.any()]
        if homeless:
            raise EngineMismatch(f"the engine has no LoRA layer for {listed(homeless)}")
        return tuple(landings)

    def _read(self, slot_id: int, adapter: _Adapter, fill: Tensor | None) -> dict[str, Tensor]:
        """The adapter's tensors out of the live slot; elements that this worker does not keep are `fill`'s.

        Raises:
            SyncError: vLLM dropped the adapter; DigestMismatch: the slot holds something beside it.
        """
        if slot_id not in self._manager.lora_index_to_id:
            raise SyncError(f"adapter {slot_id} is in no slot: more adapters were used than the engine has slots")
        slot = self._manager.lora_index_to_id.index(slot_id)
        if fill is None:
            return {}
        whole = torch.cat([fill.new_zeros(1), fill])
        for layer, stack, index, positions in adapter.landings:
            held = getattr(layer, stack)[index][slot].to("cpu")
            if held[positions == 0].count_nonzero():
                raise DigestMismatch(
                    f"the slot of adapter {slot_id} holds something beside it in {type(layer).__name__}.{stack}"
                )
            whole[positions] = held
        return _by_name(adapter.tensors, whole[1:])


def _scratch(name: str, layer: nn.Module) -> nn.Module:
    """A LoRA layer with one slot of int64, everything else shared."""
    if any(attribute.endswith("_stacked") and attribute not in _STACKS for attribute in vars(layer)):
        raise EngineMismatch(
            f"adapters of {name} ({type(layer).__name__}) can't be read back: leave experts out of the targets"
        )
    scratch = copy.copy(layer)
    for stack in _STACKS:
        slots = tuple(torch.zeros(1, *whole.shape[1:], dtype=torch.int64) for whole in getattr(layer, stack))
        setattr(scratch, stack, slots)
    return scratch


def _by_name(tensors: tuple[HFTensor, ...], flat: Tensor) -> dict[str, Tensor]:
    sizes = [tensor.nbytes // tensor.dtype.itemsize for tensor in tensors]
    return {tensor.hf_name: part.view(tensor.shape) for tensor, part in zip(tensors, flat.split(sizes), strict=True)}


def _require_digests(
    found: Mapping[str, Tensor], tensors: tuple[HFTensor, ...], expected: Mapping[str, int], complaint: str
) -> None:
    wrong = [
        tensor.hf_name for tensor in tensors if digest(found[tensor.hf_name], tensor.word_elements) != expected[tensor.hf_name]
    ]
    if wrong:
        raise DigestMismatch(f"{len(wrong)} of {len(tensors)} factors {complaint}: {listed(wrong)}")


# What `engine.py` calls in every worker.

_OF_MANAGER: weakref.WeakKeyDictionary[Any, WorkerAdapters] = weakref.WeakKeyDictionary()


def in_slots(worker: Any, call: str, *args: Any) -> Any:
    """Calls a method of this worker's `WorkerAdapters`, or reads its property."""
    runner = getattr(worker, "worker", worker).model_runner
    manager = getattr(runner, "lora_manager", None)
    if manager is None:
        raise EngineMismatch("the engine was started without LoRA: give it enable_lora=True, max_loras and max_lora_rank")
    if manager not in _OF_MANAGER:
        _OF_MANAGER[manager] = WorkerAdapters(manager)
    member = getattr(_OF_MANAGER[manager], call)
    return member(*args) if callable(member) else member


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
