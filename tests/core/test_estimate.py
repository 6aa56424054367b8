"""What plans cost: templates against whole plans, schedules by hand, and the arithmetic of replicas."""

from __future__ import annotations

import itertools
import resource
import time
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import layouts, models
from tiny import tiny_config

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.estimate import Links, RefitSchedule
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.core.templates import Flows, compile_flows, compile_templates, engine_side
from mbridge_rl.hf.bundled import bundled_config, bundled_names

BILLIONS = {
    "deepseek-v3": 671.026,
    "kimi-k2": 1026.408,
    "llama3-405b": 405.853,
    "llama3-70b": 70.554,
    "llama3-8b": 8.030,
    "qwen2.5-72b": 72.706,
    "qwen2.5-7b": 7.616,
    "qwen3-235b-a22b": 235.094,
    "qwen3-30b-a3b": 30.532,
    "qwen3-32b": 32.762,
    "qwen3-8b": 8.191,
}


def test_bundled_models_have_the_published_sizes() -> None:
    billions = {name: sum(map(prod, model_spec(bundled_config(name)).hf_shapes.values())) / 1e9 for name in bundled_names()}
    assert billions == pytest.approx(BILLIONS, abs=0.0006)


def received(flows: Flows) -> dict[tuple[str, int], int]:
    """Elements of each tensor that each target gets."""
    amounts: dict[tuple[str, int], int] = {}
    for tensor, target, elements in zip(flows.tensor, flows.target, flows.elements, strict=True):
        where = (flows.hf_names[tensor], int(target))
        amounts[where] = amounts.get(where, 0) + int(elements)
    return amounts


@st.composite
def model_and_two_layouts(draw: st.DrawFn) -> tuple[ModelSpec, ParallelLayout, ParallelLayout]:
    spec = draw(models())
    return spec, draw(layouts(spec)), draw(layouts(spec))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(model_and_two_layouts())
def test_templates_move_what_whole_plans_move(case: tuple[ModelSpec, ParallelLayout, ParallelLayout]) -> None:
    """Both move the same number of elements, and a source rank sends nothing that it does not hold."""
    spec, source, target = case
    templates, flows = compile_templates(spec, source, target), compile_flows(spec, source, target)
    assert templates.hf_names == flows.hf_names == list(spec.hf_shapes)
    assert np.array_equal(templates.sections, flows.sections)
    assert received(templates) == received(flows)
    stages = np.array([source.coordinates(rank).pp for rank in range(source.world_size)])
    if not spec.tied_embeddings:  # tied embeddings may be sent by the first or the last stage
        sent = [np.bincount(stages[moves.source], moves.elements, source.pp) for moves in (templates, flows)]
        assert np.array_equal(*sent)


SPECS = {name: model_spec(tiny_config(name)) for name in ("llama3-tied", "qwen3-moe")}


@pytest.mark.parametrize("variant", SPECS)
def test_templates_share_as_evenly_as_whole_plans(variant: str) -> None:
    source, target = ParallelLayout(tp=2, pp=2, dp=4, order="tp-cp-ep-pp-dp"), ParallelLayout(tp=4)
    sent = [
        np.bincount(flows.source, flows.elements, source.world_size)
        for flows in (compile_templates(SPECS[variant], source, target), compile_flows(SPECS[variant], source, target))
    ]
    assert sent[0].sum() == sent[1].sum()
    assert sent[0].max() <= 1.05 * sent[1].max()


def test_templates_are_the_plan_where_nothing_is_shared() -> None:
    source, target = ParallelLayout(pp=2, stage_layers=(3, 1)), ParallelLayout(tp=2)
    templates, flows = compile_templates(SPECS["qwen3-moe"], source, target), compile_flows(SPECS["qwen3-moe"], source, target)
    for column in ("tensor", "source", "target", "elements", "rectangles"):
        assert np.array_equal(getattr(templates, column), getattr(flows, column)), column


