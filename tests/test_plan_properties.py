"""Properties of plans over random models, layouts and pairs of layouts, on virtual ranks."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import layouts, models, random_state

from mbridge_rl.core import virtual
from mbridge_rl.core.digest import add, digest, digest_strided
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side

many = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
Ranks = dict[int, dict[str, torch.Tensor]]


def allocated(spec: ModelSpec, side: Side, value: float) -> Ranks:
    dtypes = dict.fromkeys(spec.hf_shapes, torch.float32)
    ranks = {rank: virtual.allocate(side.on(rank), dtypes) for rank in side.ranks}
    for tensors in ranks.values():
        for tensor in tensors.values():
            tensor.fill_(value)
    return ranks


def moved(spec: ModelSpec, plan: Plan, source: Ranks, target: Side) -> Ranks:
    ranks = allocated(spec, target, float("nan"))
    virtual.run(plan, source, ranks)
    return ranks


def writes(spec: ModelSpec, plan: Plan, target: Side) -> Ranks:
    """How often the plan writes each element of the target."""
    counts = allocated(spec, target, 0.0)
    for copy in plan.copies:
        copy.target.of(counts[copy.target_rank][copy.target.name], copy.shape).add_(1)
    return counts


@st.composite
def model_and_layout(draw: st.DrawFn) -> tuple[ModelSpec, ParallelLayout]:
    spec = draw(models())
    return spec, draw(layouts(spec))


@st.composite
def model_and_two_layouts(draw: st.DrawFn) -> tuple[ModelSpec, ParallelLayout, ParallelLayout]:
    spec = draw(models())
    return spec, draw(layouts(spec)), draw(layouts(spec))


@many
@given(model_and_layout())
def test_there_and_back_is_the_identity(case: tuple[ModelSpec, ParallelLayout]) -> None:
    spec, layout = case
    state, whole, sharded = random_state(spec), hf_side(spec), megatron_side(spec, layout)
    shards = moved(spec, compile_plan(spec, whole, sharded), {0: state}, sharded)
    assert not any(tensor.isnan().any() for tensors in shards.values() for tensor in tensors.values())
    back = moved(spec, compile_plan(spec, sharded, whole), shards, whole)[0]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@many
@given(model_and_layout())
def test_every_byte_is_written_once(case: tuple[ModelSpec, ParallelLayout]) -> None:
    spec, layout = case
    whole, sharded = hf_side(spec), megatron_side(spec, layout)
    exported = writes(spec, compile_plan(spec, sharded, whole), whole)
    assert all((tensor == 1).all() for tensor in exported[0].values())
    imported = writes(spec, compile_plan(spec, whole, sharded), sharded)
    for tensors in imported.values():
        for name, tensor in tensors.items():
            assert tensor.max() <= 1 if name in sharded.padded_names else (tensor == 1).all()


@many
@given(model_and_two_layouts())
def test_resharding_equals_importing_anew(case: tuple[ModelSpec, ParallelLayout, ParallelLayout]) -> None:
    spec, first, second = case
    whole, before, after = hf_side(spec), megatron_side(spec, first), megatron_side(spec, second)
    state = {0: random_state(spec)}
    shards = moved(spec, compile_plan(spec, whole, before), state, before)
    expected = moved(spec, compile_plan(spec, whole, after), state, after)
    for same_ranks in (False, True):
        found = moved(spec, compile_plan(spec, before, after, same_ranks=same_ranks), shards, after)
        for rank, tensors in expected.items():
            assert all(torch.equal(found[rank][name], tensor) for name, tensor in tensors.items())


@many
@given(model_and_layout(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_digests_of_the_parts_add_up(case: tuple[ModelSpec, ParallelLayout], dtype: torch.dtype) -> None:
    spec, layout = case
    state, sharded = random_state(spec), megatron_side(spec, layout)
    shards = moved(spec, compile_plan(spec, hf_side(spec), sharded), {0: state}, sharded)
    plan = compile_plan(spec, sharded, hf_side(spec))
    for hf_name, copies in plan.by_hf_name.items():
        words = plan.word_elements(hf_name, dtype.itemsize)
        parts = [
            digest_strided(
                copy.source.of(shards[copy.source_rank][copy.source.name], copy.shape).to(dtype),
                columns=spec.hf_shapes[hf_name][-1],
                offset=copy.hf.offset,
                strides=copy.hf.strides,
                word_elements=words,
            )
            for copy in copies
        ]
        assert add(*parts) == digest(state[hf_name].to(dtype), words)


@many
@given(model_and_layout())
def test_a_rank_alone_plans_what_all_plan_for_it(case: tuple[ModelSpec, ParallelLayout]) -> None:
    spec, layout = case
    together = compile_plan(spec, hf_side(spec), megatron_side(spec, layout))
    for rank in {0, layout.world_size - 1}:
        alone = compile_plan(spec, hf_side(spec), megatron_side(spec, layout, rank))
        assert list(alone.copies) == together.to_rank(rank)


@many
@given(model_and_layout())
def test_holders_share_the_work(case: tuple[ModelSpec, ParallelLayout]) -> None:
    """Nobody sends more than the mean by more than the largest piece that cannot be cut."""
    spec, layout = case
    sharded = megatron_side(spec, layout)
    plan = compile_plan(spec, sharded, hf_side(spec))
    # What only one rank holds is its own fate; judge layouts where every tensor has several holders.
    if min(len(segment.ranks) for segment in sharded.segments) < 2 or layout.pp > 1 or layout.ep > 1:
        return
    load = [sum(copy.numel for copy in plan.from_rank(rank)) for rank in range(layout.world_size)]
    largest = max(copy.numel for copy in plan.copies)
    assert max(load) <= sum(load) / len(load) + largest
