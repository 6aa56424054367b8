"""Process groups: from a `ParallelLayout` to Megatron's parallel state, and back."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import Coordinates, ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.versions.config import refuse_unmapped_groups

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=10)

# The rank orders that Megatron-LM itself can use.
_KNOWN_ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")


class _State:
    """The changes that `initialize_parallel` made in this process, so that they can be read and undone."""

    layout: ParallelLayout | None = None
    owns_process_group = False


def initialize_parallel(
    layout: ParallelLayout,
    *,
    backend: str | None = None,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    seed: int = 1234,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> ParallelLayout:
    """Start `torch.distributed` (unless it runs), Megatron's process groups for `layout`, and Megatron's random states.

    Args:
        backend: the backend of a new process group; `None` means nccl with a GPU and gloo without.
        init_method, rank, world_size: settings of a new process group; `None` reads torchrun's environment (`RANK`,
            `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`). A layout of one rank needs neither.
        seed: the seed of dropout and weight initialisation; pipeline stage `s` uses `seed + 100 * s`, as Megatron-LM does.
        timeout: the time-out of every collective (Megatron rounds it up to minutes for its own groups).

    Returns:
        `layout`.

    Raises:
        LayoutError: there are not `layout.world_size` ranks, or Megatron's parallel state exists already. Nothing was started.
    """
    with megatron_runtime():
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            raise LayoutError("Megatron's parallel state is initialised already: call destroy_parallel() first")
        rank, world_size = _rank_and_world_size(layout, rank, world_size)
        if world_size != layout.world_size:
            raise LayoutError(f"{layout} needs {layout.world_size} ranks, found a world of {world_size} (this is rank {rank})")
        layout.coordinates(rank)  # raises LayoutError for an impossible rank order
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        if not dist.is_initialized():
            _start_process_group(backend, init_method, rank, world_size, timeout)
            _State.owns_process_group = True
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            distributed_timeout_minutes=max(1, math.ceil(timeout.total_seconds() / 60)),
            order=layout.order,
            **_embedding_ranks(layout),
        )
    seed_random_states(seed)
    _State.layout = layout
    return layout


def seed_random_states(seed: int) -> None:
    """Seeds torch's and Megatron's random states of this rank, as Megatron-LM does."""
    with megatron_runtime():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(stage_seed)
        model_parallel_cuda_manual_seed(stage_seed)


def _embedding_ranks(layout: ParallelLayout) -> dict[str, Any]:
    """The argument that tells Megatron which ranks hold copies of the embedding, where the layout places multi-token prediction
    layers: their stage has a copy, and the last stage does not. Otherwise empty, for Megatron's default, first and last
        stage."""
    if layout.pp == 1 or not any(layout.stage_mtp_layers or ()):
        return {}
    stages = sorted({0, layout.mtp_stage % layout.pp})
    return {"get_embedding_ranks": lambda ranks: [ranks[stage] for stage in stages]}


def _rank_and_world_size(layout: ParallelLayout, rank: int | None, world_size: int | None) -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    alone = layout.world_size == 1
    return _from_environment("RANK", rank, 0 if alone else None), _from_environment(
        "WORLD_SIZE", world_size, 1 if alone else None
    )


def _from_environment(name: str, given: int | None, default: int | None) -> int:
    if given is not None:
        return given
    value = os.environ.get(name)
    if value is not None:
        return int(value)
    if default is None:
        raise LayoutError(
            f"{name} is not set and torch.distributed is not initialised: start with torchrun, or pass "
            f"rank, world_size and init_method"
        )
    return default


def _start_process_group(backend: str | None, init_method: str | None, rank: int, world_size: int, timeout: timedelta) -> None:
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    rendezvous: dict[str, Any] = {"init_method": init_method}
    if init_method is None and world_size == 1 and "MASTER_ADDR" not in os.environ:
        rendezvous = {"store": dist.HashStore()}
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **rendezvous)
    _log.debug("rank %d of %d: %s process group is up", rank, world_size, backend)


def current_layout(spec_num_layers: int | None = None, stage_layers: tuple[int, ...] | None = None) -> ParallelLayout:
    """The layout of the running parallel state, even if another library initialised it.

    Args:
        spec_num_layers: if given, the layout is also checked against a model of so many decoder layers.
        stage_layers: the uneven split of layers, which Megatron's parallel state does not know; `None` means the split that
            `initialize_parallel` was given, or an even split.

    Raises:
        LayoutError: there is no parallel state, Megatron-LM does not use its rank order, or the layers do not divide.
    """
    with megatron_runtime():
        from megatron.core import parallel_state as state

        if not state.model_parallel_is_initialized():
            raise LayoutError("Megatron's parallel state is not initialised: call initialize_parallel(layout)")
        refuse_unmapped_groups(state)
        sizes, groups, known = _sizes(state), _groups(state), _State.layout
        layout = known if known is not None and _describes(known, sizes, groups) else _layout_of(sizes, groups)
    if stage_layers is not None:
        layout = layout.dealing_as(ParallelLayout(pp=layout.pp, vpp=layout.vpp, stage_layers=stage_layers))
    if spec_num_layers is not None:
        layout.layers_of_stages(spec_num_layers)
    return layout


def layout_of_groups(groups: Mapping[str, dist.ProcessGroup], vpp: int) -> ParallelLayout:
    """The layout of process groups by axis, of which those of expert and data parallelism may be missing.

    Args:
        groups: this rank's groups; expert axes that are missing are not parallel, and `dp` takes the remaining factor.
        vpp: number of virtual pipeline stages.

    Raises:
        LayoutError: the groups have a rank order that Megatron-LM does not use.
    """
    sizes = {axis: group.size() for axis, group in groups.items()}
    others = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1)
    return _layout_of({"dp": dist.get_world_size() // others, **sizes, "vpp": vpp}, groups)


def _layout_of(sizes: Mapping[str, int], groups: Mapping[str, dist.ProcessGroup]) -> ParallelLayout:
    """The layout of these sizes whose arithmetic gives this rank's groups."""
    for order in _KNOWN_ORDERS:
        if _describes(layout := ParallelLayout(**sizes, order=order), sizes, groups):
            return layout
    raise LayoutError(
        f"the running parallel state ({ParallelLayout(**sizes)}) has a rank order other than {_KNOWN_ORDERS}; "
        "initialise with initialize_parallel(layout) instead, or pass the layout to every function that takes one"
    )


