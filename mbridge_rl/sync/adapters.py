"""Adapter sync: only LoRA factors travel, from their shards in Megatron straight into an engine's LoRA slots.

Every trainer rank writes the rectangles of factors that it holds into shared memory, already as PEFT lays them out; the one
small all-reduce sums their digests and is the barrier that says all are written. The engine checks every byte before it changes
a slot, and reads the slot back after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mbridge_rl.core.buckets import offsets
from mbridge_rl.core.digest import add, combine, signed, unsigned
from mbridge_rl.core.plan import compile_plan, copy_digest
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.megatron.adapters import live_adapter_side, lora_config_of
from mbridge_rl.megatron.parameters import layout_of
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.errors import EngineMismatch, SyncError
from mbridge_rl.sync.group import RankGroup

_log = logging.getLogger(__name__)


class AdapterClient(Protocol):
    """What an adapter sync asks of an engine (`InProcessEngine` and `EngineProcess` have it)."""

    def adapter_info(self) -> Mapping[str, Any]: ...
    def put_adapter(self, update: dict[str, Any]) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class AdapterReport:
    """What one adapter sync did, the same on every rank.

    Attributes:
        nbytes: that travelled: the adapter's, in the dtype of the engine's slots.
        digest: of all factors, `B` scaled; the engine's slots have it, or the sync had raised.
        seconds: wall time, all of it.
        engine: the engine's own report, on rank 0.
    """

    adapter: str
    version: int
    tensors: int
    nbytes: int
    digest: str
    seconds: float
    engine: Mapping[str, Any]

    @property
    def verified(self) -> bool:
        """The slots were read back and have the trainer's digests; otherwise there would be no report."""
        return True


class AdaptedEngine:
    """An engine whose completions are those of one of its adapters, for whoever samples and knows of no adapters.

    Args:
        engine: `InProcessEngine` or `EngineProcess`.
        adapter: its name.
    """

    def __init__(self, engine: Any, adapter: str = "policy") -> None:
        self._engine, self.adapter = engine, adapter

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """See `InProcessEngine.generate`; a completion's `weight_version` is the adapter's."""
        completions = self._engine.generate(prompts, adapter=self.adapter, **options)
        return [replace(one, weight_version=int(one.adapter.rpartition("@")[2])) for one in completions]


class AdapterSync:
    """Keeps one adapter of an engine that of a live Megatron model. Made once by all trainer ranks together; `sync` is
    collective.

    Args:
        bridge: of the model (`AutoBridge`).
        model: this rank's chunks, with adapters (`training.lora.add_lora`).
        client: the engine, started with `enable_lora=True`, on rank 0; `None` on the other ranks.
        adapter: its name in the engine.

    Raises:
        StateMismatchError: on all ranks: the model has no adapters; SyncError: not all ranks are on one machine, or rank 0 has
            no engine; EngineMismatch: the engine takes no adapters.
    """

    def __init__(self, bridge: Any, model: Sequence[nn.Module], client: AdapterClient | None, adapter: str = "policy") -> None:
        self._model, self._base, self._client, self.adapter = model, bridge.spec, client, adapter
        self._group = RankGroup()
        with self._group.together():
            if lora_config_of(model).dora:
                raise EngineMismatch("vLLM has no DoRA: start the engine without LoRA and sync merged weights (WeightSync)")
            self._layout = layout_of(model, bridge.spec)
            _, self._spec, _ = self._live()
            self._plan = compile_plan(self._spec, megatron_side(self._spec, self._layout), hf_side(self._spec))
        if not self._group.on_one_machine:
            raise SyncError("adapter sync through shared memory needs all trainer ranks on the engine's machine")
        self._dtype = getattr(torch, self._ask_engine()["dtype"])
        self._tensors = list(self._spec.hf_tensors(self._dtype))
        self._offsets, nbytes = offsets(tensor.nbytes for tensor in self._tensors)
        self._arena = self._shared_arena(nbytes)

    def sync(self, version: int) -> AdapterReport:
        """Moves the live factors into the engine and commits them as `version`.

        Raises:
            SyncError: on every rank, if any part failed on any; the engine then serves the version before.
        """
        started = time.perf_counter()
        with self._group.together():
            live, _, _ = self._live()
            shares = torch.tensor([signed(self._write(index, live)) for index in range(len(self._tensors))])
        sums = [unsigned(value) for value in self._group.sum(shares).tolist()]
        digests = {tensor.hf_name: value for tensor, value in zip(self._tensors, sums, strict=True)}
        said: dict[str, Any] = {}
        self._on_engine(lambda client: said.update(client.put_adapter(self._update(version, digests))))
        report = AdapterReport(
            adapter=self.adapter,
            version=version,
            tensors=len(self._tensors),
            nbytes=sum(tensor.nbytes for tensor in self._tensors),
            digest=combine(digests),
            seconds=time.perf_counter() - started,
            engine=said,
        )
        _log.info("adapter %s version %d: %d bytes in %.3f s", self.adapter, version, report.nbytes, report.seconds)
        return report

    def close(self) -> None:
        """Frees the shared memory. The engine keeps the adapter."""
        self._arena.close()

    def _live(self) -> Any:
        return live_adapter_side(self._model, self._base, self._layout, self._group.rank, scaled=True)

    def _ask_engine(self) -> Mapping[str, Any]:
        said: dict[str, Any] = {}
        self._on_engine(lambda client: said.update(client.adapter_info()))
        return self._group.gather_object(said)[0]

    def _on_engine(self, call: Callable[[AdapterClient], Any]) -> None:
        def action() -> None:
            if self._client is None:
                raise SyncError("rank 0 has no engine client: give AdapterSync(client=...) an engine there")
            call(self._client)

        self._group.first_rank_does(action)

    def _shared_arena(self, nbytes: int) -> Arena:
        created: list[Arena] = []
        self._group.first_rank_does(lambda: created.append(Arena.create(nbytes)))
        path = self._group.gather_object(created[0].path if created else None)[0]
        return created[0] if created else Arena.attach(path, nbytes, writable=True)

    def _write(self, index: int, live: Mapping[str, Tensor]) -> int:
        """Writes this rank's rectangles of one factor; returns its share of the digest."""
        tensor, share = self._tensors[index], 0
        target = self._arena.view(self._offsets[index], tensor.shape, tensor.dtype)
        for copy in self._plan.by_hf_name[tensor.hf_name]:
            if copy.source_rank == self._group.rank:
                part = copy.source.of(live[copy.source.name], copy.shape).to(tensor.dtype)
                copy.target.of(target, copy.shape).copy_(part)
                share = add(share, copy_digest(copy, part, tensor))
        return share

    def _update(self, version: int, digests: Mapping[str, int]) -> dict[str, Any]:
        """In plain JSON types, for whatever carries it to the engine."""
        return {
            "adapter": self.adapter,
            "version": version,
            "rank": lora_config_of(self._model).largest_peft_rank,
            "arena_path": self._arena.path,
            "arena_nbytes": self._arena.nbytes,
            "names": [tensor.hf_name for tensor in self._tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in self._tensors],
            "shapes": [list(tensor.shape) for tensor in self._tensors],
            "offsets": self._offsets,
            "digests": [f"{digests[tensor.hf_name]:016x}" for tensor in self._tensors],
        }
