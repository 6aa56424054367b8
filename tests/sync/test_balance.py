"""Replicas share the work: of real models' sizes, no rank sends more than a tenth above the mean."""

from __future__ import annotations

import pytest
import torch

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.hf.bundled import bundled_config

DENSE = [
    ParallelLayout(dp=7),
    ParallelLayout(tp=8),
    ParallelLayout(tp=2, cp=2, dp=3),
    ParallelLayout(tp=4, pp=2, dp=2),
    ParallelLayout(tp=2, dp=4, order="dp-cp-ep-tp-pp"),
]
EXPERTS = [
    ParallelLayout(tp=2, dp=4, ep=4, etp=1),
    ParallelLayout(tp=4, pp=2, ep=8, etp=1, dp=4),
    ParallelLayout(dp=16, ep=4),
    ParallelLayout(tp=2, cp=2, ep=2, etp=2, dp=2),
]


@pytest.fixture(scope="module")
def specs() -> dict[str, ModelSpec]:
    """The models' own tensors, of fewer layers: what a layer's ranks share does not depend on how many there are."""
    return {name: model_spec(_shorter(name)) for name in ("qwen3-8b", "qwen3-30b-a3b")}


def _shorter(name: str) -> object:
    config = bundled_config(name)
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:4]
    return config


CASES = [("qwen3-8b", layout) for layout in DENSE] + [("qwen3-30b-a3b", layout) for layout in EXPERTS]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{name}-{layout}" for name, layout in CASES])
def test_exports_are_shared_by_all_holders(name: str, layout: ParallelLayout, specs: dict[str, ModelSpec]) -> None:
    """Stage by stage: what a pipeline stage holds nobody else has."""
    spec = specs[name]
    plan = compile_plan(spec, megatron_side(spec, layout), hf_side(spec))
    sent = dict.fromkeys(range(layout.world_size), 0)
    for copy in plan.copies:
        sent[copy.source_rank] += 2 * copy.numel
    for stage in range(layout.pp):
        of_stage = [nbytes for rank, nbytes in sent.items() if layout.coordinates(rank).pp == stage]
        assert max(of_stage) <= 1.1 * sum(of_stage) / len(of_stage)
    assert sum(sent.values()) == sum(tensor.nbytes for tensor in spec.hf_tensors(torch.bfloat16))