def _sizes(state: Any) -> dict[str, int]:
    return {
        "tp": state.get_tensor_model_parallel_world_size(),
        "pp": state.get_pipeline_model_parallel_world_size(),
        "vpp": state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "ep": state.get_expert_model_parallel_world_size(),
        "etp": state.get_expert_tensor_parallel_world_size(),
        "cp": state.get_context_parallel_world_size(),
        "dp": state.get_data_parallel_world_size(),
    }


def _groups(state: Any) -> dict[str, dist.ProcessGroup]:
    return {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "etp": state.get_expert_tensor_parallel_group(),
    }


def _describes(layout: ParallelLayout, sizes: Mapping[str, int], groups: Mapping[str, dist.ProcessGroup]) -> bool:
    """Whether the layout's arithmetic gives these sizes and this rank's groups."""
    if any(getattr(layout, axis) != size for axis, size in sizes.items()):
        return False
    dense, expert = ("tp", "cp", "dp", "pp"), ("etp", "ep", "expert_dp", "pp")
    everywhere = [layout.coordinates(rank) for rank in range(layout.world_size)]
    own = everywhere[dist.get_rank()]
    return all(
        dist.get_process_group_ranks(group) == _peers(everywhere, own, axis, dense if axis in dense else expert)
        for axis, group in groups.items()
    )


def _peers(everywhere: list[Coordinates], own: Coordinates, axis: str, axes: tuple[str, ...]) -> list[int]:
    """The ranks that differ from `own` only along `axis`."""
    others = [other for other in axes if other != axis]
    return [
        rank for rank, place in enumerate(everywhere) if all(getattr(place, other) == getattr(own, other) for other in others)
    ]


def destroy_parallel() -> None:
    """Undo `initialize_parallel`: Megatron's groups, and `torch.distributed` if it was started there. A second call does
    nothing."""
    with megatron_runtime():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if _State.owns_process_group and dist.is_initialized():
        dist.destroy_process_group()
    _State.layout, _State.owns_process_group = None, False
