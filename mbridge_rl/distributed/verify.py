"""Do two sides hold the same weights, bit for bit? Asked by digest: a few bytes per tensor, nothing gathered."""

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
    """Digest of every HF tensor that a side holds, read where it lies: a state dict, files, a live module, virtual ranks.

    Args:
        tensors: `{rank: {local name: tensor}}`, all of it readable here.
        dtypes: that the HF tensors are cast to first; `None` leaves them as they are.
        group: ranks that all can read the side share the work.
    """
    held = {segment.hf_name for segment in side.segments}
    whole = hf_side(spec)
    plan = compile_plan(spec, side, replace(whole, segments=tuple(seg for seg in whole.segments if seg.hf_name in held)))
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
    """Digest of every HF tensor that the live ranks hold together, the same on every rank: each rank digests its own
    rectangles in place, and one all-reduce of 8 bytes per tensor adds them up.

    Args:
        plan: from the ranks of `layout` to whole HF tensors (`AutoBridge.export_plan`).
        dtype: that the tensors are cast to before they are digested.
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
    """What `copies` contribute to the digest of each of `hf_names`."""
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
    """Names of the tensors that are not the same on both sides, or on one side only."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
