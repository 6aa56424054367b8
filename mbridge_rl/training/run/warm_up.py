"""Supervised steps before the first rollout: reinforcement learning needs a policy that already solves some problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import BridgeError
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.rollout.rewards import Problem
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer


def warmed_up(config: RunConfig, start_from: Path) -> Path:
    """The checkpoint on which training starts: the one that the warm-up writes, or `start_from` if the run has no warm-up."""
    return config.run_dir / "warm" if config.warm_up.accuracy else start_from


class WarmUpFailed(BridgeError, RuntimeError):
    """The supervised steps did not reach the configured accuracy."""


def warm_up(
    config: RunConfig, start_from: Path, problems: Sequence[Problem], tokenizer: Any, say: Callable[[str], None]
) -> tuple[Path, int]:
    """Trains all weights on the answers of `problems` until the policy gives `warm_up.accuracy` of them greedily.

    Returns:
        The checkpoint on which training starts (`warmed_up`), and the number of steps. If that checkpoint exists already it is
        used and the number is 0.

    Raises:
        WarmUpFailed: the accuracy was not reached within `warm_up.max_steps`.
    """
    settings, warm = config.warm_up, warmed_up(config, start_from)
    if not settings.accuracy:
        return start_from, 0
    if (warm / "config.json").exists():
        return warm, 0
    say(f"warm-up: supervised steps until {settings.accuracy:.0%} of {len(problems)} answers are right")
    bridge = AutoBridge.from_pretrained(start_from, numerics=config.model.numerics)
    model = bridge.build_model(config.layout, dtype=config.torch_dtype, sequence_parallel=config.model.sequence_parallel)
    bridge.load_weights(model)
    trainer = MegatronTrainer(
        model, replace(config.trainer, learning_rate=settings.learning_rate, schedule="constant", decay_steps=None)
    )
    batch = _batch_of_answers(problems, tokenizer)
    for step in range(settings.max_steps + 1):
        right = trainer.compute_log_probs(batch).greedy | ~batch.mask
        accuracy = right.all(dim=1).float().mean().item()
        if accuracy >= settings.accuracy:
            bridge.save_pretrained(trainer.model, warm)
            return warm, step
        if step < settings.max_steps:
            trainer.step(batch, supervised_loss)
    raise WarmUpFailed(
        f"the warm-up reached an accuracy of {accuracy:.0%} in {settings.max_steps} steps and warm_up.accuracy="
        f"{settings.accuracy:g} is asked for: raise warm_up.max_steps or warm_up.learning_rate, or try another seed"
    )


def _batch_of_answers(problems: Sequence[Problem], tokenizer: Any) -> Batch:
    return Batch.from_completions(
        [tokenizer.encode(problem.prompt) for problem in problems],
        [[*tokenizer.encode(problem.answer, add_special_tokens=False), tokenizer.eos_token_id] for problem in problems],
        pad_token_id=tokenizer.pad_token_id,
    )
