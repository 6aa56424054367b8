"""Compares the weights of two sides, bit for bit, by digest: a few bytes per tensor travel, and nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import add, signed, unsigned
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import Copy, Plan, compile_plan, copy_digest
from mbridge_rl.core.segments import Side, hf_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.megatron.parameters import live_side

Digests = dict[str, int]


@torch.no_grad()
def digests_of_side(
    spec: ModelSpec,
    side: Side,
    tensors: Mapping[int, Mapping[str, Tensor]],
    dtypes: Mapping[str, torch.dtype] | None = None,
    group: RankGroup | None = None,
) -> Digests:
    """The digest of every HF tensor that a side holds: a state dict, files, a live module, virtual ranks.

    Args:
        spec: the spec of the model.
        side: the side.
        tensors: `{rank: {local name: tensor}}`; all of them are readable in this process.
        dtypes: the dtypes to which the HF tensors are cast first; `None` leaves them as they are.
        group: the ranks that share the work; all of them must be able to read the side.
    """
    held_names = {segment.hf_name for segment in side.segments}
    target = hf_side(spec)
    target = replace(target, segments=tuple(segment for segment in target.segments if segment.hf_name in held_names))
    plan = compile_plan(spec, side, target)
    if group is None:
        return _digested(spec, plan.copies, plan.hf_shapes, tensors, dtypes)
    names = list(plan.hf_shapes)[group.rank :: group.size]
    with group.fail_together():
        own = _digested(spec, [copy for name in names for copy in plan.by_hf_name[name]], plan.hf_shapes, tensors, dtypes)
    return _summed(own, group)


@torch.no_grad()
def digests_of_model(
    spec: ModelSpec,
    model: Sequence[nn.Module],
    plan: Plan,
    layout: ParallelLayout,
    dtype: torch.dtype,
    group: RankGroup | None = None,
) -> Digests:
    """The digest of every HF tensor that the live ranks hold together, the same on every rank. Each rank digests its own
    rectangles in place, and one all-reduce of 8 bytes per tensor sums them.

    Args:
        spec: the spec of the model.
        model: this rank's model chunks.
        plan: the copies from the ranks of `layout` to HF tensors (`AutoBridge.export_plan`).
        layout: the layout of the model.
        dtype: the dtype to which the tensors are cast before they are digested.
        group: the ranks; by default all ranks.
    """
    group = group or RankGroup()
    live, _ = live_side(model, spec, layout, group.rank)
    shares = _digested(spec, plan.from_rank(group.rank), spec.hf_shapes, {group.rank: live}, spec.hf_dtypes(dtype))
    return _summed(shares, group)


def _digested(
    spec: ModelSpec,
    copies: Iterable[Copy],
    hf_names: Iterable[str],
    tensors: Mapping[int, Mapping[str, Tensor]],
    dtypes: Mapping[str, torch.dtype] | None,
) -> Digests:
    """The share of `copies` in the digest of each of `hf_names`."""
    digests = dict.fromkeys(hf_names, 0)
    for copy in copies:
        part = copy.source.of(tensors[copy.source_rank][copy.source.name], copy.shape)
        part = part if dtypes is None else part.to(dtypes[copy.hf_name])
        tensor = HFTensor(copy.hf_name, part.dtype, spec.hf_shapes[copy.hf_name])
        digests[copy.hf_name] = add(digests[copy.hf_name], copy_digest(copy, part, tensor))
    return digests


def _summed(shares: Digests, group: RankGroup) -> Digests:
    sums = group.sum(torch.tensor([signed(share) for share in shares.values()], dtype=torch.int64))
    return {hf_name: unsigned(value) for hf_name, value in zip(shares, sums.tolist(), strict=True)}


def differing(first: Mapping[str, int], second: Mapping[str, int]) -> list[str]:
    """The names of the tensors that differ between the sides or are on one side only."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
