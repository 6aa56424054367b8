"""Do two sides hold the same weights, bit for bit? Asked by digest: a few bytes per tensor, nothing gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import add, digest, digest_strided, signed, unsigned
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan
from mbridge_rl.megatron.parameters import live_side
from mbridge_rl.sync.group import RankGroup

Digests = dict[str, int]


def digests_of_state(spec: ModelSpec, hf_state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Digests:
    """Digest of every HF tensor of a state dict or checkpoint; cast to `dtype` first, if one is given."""
    return {hf_name: digest(hf_state[hf_name] if dtype is None else hf_state[hf_name].to(dtype)) for hf_name in spec.hf_shapes}


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
    order = {hf_name: index for index, hf_name in enumerate(spec.hf_shapes)}
    shares = [0] * len(order)
    for copy in plan.from_rank(group.rank):
        part = copy.source.of(live[copy.source.name], copy.shape).to(dtype)
        columns = spec.hf_shapes[copy.hf_name][-1] if spec.hf_shapes[copy.hf_name] else 1
        share = digest_strided(part, columns=columns, offset=copy.hf.offset, strides=copy.hf.strides)
        shares[order[copy.hf_name]] = add(shares[order[copy.hf_name]], share)
    sums = group.sum(torch.tensor([signed(share) for share in shares], dtype=torch.int64))
    return {hf_name: unsigned(sums[index].item()) for hf_name, index in order.items()}


def differing(first: Mapping[str, int], second: Mapping[str, int]) -> list[str]:
    """Names of the tensors that are not the same on both sides, or on one side only."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
