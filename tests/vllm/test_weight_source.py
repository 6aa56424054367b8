"""vLLM's trainer-side contract over a live Megatron model: metadata without an export, and what vLLM checks of an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import source_scenarios as scenarios
from interpreter import Interpreter
from tiny import tiny_checkpoint

from mbridge_rl.core.layout import ParallelLayout


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Interpreter]:
    interpreter = Interpreter(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_CI_ENV="1", VLLM_LOGGING_LEVEL="ERROR")
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
    elsewhere.call(scenarios.passes_of_all_ranks, directory, layout)


@pytest.mark.slow
def test_a_real_engine_takes_it_through_vllms_own_trainer_engine(elsewhere: Interpreter, tmp_path: Path) -> None:
    """The one that vLLM's `nccl` backend is made of, over gloo: what it needs a GPU for is not under test here."""
    elsewhere.call(scenarios.native_backend, tmp_path)
