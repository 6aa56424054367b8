"""Resharding moves the weights of a model between ranks to another layout, without files and without gathering them.

Ranks copy what they hold already and send each other the rest, packed, in rounds of bounded size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mbridge_rl.core.buckets import offsets
from mbridge_rl.core.errors import StateMismatchError, SyncError, listed
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Copy, compile_plan
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.core.virtual import allocate
from mbridge_rl.distributed.group import RankGroup

DEFAULT_ROUND_BYTES = 64 << 20


@torch.no_grad()
def reshard(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    source: ParallelLayout,
    target: ParallelLayout,
    *,
    group: RankGroup | None = None,
    round_bytes: int = DEFAULT_ROUND_BYTES,
) -> dict[str, Tensor]:
    """This rank's tensors under `target`, from all ranks' tensors under `source`. All ranks call it together.

    The group needs as many ranks as the larger of the two layouts; ranks beyond a layout hold nothing under it.

    Args:
        spec: the spec of the model.
        tensors: `{megatron_name: tensor}` with global names (`LiveParameters`, `AutoBridge.shard`); dtypes do not change.
        source: the layout of `tensors`.
        target: the new layout.
        group: the ranks; by default all ranks.
        round_bytes: bytes that all ranks together send before they unpack; bounds the extra memory.

    Raises:
        StateMismatchError: on all ranks, if one does not hold the tensors of `source`. SyncError: the group is too small.
    """
    group = group or RankGroup()
    before, after = megatron_side(spec, source), megatron_side(spec, target)
    with group.fail_together():
        if group.size < max(source.world_size, target.world_size):
            raise SyncError(f"resharding from {source} to {target} needs as many ranks, found a group of {group.size}")
        _check(tensors, before.on(group.rank).shapes, group.rank)
    plan = compile_plan(spec, before, after, same_ranks=True)
    dtypes = _hf_dtypes(plan.from_rank(group.rank), tensors, group)
    result = {name: tensor.to(group.device) for name, tensor in allocate(after.on(group.rank), dtypes).items()}
    for name in plan.padded_names.get(group.rank, ()):
        result[name].zero_()
    for copies in _rounds(plan.copies, dtypes, round_bytes):
        _run_round(copies, dtypes, tensors, result, group)
    return result


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], rank: int) -> None:
    if missing_names := shapes.keys() - tensors.keys():
        raise StateMismatchError(f"rank {rank} lacks {listed(missing_names)}, which the source layout says it holds")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise StateMismatchError(
                f"rank {rank}: {name} has shape {list(tensors[name].shape)}, the layout says {list(shape)}"
            )


def _hf_dtypes(copies: Sequence[Copy], tensors: Mapping[str, Tensor], group: RankGroup) -> dict[str, torch.dtype]:
    """The dtypes of all HF tensors, gathered from the ranks that hold them; this is the only handshake."""
    own_dtypes = {copy.hf_name: tensors[copy.source.name].dtype for copy in copies}
    return {hf_name: dtype for dtypes in group.gather_plain(own_dtypes) for hf_name, dtype in dtypes.items()}


def _rounds(copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype], round_bytes: int) -> Iterator[list[Copy]]:
    """Cuts the copies into rounds of about `round_bytes`, which are the same on every rank."""
    current: list[Copy] = []
    nbytes = 0
    for copy in copies:
        current.append(copy)
        nbytes += copy.numel * dtypes[copy.hf_name].itemsize
        if nbytes >= round_bytes:
            yield current
            current, nbytes = [], 0
    if current:
        yield current


def _run_round(
    copies: Sequence[Copy],
    dtypes: Mapping[str, torch.dtype],
    tensors: Mapping[str, Tensor],
    result: Mapping[str, Tensor],
    group: RankGroup,
) -> None:
    outgoing: dict[int, list[Copy]] = defaultdict(list)
    incoming: dict[int, list[Copy]] = defaultdict(list)
    for copy in copies:
        if copy.source_rank == copy.target_rank == group.rank:
            copy.target.of(result[copy.target.name], copy.shape).copy_(_read(copy, tensors))
        elif copy.source_rank == group.rank:
            outgoing[copy.target_rank].append(copy)
        elif copy.target_rank == group.rank:
            incoming[copy.source_rank].append(copy)
    sends = [(_packed(of_peer, dtypes, tensors, group), peer) for peer, of_peer in sorted(outgoing.items())]
    receives = [(_buffer(of_peer, dtypes, group), peer) for peer, of_peer in sorted(incoming.items())]
    group.wait(group.exchange(sends, receives))
    for buffer, peer in receives:
        for copy, rectangle in _rectangles(incoming[peer], dtypes, buffer):
            copy.target.of(result[copy.target.name], copy.shape).copy_(rectangle)


def _read(copy: Copy, tensors: Mapping[str, Tensor]) -> Tensor:
    return copy.source.of(tensors[copy.source.name].detach().contiguous(), copy.shape)


def _packed(
    copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype], tensors: Mapping[str, Tensor], group: RankGroup
) -> Tensor:
    buffer = _buffer(copies, dtypes, group)
    for copy, rectangle in _rectangles(copies, dtypes, buffer):
        rectangle.copy_(_read(copy, tensors))
    return buffer


def _buffer(copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype], group: RankGroup) -> Tensor:
    _, nbytes = offsets(copy.numel * dtypes[copy.hf_name].itemsize for copy in copies)
    return torch.empty(nbytes, dtype=torch.uint8, device=group.device)


def _rectangles(copies: Sequence[Copy], dtypes: Mapping[str, torch.dtype], buffer: Tensor) -> Iterator[tuple[Copy, Tensor]]:
    starts, _ = offsets(copy.numel * dtypes[copy.hf_name].itemsize for copy in copies)
    for copy, start in zip(copies, starts, strict=True):
        dtype = dtypes[copy.hf_name]
        yield copy, buffer[start : start + copy.numel * dtype.itemsize].view(dtype).view(copy.shape)
