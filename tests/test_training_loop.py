"""The GRPO step around a real trainer; the engine only says what it was told, so that every number is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.refit import SyncReport
from mbridge_rl.sync.vllm.engine import Completion
from mbridge_rl.training import toy
from mbridge_rl.training.grpo import GRPOConfig
from mbridge_rl.training.loop import GRPO, Metrics
from mbridge_rl.training.lora import LoRAConfig, add_lora
from mbridge_rl.training.rewards import Problem, exact_match
from mbridge_rl.training.rollout import Rollout
from mbridge_rl.training.trainer import MegatronTrainer, TrainerConfig

SAID = math.log(1 / 4)


class FourAnswers:
    """Says 7, 8, 12 and 3 in turn, each with the same probability."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        answers = [toy.tokenizer().encode(f"{answer}<eos>") for answer in (7, 8, 12, 3)]
        return [
            Completion(index, answers[index % 4], [SAID] * len(answers[index % 4]), "stop", 3) for index in range(len(prompts))
        ]


class NoEngineBehind:
    """Counts the versions that would have been synced."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def sync(self, version: int) -> SyncReport:
        self.versions.append(version)
        return SyncReport(
            version=version, tensors=0, nbytes=0, buckets=0, digest="0" * 16, verified=True, seconds=0.002, engine={}
        )


def _steps(rank: int, checkpoint: Path, config: GRPOConfig, lora: bool) -> list[Metrics]:
    layout = initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    if lora:
        add_lora(model, LoRAConfig(rank=4))
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-3, micro_batch_size=4))
    rollout = Rollout(FourAnswers() if rank == 0 else None, toy.tokenizer(), exact_match)
    sync = NoEngineBehind()
    grpo = GRPO(trainer, rollout, sync, config)
    problems = [Problem("3+4=", "7"), Problem("6+6=", "12"), Problem("9+9=", "18")]
    history = []
    for version in (11, 12):
        metrics, solved = grpo.step(problems, version)
        assert solved.tolist() == [0.25, 0.25, 0.0]
        history.append(metrics)
    assert sync.versions == [11, 12]
    return history


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_checkpoint(tmp_path_factory.mktemp("loop") / "qwen3")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_measures_what_it_does(checkpoint: Path, lora: bool) -> None:
    config = GRPOConfig(group_size=4, kl_coefficient=0.1)
    for first, second in run_ranks(_steps, 2, checkpoint, config, lora):
        assert first["version"] == 11
        assert first["rollout_version"] == 3
        assert first["reward"] == pytest.approx(1 / 6)
        assert first["tokens"] == 3 * (2 + 2 + 3 + 2)
        assert first["refit_ms"] == pytest.approx(2.0)
        assert first["ratio_max_deviation"] == 0.0
        assert first["reference_kl"] == 0.0
        assert second["ratio_max_deviation"] == 0.0  # recomputed before every step
        assert second["reference_kl"] > 1e-6  # the policy has left the reference


def test_the_engines_log_probs_can_be_the_old_ones(checkpoint: Path) -> None:
    results = run_ranks(_steps, 2, checkpoint, GRPOConfig(group_size=4, old_log_probs="rollout"), False)
    for first, _ in results:
        assert first["ratio_max_deviation"] > 0.1  # the engine said a quarter, the policy says something else
        assert first["mismatch_max"] > 0.1
        assert "reference_kl" not in first
    assert torch.equal(*(torch.tensor([step["loss"] for step in history]) for history in results))
