"""Adapters from Megatron ranks into the LoRA slots of a live vLLM engine: proven, in place, and apart from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_scenarios import ENGINE, LOGITS, ROUNDING, SIZES
from adapters_in_turn import adapt_in_turn
from interpreter import Interpreter
from tiny import tiny_checkpoint
from tolerance import assert_near

pytest.importorskip("vllm")

import adapter_scenarios

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.lora.attach import LoRAConfig
from mbridge_rl.sync.vllm.engines.process import EngineProcess

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.mark.parametrize(
    ("variant", "layout", "config", "engine_options", "updates"),
    [
        pytest.param(
            "qwen3", ParallelLayout(tp=2), LoRAConfig(rank=4, alpha=10.0), {}, 6, id="qwen3-tp2", marks=pytest.mark.nightly
        ),
        pytest.param(
            "qwen2",
            ParallelLayout(tp=2),
            LoRAConfig(
                rank=3,
                alpha=5.0,
                targets=("q_proj", "v_proj", "linear_proj", "linear_fc2"),
                canonical=True,
                rslora=True,
                rank_pattern={"linear_proj": 5, r".*layers\.1\.self_attn\..*": 2},
                alpha_pattern={"down_proj": 9.0},
            ),
            {"tensor_parallel_size": 2},
            4,
            id="qwen2-tp2-some-parts-engine-tp2",
        ),
    ],
)
def test_three_adapters_updated_in_turn_do_not_disturb_each_other(
    variant: str,
    layout: ParallelLayout,
    config: LoRAConfig,
    engine_options: dict[str, Any],
    updates: int,
    tmp_path: Path,
) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", variant, seed=0, **SIZES)
    adapt_in_turn(layout, start, config, lambda: EngineProcess(start, **ENGINE, **engine_options).start(), updates)


def test_slots_are_proven_and_whatever_fails_is_undone(tmp_path: Path) -> None:
    dense, _ = tiny_checkpoint(tmp_path / "dense", "qwen3", seed=0, **SIZES)
    experts, _ = tiny_checkpoint(tmp_path / "experts", "qwen3-moe", seed=0, **SIZES)
    interpreter = Interpreter()
    try:
        interpreter.call(adapter_scenarios.slots_are_proven_and_reverted, dense)
        difference = interpreter.call(adapter_scenarios.ranks_by_pattern_act_as_merged_weights, dense)
        assert_near(difference, 0.0, ROUNDING, scale=LOGITS, what="log-probabilities")
        interpreter.call(adapter_scenarios.tokens_are_labelled_with_the_policys_versions, dense)
        interpreter.call(adapter_scenarios.adapters_by_names_and_json, dense)
        interpreter.call(adapter_scenarios.an_engine_without_lora_says_so, dense)
        interpreter.call(adapter_scenarios.experts_beside_adapters_are_refused, experts)
    finally:
        interpreter.close()
