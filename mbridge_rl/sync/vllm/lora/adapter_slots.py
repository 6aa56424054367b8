"""Adapters in a vLLM worker's LoRA slots: checked, staged, swapped and proven, without files and without patching vLLM.

To learn where every element of an adapter lands, vLLM's own code is given numbers instead of weights: each element of every
factor gets its own number, is processed like a real adapter (renaming, packing into fused layers, slicing for tensor
parallelism), and is read back from a scratch slot. So the slots can be read in PEFT's coordinates, and their digests are the
trainer's.

`B` comes multiplied by the adapter's scale, which makes vLLM's own scaling a no-op: it would change a tensor in place.
"""

from __future__ import annotations

import base64
import copy
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.sync.payload.adapter_messages import AdapterModule, AdapterSlotsInfo, AdapterUpdate, ServedAdapter, SlotReport
from mbridge_rl.sync.payload.message_codec import name_of

_STACKS = ("lora_a_stacked", "lora_b_stacked")
_UNUSED = 1 << 30  # a slot id that no adapter has
BASE = "base"  # the adapter without factors
PLACEHOLDER = "mbridge_rl-adapter-"  # in the paths of adapters that vLLM loaded for us


@dataclass(frozen=True)
class _Adapter:
    """An adapter that was checked on arrival.

    Attributes:
        name: the name of the adapter; `BASE` for the adapter of base rows.
        version: the version of the adapter.
        model: vLLM's `LoRAModel`; that of base rows is zero.
        tensors: the factors of the adapter.
        arrived: all elements of the factors as they arrived, flat, in the order of `tensors`.
        digests: the trainer's digest of each factor.
    """

    name: str
    version: int
    model: Any
    tensors: tuple[HFTensor, ...] = ()
    arrived: Tensor | None = None
    digests: Mapping[str, int] | None = None


