"""Experts whose gate and up rows alternate in blocks: the plan moves the right rows, and Megatron computes the same."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family_scenarios import TOKENS, assert_close_logits
from ranks import run_ranks
from tiny import assert_same_state, hf_state
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.interleaved_experts import FIELD, with_interleaved_experts
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.segments import Side
from mbridge_rl.core.templates import engine_side
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.versions.config import field_names

SIZE = 8  # experts of the tiny models have 32 or more inner rows
VARIANTS = ["qwen3-moe", "deepseek-v3", "gpt-oss"]  # experts apart; with shared experts; stacked, with biases
LAYOUTS = [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(ep=2, dp=2), ParallelLayout(tp=2, etp=1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_alternates_gate_and_up(variant: str, tmp_path: Path) -> None:
    FAMILIES[variant].checkpoint(tmp_path)
    plain, other = (AutoBridge.from_pretrained(tmp_path, glu_interleave=size) for size in (None, SIZE))
    expected = hf_state(tmp_path)
    seen = 0
    for layout in LAYOUTS:
        if plain.spec.transformer_config.get("add_bias_linear") and layout.expert_tp > 1:
            continue
        ordinary, interleaved = (bridge.shard(expected, layout) for bridge in (plain, other))
        for rank, tensors in ordinary.items():
            for name, tensor in tensors.items():
                first = ".mlp.experts.linear_fc1." in name
                seen += first
                assert torch.equal(interleaved[rank][name], _alternating(tensor) if first else tensor), name
        assert_same_state(other.unshard(interleaved, layout), plain.unshard(ordinary, layout))
    assert seen > 0


def _alternating(rows: Tensor) -> Tensor:
    """`[gate | up]` in blocks of SIZE rows."""
    gate, up = (half.unflatten(0, (-1, SIZE)) for half in rows.chunk(2))
    return torch.stack([gate, up], 1).flatten(0, 2)


def test_the_planner_does_not_take_blocks_of_rows_for_heads() -> None:
    """An engine with more ranks than KV heads repeats these, and nothing else that comes in groups."""
    spec = model_spec(FAMILIES["qwen3-moe"].hf_config())
    inner = spec.transformer_config["moe_ffn_hidden_size"]
    interleaved, engine = with_interleaved_experts(spec, inner // 2), ParallelLayout(tp=4, ep=2, etp=2)
    sizes = [_elements(engine_side(other, engine)) for other in (spec, interleaved)]
    assert sizes[0] == sizes[1] > 0


def _elements(side: Side) -> int:
    return sum(prod(segment.box.size) * len(segment.ranks) for segment in side.segments)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    FAMILIES["qwen3-moe"].checkpoint(tmp_path / "moe")
    with pytest.raises(LayoutError, match=rf"{FIELD}=7 does not divide the inner size \d+; choose a divisor"):
        AutoBridge.from_pretrained(tmp_path / "moe", glu_interleave=7)
    FAMILIES["llama"].checkpoint(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="has no experts with a gate"):
        AutoBridge.from_pretrained(tmp_path / "dense", glu_interleave=SIZE)


def _known() -> bool:
    with megatron_runtime():
        from megatron.core.transformer.transformer_config import TransformerConfig

        return FIELD in field_names(TransformerConfig)


def _there_and_back(rank: int, directory: Path, layout: ParallelLayout) -> tuple[dict[str, Tensor], Tensor | None]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory, glu_interleave=SIZE)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    return dict(bridge.export_weights(model)), forward_logits(model, TOKENS)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, ep=2, etp=1)], ids=str)
@pytest.mark.parametrize("variant", ["qwen3-moe", "deepseek-v3"])
def test_megatron_computes_the_same(variant: str, layout: ParallelLayout, tmp_path: Path) -> None:
    if not _known():
        pytest.skip(f"this release of Megatron-core has no {FIELD}, which came with 0.18")
    reference = FAMILIES[variant].checkpoint(tmp_path)
    for exported, logits in run_ranks(_there_and_back, layout.world_size, tmp_path, layout):
        assert_same_state(exported, hf_state(tmp_path))
        assert_close_logits(logits, reference, FAMILIES[variant].tolerance)


def _build_otherwise(rank: int, directory: Path) -> str:
    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    with pytest.raises(UnsupportedModelError) as caught:
        bridge.build_model(overrides={FIELD: SIZE})
    return str(caught.value)


def test_a_model_in_another_order_than_the_bridges_is_refused(tmp_path: Path) -> None:
    if not _known():
        pytest.skip(f"this release of Megatron-core has no {FIELD}, which came with 0.18")
    FAMILIES["qwen3-moe"].checkpoint(tmp_path)
    [message] = run_ranks(_build_otherwise, 1, tmp_path)
    assert f"{FIELD}={SIZE} changes the order of the rows of linear_fc1" in message
    assert f"glu_interleave={SIZE}" in message
