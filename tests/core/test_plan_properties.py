"""Properties of plans over random models, layouts and pairs of layouts, on virtual ranks."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import layouts, models, random_state, shared_key_value

from mbridge_rl.core import virtual
from mbridge_rl.core.digest import add, digest
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan, copy_digest
from mbridge_rl.core.segments import Side, hf_side, megatron_side

Ranks = dict[int, dict[str, torch.Tensor]]
NIGHTLY = "MBRIDGE_SEEDS" in os.environ
pytestmark = [pytest.mark.nightly] if NIGHTLY else []  # there is more of these at night
_DIGESTED = 6  # tensors of a case, chosen at random


class Case(NamedTuple):
    """A model, two layouts of it, and what decides between equals."""

    spec: ModelSpec
    first: ParallelLayout
    second: ParallelLayout
    same_ranks: bool
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spec = draw(models())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Case(spec, draw(layouts(spec)), draw(layouts(spec)), draw(st.booleans()), dtype, draw(st.integers(0, 1 << 16)))


class Filled(NamedTuple):
    """Tensors of all ranks, laid out one after the other in `flat`."""

    flat: torch.Tensor
    ranks: Ranks


def moved(plan: Plan, source: Ranks, target: Side) -> Filled:
    """Runs the plan into fresh tensors and checks that it writes each of their elements once."""
    local_tensors = [(rank, name, shape) for name, shape in target.shapes.items() for rank in target.holders[name]]
    sizes = [prod(shape) for _, _, shape in local_tensors]
    flat = torch.full((sum(sizes),), float("nan"))
    ranks: Ranks = {rank: {} for rank in target.ranks}
    for (rank, name, shape), tensor in zip(local_tensors, flat.split(sizes), strict=True):
        ranks[rank][name] = tensor.view(shape)
    virtual.run(plan, source, ranks)
    written: Counter[tuple[int, str]] = Counter()
    for copy in plan.copies:
        written[copy.target_rank, copy.target.name] += copy.numel
    # As many elements were written as there are, and none was missed: each was written once. Padding is 0, weights are not.
    assert not flat.isnan().any()
    for (rank, name, _), size in zip(local_tensors, sizes, strict=True):
        assert written[rank, name] == (ranks[rank][name].count_nonzero() if name in target.padded_names else size)
    return Filled(flat, ranks)


@pytest.mark.slow
@settings(
    max_examples=2000 if NIGHTLY else 700,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases())
def test_plans_between_random_sides(case: Case) -> None:
    """Import and export give the state back, each target byte is written once, each needed source byte is read once, resharding
    equals importing anew, digests of parts add up, a rank alone plans what all plan for it, and holders share the work."""
    spec, checkpoint = case.spec, hf_side(case.spec)
    before, after = megatron_side(spec, case.first), megatron_side(spec, case.second)
    state = random_state(spec)
    imported, exported = compile_plan(spec, checkpoint, before), compile_plan(spec, before, checkpoint)
    shards = moved(imported, {0: state}, before).ranks
    back = moved(exported, shards, checkpoint)
    assert torch.equal(back.flat, torch.cat([tensor.flatten() for tensor in state.values()]))
    resharded = moved(compile_plan(spec, before, after, same_ranks=case.same_ranks), shards, after)
    assert torch.equal(resharded.flat, moved(compile_plan(spec, checkpoint, after), {0: state}, after).flat)
    check_reads(spec, exported)
    check_digests(case, exported, shards, state)
    check_one_rank(case, imported)
    check_balance(case.first, before, exported)


def check_reads(spec: ModelSpec, exported: Plan) -> None:
    """However many ranks hold an element, one of them is asked for it, once."""
    elements = Counter({hf_name: prod(shape) for hf_name, shape in spec.hf_shapes.items()})
    read: Counter[str] = Counter()
    for copy in exported.copies:
        read[copy.hf_name] += copy.numel
    assert read == elements


def check_digests(case: Case, plan: Plan, shards: Ranks, state: dict[str, torch.Tensor]) -> None:
    names = list(plan.by_hf_name)
    for hf_name in names[case.seed % len(names) :][:_DIGESTED]:
        tensor = HFTensor(hf_name, case.dtype, case.spec.hf_shapes[hf_name])
        parts = [
            copy_digest(copy, copy.source.of(shards[copy.source_rank][copy.source.name], copy.shape).to(case.dtype), tensor)
            for copy in plan.by_hf_name[hf_name]
        ]
        assert add(*parts) == digest(state[hf_name].to(case.dtype))


def check_one_rank(case: Case, plan_of_all: Plan) -> None:
    rank = case.seed % case.first.world_size
    alone = compile_plan(case.spec, hf_side(case.spec), megatron_side(case.spec, case.first, rank))
    assert list(alone.copies) == [copy for copy in plan_of_all.copies if copy.target_rank == rank]


def check_balance(layout: ParallelLayout, sharded: Side, exported: Plan) -> None:
    """Nobody sends more than the mean by more than the largest piece that cannot be cut. What only one rank holds is its own
    fate: layouts are judged where every tensor has several holders."""
    if min(len(segment.ranks) for segment in sharded.segments) < 2 or layout.pp > 1 or layout.ep > 1:
        return
    load = [sum(copy.numel for copy in exported.from_rank(rank)) for rank in range(layout.world_size)]
    assert max(load) <= sum(load) / len(load) + max(copy.numel for copy in exported.copies)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), data=st.data())
def test_a_range_of_a_local_tensor_is_a_few_boxes(case: Case, data: st.DataObject) -> None:
    """A rank of the distributed optimizer holds the elements `[begin, stop)` of a flattened parameter."""
    side = megatron_side(case.spec, case.first, 0)
    for segment in side.segments[:: max(1, len(side.segments) // 5)]:
        shape = side.shapes[segment.local_name]
        local = torch.arange(prod(shape))
        begin = data.draw(st.integers(0, prod(shape)))
        stop = data.draw(st.integers(begin, prod(shape)))
        view_of_segment = local.as_strided(segment.box.size, segment.strides, segment.offset)
        pieces, indices = list(segment.within(begin, stop)), []
        for piece in pieces:
            cut = tuple(
                slice(at - first, at - first + size)
                for at, first, size in zip(piece.box.start, segment.box.start, piece.box.size, strict=True)
            )
            view = local.as_strided(piece.box.size, piece.strides, piece.offset)
            assert torch.equal(view, view_of_segment[cut])
            indices += view.flatten().tolist()
        assert sorted(indices) == sorted(index for index in view_of_segment.flatten().tolist() if begin <= index < stop)
        assert len(pieces) <= 2 * len(segment.box.size)


@pytest.mark.parametrize("tp", [2, 4])
def test_keys_that_are_values_may_be_cut_inside_of_a_group(tp: int) -> None:
    """The boxes of different ranks then overlap without being equal; each element still has one sender."""
    spec = ModelSpec("Shared", 1, 3, False, {}, {}, tuple(shared_key_value(hidden=3, kv_heads=1, queries=1, head_dim=4)))
    checkpoint, sharded = hf_side(spec), megatron_side(spec, ParallelLayout(tp=tp))
    state = random_state(spec)
    shards = moved(compile_plan(spec, checkpoint, sharded), {0: state}, sharded).ranks
    exported = compile_plan(spec, sharded, checkpoint)
    check_reads(spec, exported)
    assert torch.equal(moved(exported, shards, checkpoint).flat, torch.cat([tensor.flatten() for tensor in state.values()]))
