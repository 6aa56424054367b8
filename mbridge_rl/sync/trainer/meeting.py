"""The meeting of trainer ranks and engines: the workers describe their parameters, every rank compiles the same plan, and a
transport is chosen.

`meet` runs once per WeightSync and returns a `Meeting`: what every sync sends, and the introduction that the workers get.
`connect` runs whenever the engines change and returns a `Connection`: the transport to the engines that take part now.
"""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.quantize import quantized_spec
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.distributed.arena import SHARED_MEMORY
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.megatron.parameters import LiveParameters, layout_of, model_dtype
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.sync.payload.compatibility import config_summary
from mbridge_rl.sync.payload.engine_side import engine_side, local_dtypes
from mbridge_rl.sync.payload.message_codec import decode, encode
from mbridge_rl.sync.payload.messages import Announcement, Introduction, WorkerDescription
from mbridge_rl.sync.payload.route import Route, plan_route
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.engines import Engines
from mbridge_rl.sync.transports import Context, Transport, open_transport
from mbridge_rl.sync.transports.waiting import Timeout

_log = logging.getLogger(__name__)

ON_ONE_HOST = ("shared_memory", "cuda_ipc")
"""The transports that reach only engines on the trainer's host."""


@dataclass(frozen=True)
class Meeting:
    """What trainer ranks and engines agreed on; it holds for every sync.

    Attributes:
        spec: the spec of the tensors that travel: the model's spec, or that of its quantized checkpoint.
        layout: the parallel layout of the trainer.
        hf_dtypes: the dtypes of the tensors that travel, by `hf_name`.
        route: what every engine worker receives from which rank.
        introduction: what the engines adopt.
        hosts: machine ids of all engine workers at the time of the meeting.
        replicas: number of engines at the time of the meeting.
    """

    spec: ModelSpec
    layout: ParallelLayout
    hf_dtypes: Mapping[str, torch.dtype]
    route: Route
    introduction: Introduction
    hosts: frozenset[str]
    replicas: int


@dataclass(frozen=True)
class Connection:
    """The open transport to the engines that take part now.

    Attributes:
        name: the name of the transport.
        transport: this rank's end of the transport.
        replicas: number of engines.
    """

    name: str
    transport: Transport
    replicas: int


def meet(
    bridge: AutoBridge,
    model: Sequence[nn.Module],
    engines: Engines,
    group: RankGroup,
    options: SyncOptions,
    dtype: torch.dtype | None,
) -> Meeting:
    """Plans what every sync sends and introduces the trainer to the engines. All ranks call it together. No weight is changed.

    Raises:
        SyncError: the ranks disagree, or there is no engine. EngineMismatch: an engine's model is not the bridge's.
            PlanError: the trainer does not hold something that a worker needs.
    """
    spec = bridge.spec if options.quantization is None else quantized_spec(bridge.spec, options.quantization)
    layout, dtype = layout_of(model, bridge.spec), dtype or model_dtype(model)
    _require_same((spec.fingerprint, layout, str(dtype), options), group)
    summary = config_summary(bridge.hf_config, tied=spec.tied_embeddings)
    announcement = Announcement.of(spec.hf_tensors(dtype), summary, spec.optional_hf_names)
    descriptions = decode(group.on_first_rank(lambda: encode(_described(engines, announcement))))
    workers = descriptions[0]
    _warn_of_tensors_that_go_unsplit(workers)
    route = _planned(spec, layout, spec.hf_dtypes(dtype), workers, options.bucket_bytes, group)
    introduction = Introduction(
        routes=route.workers,
        fingerprint=route.fingerprint,
        verify=options.verify,
        workers=tuple(workers),
        announcement=announcement,
        model=spec.fingerprint,
    )
    group.first_rank_does(lambda: engines.adopt(introduction))
    hosts = frozenset(worker.host for engine in descriptions for worker in engine)
    return Meeting(spec, layout, spec.hf_dtypes(dtype), route, introduction, hosts, len(descriptions))


def connect(
    meeting: Meeting,
    model: Sequence[nn.Module],
    store: WeightStore,
    group: RankGroup,
    options: SyncOptions,
    *,
    engine_hosts: AbstractSet[str],
    replicas: int,
) -> Connection:
    """Opens the transport that the options choose for engines on `engine_hosts`. All ranks call it together.

    Raises:
        SyncError: the transport does not reach these hosts.
    """
    hosts = set(group.gather_plain(machine_id())) | engine_hosts
    name = options.transport
    if name == "auto":
        name = "shared_memory" if len(hosts) == 1 else "process_group"
    if name in ON_ONE_HOST and len(hosts) > 1:
        raise SyncError(f"the transport {name!r} needs one host, found {sorted(hosts)}; use 'process_group'")
    live = LiveParameters(model, 0)
    device = next((live.stored(name).device for name in live), group.device)
    context = Context(group, meeting.route, replicas, store, Timeout(options.timeout), options.url, device)
    staged_here = name == "shared_memory" and options.mode == "staged" and not options.delta
    transport = open_transport("store" if staged_here else name, context, one_host=len(hosts) == 1)
    return Connection(name, transport, replicas)


def held_store(options: SyncOptions, group: RankGroup) -> WeightStore:
    """The weight store of this host, locked: from here on no other trainer writes to it. All ranks call it together.

    Raises:
        StoreError: on all ranks, if another trainer writes to it.
    """
    name = group.share_plain(options.store or WeightStore.unnamed().name)
    store = WeightStore(name, SHARED_MEMORY, temporary=options.store is None)
    group.first_rank_does(store.hold)
    return store


def _described(engines: Engines, announcement: Announcement) -> list[Sequence[WorkerDescription]]:
    if not engines.all:
        raise SyncError("rank 0 has no engine client: give WeightSync(client=...) an engine there")
    return engines.describe(announcement)


def _warn_of_tensors_that_go_unsplit(workers: Sequence[WorkerDescription]) -> None:
    reasons = {hf_name: reason for worker in workers for hf_name, reason in worker.unsplit.items()}
    for hf_name, reason in reasons.items():
        _log.warning("%s goes unsplit to every worker that keeps some of it: %s", hf_name, reason)


def _planned(
    spec: ModelSpec,
    layout: ParallelLayout,
    hf_dtypes: Mapping[str, torch.dtype],
    workers: Sequence[WorkerDescription],
    bucket_bytes: int,
    group: RankGroup,
) -> Route:
    with group.fail_together():
        plan = compile_plan(spec, megatron_side(spec, layout), engine_side(spec, workers, hf_dtypes))
        route = plan_route(plan, [worker.rank for worker in workers], local_dtypes(workers, hf_dtypes), bucket_bytes)
    if not group.all_same(zlib.crc32((route.fingerprint + plan.fingerprint).encode()) % (1 << 20)):
        raise SyncError("trainer ranks compiled different plans: do they run the same version of mbridge_rl?")
    return route


def _require_same(values: tuple[Any, ...], group: RankGroup) -> None:
    values_by_rank = group.gather_plain(tuple(map(str, values)))
    for rank, own_values in enumerate(values_by_rank):
        if own_values != values_by_rank[0]:
            raise SyncError(
                f"rank {rank} brings {own_values}, rank 0 {values_by_rank[0]}: give every rank the same model, layout, dtype "
                "and options"
            )


@cache
def session_of(pid: int) -> str:
    """The name of this trainer for the stores that engine workers fill on their own hosts (`writer_lock`). It is the same for
    all syncs of a process, because an engine that takes no part in the next sync keeps its lock; it depends on the pid, because
    a forked process is another trainer."""
    return secrets.token_hex(16)