def test_engines_with_more_ranks_than_key_value_heads_repeat_them() -> None:
    """4 heads of 24 on 8 ranks: rank 5 keeps queries 5 of 8, and head 2, which rank 4 keeps too."""
    side = engine_side(model_spec(tiny_config("qwen3")), ParallelLayout(tp=8))
    held = {
        (segment.hf_name.rsplit(".", 2)[1], rank): (segment.box.start[0], segment.box.size[0])
        for segment in side.segments
        if segment.hf_name.startswith("model.layers.3.self_attn")
        for rank in segment.ranks
    }
    assert held["q_proj", 5] == (5 * 24, 24)
    assert held["k_proj", 5] == held["v_proj", 5] == held["k_proj", 4] == (2 * 24, 24)
    assert sum(size for (name, _), (_, size) in held.items() if name == "k_proj") == 2 * 4 * 24
    with pytest.raises(LayoutError, match=r"4 groups \(KV heads\) do not divide by tp=6"):
        engine_side(model_spec(tiny_config("qwen3", num_attention_heads=12)), ParallelLayout(tp=6))
    with pytest.raises(LayoutError, match="8 attention heads do not divide by an engine's tp=16"):
        engine_side(model_spec(tiny_config("qwen3")), ParallelLayout(tp=16))


def flows_of(rows: list[tuple[int, int, int, int]], sections: list[int]) -> Flows:
    """`(tensor, source, target, elements)`."""
    table = np.array(rows).T
    return Flows([str(n) for n in range(len(sections))], np.array(sections), *table, np.ones(len(rows), dtype=int), "")


def test_a_schedule_by_hand() -> None:
    """Two trainer ranks, one worker, three engines; buckets of 10 bytes.

    Tensors 0 and 1 are rank 0's, 2 is rank 1's and goes before 1: its sender is free. 0 and 2 fill a bucket, 1 has the next,
    and 3, of 25 bytes, takes three of 8, 8 and 9.
    """
    flows = flows_of([(0, 0, 0, 3), (1, 0, 0, 3), (2, 1, 0, 2), (3, 1, 0, 12), (3, 0, 0, 13)], [0, 0, 0, 1])
    refit = RefitSchedule(flows, 2, 1, np.array([2, 2, 2, 1]), replicas=3, bucket_bytes=10)
    assert refit.buckets == 5
    estimate = refit.estimate(Links(trainer_bandwidth=1.0, rollout_bandwidth=2.0, message_seconds=0.5))
    # Bucket: 0 (6 of rank 0, 4 of rank 1) at engine 0, 1 (6 of rank 0) at engine 1, then 4+4 at 2, 4+4 at 0, 4+5 at 1.
    assert (estimate.sent.minimum, estimate.sent.maximum, estimate.sent.total) == (16, 25, 41)
    assert (estimate.received.minimum, estimate.received.maximum, estimate.received.total) == (41, 41, 123)
    assert (estimate.entered.minimum, estimate.entered.maximum, estimate.entered.total) == (8, 18, 41)
    # Engine 0 hands on all but what enters at engine 1, and so on.
    assert (estimate.relayed.minimum, estimate.relayed.maximum, estimate.relayed.total) == (41 - 18, 41 - 8, 82)
    assert estimate.messages == (2 + 1 + 2 + 2 + 2) + 2 * 5
    assert (estimate.trainer_staging, estimate.rollout_staging) == (12, 20)
    assert estimate.lower_bound_seconds == 25 / 1.0
    # Rank 0 needs 6.5 s for each of the first two with their one message, the worker 8 / 2 + 2 * 0.5 for the next.
    assert estimate.predicted_seconds == pytest.approx(6.5 + 6.5 + 5 + 5 + 5.5 + 2 * 5.5)


REFITS = [
    ("qwen3-moe", ParallelLayout(tp=2, pp=2, ep=4, etp=1, dp=4), ParallelLayout(tp=2, dp=2, ep=4, etp=1), 3, 20_000),
    ("qwen3-moe", ParallelLayout(ep=8, dp=8), ParallelLayout(tp=8), 2, 9_000),
    ("llama3-tied", ParallelLayout(tp=4, pp=2, dp=3), ParallelLayout(tp=2, pp=2), 1, 5_000),
]