class WorkerAdapters:
    """The LoRA slots of one worker. An adapter is known by its `slot_id`, a positive number."""

    def __init__(self, manager: Any) -> None:
        self._worker_manager, self._manager = manager, manager._adapter_manager
        self._staged: dict[int, _Adapter] = {}
        self._live: dict[int, _Adapter] = {}
        self._before: dict[int, _Adapter | None] = {}
        self._folder: TemporaryDirectory[str] | None = None

    @property
    def info(self) -> AdapterSlotsInfo:
        """The dtype and number of the slots and the largest rank, which an adapter must fit, and the machine id.

        Raises:
            EngineMismatch: this engine cannot compute with adapters at all.
        """
        config = self._worker_manager.lora_config
        if self._manager._is_moe and self._worker_manager.device.type == "cpu":
            raise EngineMismatch(
                "vLLM computes experts beside LoRA with Triton kernels, which have no CPU form: start the engine without LoRA "
                "and sync merged weights (WeightSync)"
            )
        return AdapterSlotsInfo(
            dtype=name_of(config.lora_dtype),
            slots=min(config.max_loras, config.max_cpu_loras or config.max_loras),
            max_rank=config.max_lora_rank,
            host=machine_id(),
        )

    @property
    def served(self) -> list[ServedAdapter]:
        return [ServedAdapter(adapter.name, slot_id, adapter.version) for slot_id, adapter in self._live.items()]

    @property
    def slot_ids(self) -> list[int]:
        """The slot ids of all adapters, also of those that vLLM loaded for its owner. The adapter that was used or loaded last
        comes last."""
        return list(self._manager.list_adapters())

    def write_without_effect(self, adapted: AdapterModule) -> str:
        """Writes PEFT's files of an adapter of one module, all zeros; returns their folder."""
        self._folder = TemporaryDirectory(prefix=PLACEHOLDER)
        tensors = {tensor.hf_name: torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in adapted.tensors}
        save_file(tensors, Path(self._folder.name) / "adapter_model.safetensors")
        module = adapted.tensors[0].hf_name.rpartition(".lora_")[0]
        rank = tensors[f"{module}.lora_A.weight"].shape[0]
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [module.rpartition(".")[2]]}
        (Path(self._folder.name) / "adapter_config.json").write_text(json.dumps(config))
        return self._folder.name

    def discard_files(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def stage(self, slot_id: int, update: AdapterUpdate) -> None:
        """Reads an adapter that was sent and checks all of it; no slot changes.

        Raises:
            DigestMismatch: bytes are not the trainer's. EngineMismatch: the engine has no place for the adapter.
        """
        tensors = update.tensors
        self._require_fitting(tensors, update.rank)
        digests = {tensor.hf_name: int(text, 16) for tensor, text in zip(tensors, update.digests, strict=True)}
        with _bytes_of(update) as sent:
            starts = zip(tensors, update.offsets, strict=True)
            views = [sent[at : at + tensor.nbytes].view(tensor.dtype) for tensor, at in starts]
            arrived = torch.cat(views)  # a copy, because the trainer will fill its arena again
        _require_digests(_by_name(tensors, arrived), tensors, digests, "arrived with other bytes")
        self._require_homes(tensors, update.rank)
        model = self._lora_model(slot_id, _by_name(tensors, arrived.clone()), update.rank)
        self._staged[slot_id] = _Adapter(update.adapter, update.version, model, tensors, arrived, digests)

    def stage_zero(self, slot_id: int) -> None:
        """Stages an adapter that changes nothing, for rows that use only the base model."""
        zero = self._manager.create_dummy_lora(slot_id, 1, self._worker_manager.embedding_modules)
        self._staged[slot_id] = _Adapter(BASE, 0, zero, digests={})

    def commit(self, slot_id: int) -> SlotReport:
        """Puts the staged adapter into its slot, in place of the adapter before, and proves it.

        Raises:
            DigestMismatch: the slot does not hold what was staged; `revert` brings back the adapter before.
        """
        adapter = self._staged.pop(slot_id)
        self._before[slot_id] = self._live.get(slot_id)
        self._install(slot_id, adapter)
        factors = self._read(slot_id, adapter)
        _require_digests(factors, adapter.tensors, adapter.digests or {}, "are not in their slot")
        nbytes = sum(tensor.nbytes for tensor in adapter.tensors)
        return SlotReport(len(factors), nbytes, combine(adapter.digests or {}), proven=len(factors))

    def revert(self, slot_id: int) -> None:
        """Undoes `stage` and, if it was called, `commit`: the adapter before serves again."""
        self._staged.pop(slot_id, None)
        if slot_id not in self._before:
            return
        before = self._before.pop(slot_id)
        if before is None:
            self.remove(slot_id)
        else:
            self._install(slot_id, before)

    def settle(self, slot_id: int) -> None:
        """Forgets the adapter before, because all workers have committed."""
        self._before.pop(slot_id, None)

    def remove(self, slot_id: int) -> None:
        """Frees the slot."""
        self._manager.remove_adapter(slot_id)
        self._live.pop(slot_id, None)

    def digests(self, slot_id: int) -> dict[str, str]:
        """The digest of every tensor as the slot holds it now, 16 hex digits. With tensor parallelism a worker holds a part of
        a tensor; the remaining elements count as they arrived.

        Raises:
            SyncError: there is no such adapter, or vLLM dropped it from its slots.
        """
        if slot_id not in self._live:
            raise SyncError(f"no adapter has slot id {slot_id}; found {listed(self._live)}")
        adapter = self._live[slot_id]
        factors = self._read(slot_id, adapter)
        return {tensor.hf_name: f"{digest(factors[tensor.hf_name]):016x}" for tensor in adapter.tensors}

    def _install(self, slot_id: int, adapter: _Adapter) -> None:
        self._manager.remove_adapter(slot_id)
        self._live.pop(slot_id, None)
        self._manager.add_adapter(adapter.model)
        self._manager.activate_adapter(slot_id)
        self._live[slot_id] = adapter

    def _require_fitting(self, tensors: tuple[HFTensor, ...], rank: int) -> None:
        info = self.info
        other_dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} - {info.dtype}
        if other_dtypes:
            raise EngineMismatch(f"the engine's LoRA slots are {info.dtype}, the adapter is {listed(other_dtypes)}")
        if rank > info.max_rank:
            raise EngineMismatch(f"the adapter has rank {rank}, the engine takes {info.max_rank}: start it with max_lora_rank")

    def _require_homes(self, tensors: tuple[HFTensor, ...], rank: int) -> None:
        """Checks that every factor lands in a layer, and in full if no other worker could hold the remaining elements.

        Raises:
            EngineMismatch: a factor does not.
        """
        landed, holds_all = torch.zeros(1 + _elements(tensors), dtype=torch.bool), True
        for layer, _, _, positions in self._landings(tensors, rank):
            landed[positions.flatten()] = True
            holds_all = holds_all and layer.tp_size == 1
        landed_by_name = _by_name(tensors, landed[1:]).items()
        if homeless := [name for name, landed in landed_by_name if not (landed.all() if holds_all else landed.any())]:
            raise EngineMismatch(f"the engine has no LoRA layer for {listed(homeless)}")

    def _lora_model(self, slot_id: int, tensors: dict[str, Tensor], rank: int) -> Any:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        model = LoRAModel.from_lora_tensors(
            slot_id,
            tensors,
            PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []}),
            device="cpu",
            dtype=next(iter(tensors.values())).dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        model.is_3d_lora_weight = False
        return model

    def _landings(self, tensors: tuple[HFTensor, ...], rank: int) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
        """Where the elements land, learned by sending their numbers through vLLM's packing and slicing. One layer comes at a
        time, because the numbers are as large as the adapter.

        Yields:
            `(LoRA layer, stack, index in the stack, positions + 1)`, with 0 where no element lands.

        Raises:
            EngineMismatch: a layer is of a kind that can't be read back.
        """
        numbers = torch.arange(1, 1 + _elements(tensors), dtype=_number_type(tensors))
        numbered = self._lora_model(_UNUSED, _by_name(tensors, numbers), rank)
        self._manager._create_merged_loras_inplace(numbered)
        for name, layer in self._manager.modules.items():
            if factors := self._manager._get_lora_layer_weights(numbered, name):
                scratch = _scratch(name, layer, numbers.dtype)
                scratch.set_lora(0, factors.lora_a, factors.lora_b)
                for stack in _STACKS:
                    for index, positions in enumerate(getattr(scratch, stack)):
                        yield layer, stack, index, positions[0]

    def _read(self, slot_id: int, adapter: _Adapter) -> dict[str, Tensor]:
        """The adapter's tensors, read from the live slot; elements that this worker does not hold are as they arrived.

        Raises:
            SyncError: vLLM dropped the adapter. DigestMismatch: the slot holds other values beside the adapter.
        """
        if slot_id not in self._manager.lora_index_to_id:
            raise SyncError(f"adapter {slot_id} is in no slot: more adapters were used than the engine has slots")
        slot = self._manager.lora_index_to_id.index(slot_id)
        if adapter.arrived is None:
            return {}
        elements = torch.cat([adapter.arrived.new_zeros(1), adapter.arrived])
        for layer, stack, index, positions in self._landings(adapter.tensors, adapter.model.rank):
            values = getattr(layer, stack)[index][slot].to("cpu")
            if values[positions == 0].count_nonzero():
                raise DigestMismatch(
                    f"the slot of adapter {slot_id} holds something beside it in {type(layer).__name__}.{stack}"
                )
            elements[positions] = values
        return _by_name(adapter.tensors, elements[1:])


