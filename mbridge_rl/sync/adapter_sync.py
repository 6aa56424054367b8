"""Adapter sync: only LoRA factors travel, from their shards in Megatron straight into engines' LoRA slots.

Every trainer rank writes the rectangles of factors that it holds into shared memory, in PEFT's layout. One small all-reduce
sums their digests and is the barrier after which all are written. Ranks of several machines sum the bytes as well, and an
engine on another machine than the first rank's gets the bytes with the call. An engine checks every byte before it changes a
slot, and reads the slot back afterwards.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.buckets import offsets
from mbridge_rl.core.digest import add, combine, signed, unsigned
from mbridge_rl.core.errors import EngineMismatch, SyncError
from mbridge_rl.core.finite import require_finite
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan, copy_digest
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.distributed.host_memory import shared_arena
from mbridge_rl.megatron.lora.adapter_side import LiveAdapters, live_adapter_side, lora_config_of
from mbridge_rl.megatron.parameters import layout_of
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterSlotsInfo, AdapterUpdate
from mbridge_rl.sync.payload.message_codec import dtype_of
from mbridge_rl.sync.record import phases
from mbridge_rl.sync.record.report import EngineOutcome, SyncReport
from mbridge_rl.sync.record.sinks import Sink
from mbridge_rl.sync.record.timeline import Span, Stopwatch, of_engine
from mbridge_rl.sync.trainer.engines import Engines, outcomes_of
from mbridge_rl.sync.trainer.retries import with_retries

_log = logging.getLogger(__name__)

_WORD = torch.int64.itemsize


class AdapterClient(Protocol):
    """The methods that an adapter sync calls on an engine; every engine class has them (`vllm.lora.adaptable_engine`)."""

    def adapter_info(self) -> AdapterSlotsInfo: ...
    def put_adapter(self, update: AdapterUpdate) -> AdapterReport: ...


class AdaptedEngine:
    """An engine that answers with one of its adapters, for a caller that does not know of adapters.

    Args:
        engine: an engine of any kind.
        adapter: the name of the adapter.
    """

    def __init__(self, engine: Any, adapter: str = "policy") -> None:
        self._engine, self.adapter = engine, adapter

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """As `InProcessEngine.generate`; a completion's `weight_version` is the version of the adapter."""
        completions = self._engine.generate(prompts, adapter=self.adapter, **options)
        return [replace(completion, weight_version=int(completion.adapter.rpartition("@")[2])) for completion in completions]


class _Committed(NamedTuple):
    """The results of an attempt that committed.

    Attributes:
        digest: the digest of all factors.
        outcomes: the outcome of every engine.
        engine_reports: the reports of the engines that committed, on rank 0 (empty elsewhere).
        other_spans: the time spans of the other ranks and of the engines.
    """

    digest: str
    outcomes: Sequence[EngineOutcome]
    engine_reports: Sequence[AdapterReport]
    other_spans: Sequence[Span]


