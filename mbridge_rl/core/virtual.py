"""Executes plans without processes: ranks are dictionaries of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.plan import Plan
from mbridge_rl.core.segments import Side


def run(plan: Plan, sources: Mapping[int, Mapping[str, Tensor]], targets: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Runs `plan` in place on `{rank: {local name: tensor}}`; target tensors are contiguous and already allocated."""
    for rank, names in plan.padded_names.items():
        for name in names:
            targets[rank][name].zero_()
    for copy in plan.copies:
        source = copy.source.of(sources[copy.source_rank][copy.source.name], copy.shape)
        copy.target.of(targets[copy.target_rank][copy.target.name], copy.shape).copy_(source)


def allocate(side: Side, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Uninitialised tensors for a side; each has the dtype of the HF tensors of which it is composed."""
    hf_name_of = {segment.local_name: segment.hf_name for segment in side.segments if not segment.repeats}
    fallback = next(iter(dtypes.values()), torch.get_default_dtype())
    return {
        name: torch.empty(shape, dtype=dtypes[hf_name_of[name]] if name in hf_name_of else fallback)
        for name, shape in side.shapes.items()
    }


def check(shards: Mapping[int, Mapping[str, Tensor]], sides: Mapping[int, Side]) -> None:
    """Raises StateMismatchError if `{rank: {local name: tensor}}` differs from the sides of these ranks in names or shapes."""
    if shards.keys() != sides.keys():
        raise StateMismatchError(f"the layout has ranks 0..{len(sides) - 1}, the shards are of ranks {sorted(shards)}")
    for rank, side in sides.items():
        missing, extra = side.shapes.keys() - shards[rank].keys(), shards[rank].keys() - side.shapes.keys()
        if missing or extra:
            raise StateMismatchError(f"rank {rank}: missing [{listed(missing)}], unexpected [{listed(extra)}]")
        for name, shape in side.shapes.items():
            if tuple(shards[rank][name].shape) != shape:
                raise StateMismatchError(
                    f"rank {rank}: {name} has shape {list(shards[rank][name].shape)}, the layout says {list(shape)}"
                )
