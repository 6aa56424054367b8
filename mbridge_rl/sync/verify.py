"""Do two sides hold the same weights, bit for bit? Asked by digest: a few bytes per tensor, nothing gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import add, contiguous_strides, digest, digest_strided, signed, unsigned
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan, copy_digest
from mbridge_rl.hf.module import HFModule
from mbridge_rl.megatron.parameters import live_side
from mbridge_rl.sync.group import RankGroup

Digests = dict[str, int]


def digests_of_state(spec: ModelSpec, hf_state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Digests:
    """Digest of every HF tensor of a state dict or checkpoint; cast to `dtype` first, if one is given."""
    return {hf_name: digest(hf_state[hf_name] if dtype is None else hf_state[hf_name].to(dtype)) for hf_name in spec.hf_shapes}


def digests_of_module(spec: ModelSpec, module: HFModule, dtype: torch.dtype | None = None) -> Digests:
    """Digest of every HF tensor of a live Transformers module, read where it lies; cast to `dtype` first, if one is given."""
    digests: Digests = {}
    for segment in module.side.segments:
        strides, shape = contiguous_strides(segment.box.size), spec.hf_shapes[segment.hf_name]
        tensor = module[segment.local_name]
        part = tensor.as_strided(segment.box.size, segment.strides, tensor.storage_offset() + segment.offset)
        part = part if dtype is None else part.to(dtype)
        digests[segment.hf_name] = digest_strided(part, columns=shape[-1] if shape else 1, strides=strides)
    return digests


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
    tensors = {tensor.hf_name: tensor for tensor in spec.hf_tensors(dtype)}
    shares = dict.fromkeys(tensors, 0)
    for copy in plan.from_rank(group.rank):
        tensor = tensors[copy.hf_name]
        part = copy.source.of(live[copy.source.name], copy.shape).to(tensor.dtype)
        shares[copy.hf_name] = add(shares[copy.hf_name], copy_digest(copy, part, tensor))
    sums = group.sum(torch.tensor([signed(share) for share in shares.values()], dtype=torch.int64))
    return {hf_name: unsigned(value) for hf_name, value in zip(tensors, sums.tolist(), strict=True)}


def differing(first: Mapping[str, int], second: Mapping[str, int]) -> list[str]:
    """Names of the tensors that are not the same on both sides, or on one side only."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
