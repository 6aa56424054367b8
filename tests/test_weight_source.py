"""vLLM's trainer-side contract over a live Megatron model: metadata without an export, and what vLLM checks of an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import source_scenarios as scenarios
from interpreter import Interpreter
from tiny import assert_same_state, hf_state, tiny_checkpoint

from mbridge_rl.core.layout import ParallelLayout


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize(
    ("variant", "layout", "options"),
    [
        pytest.param("qwen3-moe", ParallelLayout(tp=2, pp=2, ep=2, etp=1), {"num_experts": 4}, id="moe-tp2xpp2xep2"),
        pytest.param("llama3-tied", ParallelLayout(pp=2), {}, id="tied-pp2"),
    ],
)
def test_every_pass_is_what_vllm_demands(
    elsewhere: Interpreter, variant: str, layout: ParallelLayout, options: dict[str, Any], tmp_path: Path
) -> None:
    directory, _ = tiny_checkpoint(tmp_path, variant, **options)
    expected = hf_state(directory)
    ranks = elsewhere.call(scenarios.passes_of_all_ranks, directory, layout)
    for rank, found in enumerate(ranks):
        assert list(found["whole"]) == list(found["again"])
        assert_same_state(found["whole"], expected)
        assert_same_state(found["again"], expected)
        assert list(found["first"]) == (list(found["whole"]) if rank == 0 else [])
        stage = layout.coordinates(rank).pp
        assert found["held"]
        for name, tensor in found["held"].items():
            assert torch.equal(tensor, expected[name])
        assert all(int(name.split(".")[2]) // 2 == stage for name in found["held"] if name.startswith("model.layers."))
        assert found["no gpu"].startswith("SyncError: vLLM's weight-transfer backend 'ipc' moves CUDA tensors")
    assert {name for found in ranks for name in found["held"]} == expected.keys()
    assert [found["live"] for found in ranks] == [0] * len(ranks)
