"""The GRPO step around a real trainer; the engine only says what it was told, so that every number is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run_ranks

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.lora.attach import LoRAConfig, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.training.loop import GRPO
from mbridge_rl.training.metrics import Metrics, rollout_metrics
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.collect import Rollout, RolloutBatch
from mbridge_rl.training.rollout.rewards import Problem, exact_match
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

LOG_PROB_OF_EACH = math.log(1 / 4)
PROBLEMS = [Problem("3+4=", "7"), Problem("6+6=", "12"), Problem("9+9=", "18")]


class FourAnswers:
    """An engine that answers 7, 8, 12 and 3 in turn, each with the same probability."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        answers = [toy.tokenizer().encode(f"{answer}<eos>") for answer in (7, 8, 12, 3)]
        return [
            Completion(index, answers[index % 4], [LOG_PROB_OF_EACH] * len(answers[index % 4]), "stop", 3)
            for index in range(len(prompts))
        ]


def _grpo(checkpoint: Path, config: GRPOConfig, lora: bool = False) -> GRPO:
    layout = initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    if lora:
        add_lora(model, LoRAConfig(rank=4))
    return GRPO(MegatronTrainer(model, TrainerConfig(learning_rate=1e-3, micro_batch_size=4)), config)


def _rollouts(rank: int, reward: Callable[[Problem, str], float] = exact_match) -> RolloutBatch:
    return Rollout(FourAnswers() if rank == 0 else None, toy.tokenizer(), reward).collect(PROBLEMS, 4)


def _steps(rank: int, checkpoint: Path, config: GRPOConfig, lora: bool) -> list[Metrics]:
    grpo, rollouts = _grpo(checkpoint, config, lora), _rollouts(rank)
    return [grpo.update(rollouts, version) | rollout_metrics(rollouts, version=version) for version in (3, 5)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_checkpoint(tmp_path_factory.mktemp("loop") / "qwen3")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_measures_what_it_does(checkpoint: Path, lora: bool) -> None:
    config = GRPOConfig(group_size=4, kl_coefficient=0.1)
    for first, second in run_ranks(_steps, 2, checkpoint, config, lora):
        assert first["rollout_version"] == 3
        assert [metrics["staleness_max"] for metrics in (first, second)] == [0, 2]
        assert first["reward"] == pytest.approx(1 / 6)
        assert first["tokens"] == 3 * (2 + 2 + 3 + 2)
        assert (first["length_mean"], first["length_max"], first["prompt_length_mean"]) == (2.25, 3, 4.0)
        assert first["ratio_max_deviation"] == 0.0
        assert first["ppo_kl"] == 0.0
        assert first["reference_kl"] == 0.0
        assert first["skipped"] is None
        assert second["ratio_max_deviation"] == 0.0  # recomputed before every step
        assert second["reference_kl"] > 1e-6  # the policy has left the reference


def test_the_engines_log_probs_can_be_the_old_ones(checkpoint: Path) -> None:
    results = run_ranks(_steps, 2, checkpoint, GRPOConfig(group_size=4, old_log_probs="rollout"), False)
    for first, _ in results:
        assert first["ratio_max_deviation"] > 0.1  # the engine said a quarter, the policy says something else
        assert first["mismatch_max"] > 0.1
        assert "reference_kl" not in first
    assert torch.equal(*(torch.tensor([step["loss"] for step in history]) for history in results))


def _nothing_to_learn(rank: int, checkpoint: Path) -> list[Metrics]:
    grpo = _grpo(checkpoint, GRPOConfig(group_size=4))
    grpo.update(_rollouts(rank), 1)  # the optimizer has momentum now
    before = [parameter.clone() for chunk in grpo.trainer.model for parameter in chunk.parameters()]
    constant = grpo.update(_rollouts(rank, lambda problem, completion: 1.0), 2)
    rollouts = _rollouts(rank)
    empty = grpo.update(replace(rollouts, batch=rollouts.batch.without_rows(torch.ones(12, dtype=torch.bool))), 3)
    after = [parameter for chunk in grpo.trainer.model for parameter in chunk.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return [constant, empty]


def test_a_batch_without_anything_to_learn_changes_no_weight_and_says_why(checkpoint: Path) -> None:
    for constant, empty in run_ranks(_nothing_to_learn, 2, checkpoint):
        assert constant["skipped"] == "all 3 groups have constant rewards, so that every advantage is zero"
        assert constant["constant_groups"] == 3
        assert empty["skipped"] == "no token of the 12 completions counts"


def _failing_rewards(rank: int, checkpoint: Path) -> Metrics:
    def fails_on_eight(problem: Problem, completion: str) -> float:
        if completion == "8":
            raise ValueError("eight is no answer")
        return math.nan if completion == "3" else exact_match(problem, completion)

    grpo, rollouts = _grpo(checkpoint, GRPOConfig(group_size=4)), _rollouts(rank, fails_on_eight)
    assert rollouts.errors[0].endswith("fails_on_eight raised ValueError: eight is no answer")
    assert "nan" in rollouts.errors[1]
    return grpo.update(rollouts, 3) | rollout_metrics(rollouts, version=3)


def test_rewards_that_fail_are_counted_and_their_completions_left_out(checkpoint: Path) -> None:
    for metrics in run_ranks(_failing_rewards, 2, checkpoint):
        assert metrics["rewards_failed"] == 6
        assert metrics["rewards_not_finite"] == 6
        assert metrics["tokens"] == 3 * (2 + 3)
        assert metrics["reward"] == pytest.approx(1 / 3)
        assert math.isfinite(metrics["loss"])


def _no_reward_at_all(rank: int, checkpoint: Path) -> None:
    def broken(problem: Problem, completion: str) -> float:
        raise LookupError("the answers are gone")

    _grpo(checkpoint, GRPOConfig(group_size=4)).update(_rollouts(rank, broken), 1)


def test_a_broken_reward_function_ends_the_run_with_its_own_words(checkpoint: Path) -> None:
    with pytest.raises(RankError, match=r"none of the 12 rewards is known: .*LookupError: the answers are gone"):
        run_ranks(_no_reward_at_all, 2, checkpoint)