@contextmanager
def _bytes_of(update: AdapterUpdate) -> Iterator[Tensor]:
    """The bytes of an adapter (uint8), from the trainer's shared memory or, if it was sent to another machine, from the
    update."""
    if update.content is not None:
        yield torch.frombuffer(bytearray(base64.b64decode(update.content)), dtype=torch.uint8)
        return
    with Arena.attach(update.arena_path, update.arena_bytes) as arena:
        yield arena.view(0, (arena.nbytes,), torch.uint8)


def _scratch(name: str, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a LoRA layer that has one slot of integers and shares everything else.

    Raises:
        EngineMismatch: the layer is of a kind that can't be read back.
    """
    if any(attribute.endswith("_stacked") and attribute not in _STACKS for attribute in vars(layer)):
        raise EngineMismatch(
            f"adapters of {name} ({type(layer).__name__}) can't be read back: leave experts out of the targets"
        )
    if any(isinstance(getattr(layer, stack), Tensor) for stack in _STACKS):
        raise EngineMismatch(
            f"adapters of output layers ({name}, {type(layer).__name__}) can't be read back: leave them out of the targets, or "
            f"sync merged weights (WeightSync)"
        )
    scratch = copy.copy(layer)
    for stack in _STACKS:
        slots = tuple(torch.zeros(1, *slots.shape[1:], dtype=dtype) for slots in getattr(layer, stack))
        setattr(scratch, stack, slots)
    return scratch


def _elements(tensors: tuple[HFTensor, ...]) -> int:
    return sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors)


def _number_type(tensors: tuple[HFTensor, ...]) -> torch.dtype:
    return torch.int32 if _elements(tensors) < 1 << 31 else torch.int64


def _by_name(tensors: tuple[HFTensor, ...], flat: Tensor) -> dict[str, Tensor]:
    sizes = [tensor.nbytes // tensor.dtype.itemsize for tensor in tensors]
    return {tensor.hf_name: part.view(tensor.shape) for tensor, part in zip(tensors, flat.split(sizes), strict=True)}


def _require_digests(
    factors: Mapping[str, Tensor], tensors: tuple[HFTensor, ...], expected: Mapping[str, int], complaint: str
) -> None:
    wrong_names = [tensor.hf_name for tensor in tensors if digest(factors[tensor.hf_name]) != expected[tensor.hf_name]]
    if wrong_names:
        raise DigestMismatch(f"{len(wrong_names)} of {len(tensors)} factors {complaint}: {listed(wrong_names)}")


# The functions that `AdapterSlots` calls in every worker.

_OF_MANAGER: weakref.WeakKeyDictionary[Any, WorkerAdapters] = weakref.WeakKeyDictionary()


def in_slots(worker: Any, call: str, *args: Any) -> Any:
    """Calls a method of this worker's `WorkerAdapters`, or reads a property of it."""
    manager = _manager_of(worker)
    if manager is None:
        raise EngineMismatch("the engine was started without LoRA: give it enable_lora=True, max_loras and max_lora_rank")
    if manager not in _OF_MANAGER:
        _OF_MANAGER[manager] = WorkerAdapters(manager)
    member = getattr(_OF_MANAGER[manager], call)
    return member(*args) if callable(member) else member


def served_adapters(worker: Any) -> list[ServedAdapter] | None:
    """`WorkerAdapters.served`; `None` if the engine was started without LoRA."""
    return None if _manager_of(worker) is None else in_slots(worker, "served")


def _manager_of(worker: Any) -> Any:
    return getattr(getattr(worker, "worker", worker).model_runner, "lora_manager", None)