@pytest.mark.parametrize(("variant", "source", "target", "replicas", "bucket_bytes"), REFITS)
@pytest.mark.parametrize("factor", [1, 100])
def test_ranks_agree_with_each_other_and_with_the_whole(
    variant: str, source: ParallelLayout, target: ParallelLayout, replicas: int, bucket_bytes: int, factor: int
) -> None:
    spec = SPECS[variant]
    flows = compile_templates(spec, source, target)
    sizes = np.full(len(flows.hf_names), 2)
    refit = RefitSchedule(
        flows, source.world_size, target.world_size, sizes, replicas=replicas, bucket_bytes=factor * bucket_bytes
    )
    estimate = refit.estimate(Links())
    ranks = range(source.world_size + replicas * target.world_size)
    exchanges = {rank: refit.exchanges(rank) for rank in ranks}
    sends = {(rank, it.peer): (it.nbytes, it.messages) for rank in ranks for it in exchanges[rank] if it.sends}
    receives = {(it.peer, rank): (it.nbytes, it.messages) for rank in ranks for it in exchanges[rank] if not it.sends}
    assert sends == receives
    assert sum(messages for _, messages in sends.values()) == estimate.messages
    of_trainers = [
        sum(nbytes for (rank, _), (nbytes, _) in sends.items() if rank == trainer) for trainer in ranks[: source.world_size]
    ]
    assert (min(of_trainers), max(of_trainers), sum(of_trainers)) == (
        estimate.sent.minimum,
        estimate.sent.maximum,
        estimate.sent.total,
    )
    held = [0] * target.world_size
    for segment in engine_side(spec, target).segments:
        for worker in segment.ranks:
            held[worker] += 2 * segment.box.volume
    for index, rank in enumerate(ranks[source.world_size :]):
        assert sum(it.nbytes for it in exchanges[rank] if not it.sends) == held[index % target.world_size]
    assert estimate.entered.total == estimate.sent.total == sum(held)
    assert max(estimate.trainer_staging, estimate.rollout_staging) <= 2 * factor * bucket_bytes
    assert estimate.lower_bound_seconds <= estimate.predicted_seconds


def test_experts_of_many_ranks_travel_side_by_side() -> None:
    """In checkpoint order the first bucket of a layer would hold one sender's experts only."""
    flows = compile_templates(SPECS["qwen3-moe"], ParallelLayout(ep=8, dp=8), ParallelLayout(tp=2))
    refit = RefitSchedule(flows, 8, 2, np.full(len(flows.hf_names), 2), bucket_bytes=12 * 32 * 64 * 2)
    pairs = {(bucket, source) for bucket, source in zip(refit._bucket.tolist(), refit._source.tolist(), strict=True)}
    senders = [len(list(group)) for _, group in itertools.groupby(sorted(pairs), key=lambda pair: pair[0])]
    assert np.mean(senders) > 4


def test_kimi_on_a_thousand_ranks() -> None:
    """A trillion parameters, 1,024 trainer and 128 rollout ranks: seconds of one core, and less than 4 GB."""
    spec = model_spec(bundled_config("kimi-k2"))
    began = time.process_time()
    source = ParallelLayout(tp=8, pp=16, ep=64, etp=1, dp=8, stage_layers=(4,) * 13 + (3,) * 3)
    flows = compile_templates(spec, source, ParallelLayout(tp=16))
    dtypes = spec.hf_dtypes(torch.bfloat16)
    refit = RefitSchedule(flows, 1024, 16, np.array([dtypes[hf_name].itemsize for hf_name in flows.hf_names]), replicas=8)
    estimate, own = refit.estimate(Links()), refit.exchanges(1024)
    assert time.process_time() - began < 20
    began = time.process_time()
    compile_plan(spec, hf_side(spec), megatron_side(spec, source, 300))  # one rank's own: what it reads of a checkpoint
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kB
    assert sum(it.nbytes for it in own if not it.sends) == estimate.received.maximum
    assert estimate.sent.balance < 1.11  # 3.8 layers a stage on average, 4 at most: 1.05 of it is the split of the layers
    assert estimate.predicted_seconds < 1.2 * estimate.lower_bound_seconds