class AdapterSync:
    """Keeps one adapter in engines equal to the adapter of a live Megatron model. All trainer ranks make it together, once;
    `sync` is collective.

    Args:
        bridge: the bridge of the model (`AutoBridge`).
        model: this rank's model chunks, with adapters (`megatron.lora.attach.add_lora`).
        client: the engine, or several, started with `enable_lora=True` on the model's base weights, on rank 0; `None` on the
            other ranks.
        adapter: the name of the adapter in the engines.
        is_policy: whether the adapter's versions are the engine's own, with which tokens are labelled; for engines that sample
            only from this adapter.
        options: only `requests`, `timeout`, `retries` and `nonfinite` are used. An adapter is always staged and verified.
        sinks: get the report of every sync from rank 0, as for `WeightSync`.

    Raises:
        StateMismatchError: on all ranks: the model has no adapters. SyncError: rank 0 has no engine. EngineMismatch: an engine
            takes no adapters, or none of this LoRA rank, or the engines' slots are of different dtypes.
    """

    def __init__(
        self,
        bridge: AutoBridge,
        model: Sequence[nn.Module],
        client: AdapterClient | Sequence[AdapterClient] | None,
        adapter: str = "policy",
        *,
        is_policy: bool = False,
        options: SyncOptions | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.adapter, self._is_policy, self.options = adapter, is_policy, options or SyncOptions()
        self._model, self._base = model, bridge.spec
        self._group = RankGroup()
        self._sinks = sinks if self._group.rank == 0 else ()
        self._engines = Engines(client if isinstance(client, Sequence) else [] if client is None else [client])  # type: ignore[arg-type,list-item]
        with self._group.fail_together():
            if lora_config_of(model).dora:
                raise EngineMismatch("vLLM has no DoRA: start the engine without LoRA and sync merged weights (WeightSync)")
            self._layout = layout_of(model, bridge.spec)
            _, self._spec, _ = self._live()
            self._plan = compile_plan(self._spec, megatron_side(self._spec, self._layout), hf_side(self._spec))
        dtype, self._is_local = self._ask_engines()
        self._tensors = list(self._spec.hf_tensors(dtype))
        self._offsets, nbytes = offsets(tensor.nbytes for tensor in self._tensors)
        self._shares_memory = self._group.on_one_machine
        self._arena = self._make_arena(nbytes + -nbytes % _WORD)
        self._full_nbytes = sum(tensor.nbytes for tensor in bridge.spec.hf_tensors(dtype))

    def sync(self, version: int) -> SyncReport:
        """Moves the live factors into the engines and commits them as `version`.

        Returns:
            The same report on every rank (`engines` only on rank 0).

        Raises:
            SyncError: on every rank, if a step failed on any rank, or the commit of every engine failed; the engines then serve
                the version before. If only some engines fail to commit, the others serve the new version, and the report names
                the failed ones.
        """
        return with_retries(
            version,
            lambda watch, _: self._attempt(version, watch),
            partial(self._report, version),
            lane=phases.lane(self._group.rank),
            retries=self.options.retries,
            sinks=self._sinks,
        )

    def close(self) -> None:
        """Frees the shared memory. The engines keep the adapter."""
        self._arena.close()
        self._engines.close()

    def _live(self) -> tuple[LiveAdapters, ModelSpec, Side]:
        return live_adapter_side(self._model, self._base, self._layout, self._group.rank, scaled=True)

    def _ask_engines(self) -> tuple[torch.dtype, list[bool]]:
        """The dtype of the slots, and whether each engine can map the first rank's memory."""

        def ask() -> tuple[str, list[str]]:
            if not self._engines.all:
                raise SyncError("rank 0 has no engine client: give AdapterSync(client=...) an engine there")
            infos: list[AdapterSlotsInfo] = self._engines.each(lambda _, engine: engine.adapter_info())
            dtypes = {info.dtype for info in infos}
            if len(dtypes) > 1:
                raise EngineMismatch(f"the engines' LoRA slots are of different dtypes: {sorted(dtypes)}")
            return infos[0].dtype, [info.host for info in infos]

        dtype, hosts = self._group.on_first_rank(ask)
        return dtype_of(dtype), [host == machine_id() for host in hosts]

    def _make_arena(self, nbytes: int) -> Arena:
        """One arena for all ranks, or one for each rank if they are not on one machine."""
        if not self._shares_memory:
            with self._group.fail_together():
                return Arena.create(nbytes)
        return shared_arena(self._group, nbytes)

    def _attempt(self, version: int, watch: Stopwatch) -> _Committed:
        with watch("check"), self._group.fail_together():
            live, _, _ = self._live()
            if self.options.nonfinite == "refuse":
                require_finite(live, self._group.rank)
        with watch("transfer"):
            with watch("pack"), self._group.fail_together():
                shares = self._write(live)
            with watch("wire"):
                self._sum_arenas()
        with watch("verify"):
            sums = [unsigned(value) for value in self._group.sum(torch.tensor(shares)).tolist()]
            digests = {tensor.hf_name: value for tensor, value in zip(self._tensors, sums, strict=True)}
        with watch("commit"):
            outcomes, reports = self._put(self._update(version, digests))
        with watch("report"):
            other_spans = phases.of_other_ranks(watch.spans, self._group)
        committed = [outcome.engine for outcome in outcomes if outcome.error is None]
        for index, report in zip(committed, reports, strict=False):  # there are reports on rank 0 only
            other_spans += of_engine(report.spans, index)
        return _Committed(combine(digests), outcomes, reports, other_spans)

    def _write(self, live: Mapping[str, Tensor]) -> list[int]:
        """Writes this rank's rectangles of all factors; returns its share of each factor's digest."""
        if not self._shares_memory:  # the factors of other ranks are zero here, so that arenas can be summed
            self._arena.view(0, (self._arena.nbytes,), torch.uint8).zero_()
        return [signed(self._write_factor(index, live)) for index in range(len(self._tensors))]

    def _write_factor(self, index: int, live: Mapping[str, Tensor]) -> int:
        tensor, share = self._tensors[index], 0
        target = self._arena.view(self._offsets[index], tensor.shape, tensor.dtype)
        for copy in self._plan.by_hf_name[tensor.hf_name]:
            if copy.source_rank == self._group.rank:
                part = copy.source.of(live[copy.source.name], copy.shape).to(tensor.dtype)
                copy.target.of(target, copy.shape).copy_(part)
                share = add(share, copy_digest(copy, part, tensor))
        return share

    def _sum_arenas(self) -> None:
        """Sums the arenas of ranks that share no memory: every byte was written by one rank and is zero on the others."""
        if not self._shares_memory:
            words = self._arena.view(0, (self._arena.nbytes // _WORD,), torch.int64)
            words.copy_(self._group.sum(words.clone()))

    def _put(self, update: AdapterUpdate) -> tuple[Sequence[EngineOutcome], list[AdapterReport]]:
        """Commits `update` in every engine. Returns the outcome of every engine on all ranks, and the reports of the engines
        that committed on rank 0."""

        def put(index: int, engine: AdapterClient) -> AdapterReport:
            watch = Stopwatch("engine")
            with watch("pause"):  # with the time of the call itself
                report = engine.put_adapter(update if self._is_local[index] else self._with_content(update))
            return replace(report, spans=tuple(watch.spans))

        version = update.version
        outcomes, reports = outcomes_of(
            self._group, version, len(self._is_local), lambda: self._engines.each_alone(version, put)
        )
        for outcome in outcomes:
            if outcome.error is not None:
                _log.warning("engine %d stays at its version before %d: %s", outcome.engine, version, outcome.error)
        return outcomes, reports

    def _report(
        self, version: int, watches: Sequence[Stopwatch], committed: _Committed | None = None, error: str = ""
    ) -> SyncReport:
        """The report of a sync whose last attempt ended just now; `committed` is `None` if that failed with `error`."""
        own_spans = [span for watch in watches for span in watch.spans]
        reports = [] if committed is None else committed.engine_reports
        return SyncReport(
            version=version,
            adapter=self.adapter,
            tensors=len(self._tensors),
            nbytes=sum(tensor.nbytes for tensor in self._tensors),
            full_nbytes=self._full_nbytes,
            buckets=1,
            digest=None if committed is None else committed.digest,
            verified=not error,
            seconds=watches[-1].now() - watches[0].created,
            transport="shared_memory",
            attempts=len(watches),
            engines=[report.to_record() for report in reports],
            outcomes=[] if committed is None else committed.outcomes,
            error=error,
            started=watches[0].created,
            rank=self._group.rank,
            spans=own_spans if committed is None else [*own_spans, *committed.other_spans],
        )

    def _update(self, version: int, digests: Mapping[str, int]) -> AdapterUpdate:
        return AdapterUpdate(
            adapter=self.adapter,
            version=version,
            is_policy=self._is_policy,
            requests=self.options.requests,
            timeout=self.options.timeout,
            rank=lora_config_of(self._model).largest_peft_rank,
            tensors=tuple(self._tensors),
            offsets=tuple(self._offsets),
            digests=tuple(f"{digests[tensor.hf_name]:016x}" for tensor in self._tensors),
            arena_path=self._arena.path,
            arena_bytes=self._arena.nbytes,
        )

    def _with_content(self, update: AdapterUpdate) -> AdapterUpdate:
        """The update with the bytes of the factors, for an engine that cannot map this machine's memory."""
        content = self._arena.view(0, (self._arena.nbytes,), torch.uint8).numpy().tobytes()
        return replace(update, content=base64.b64encode(content).decode())
