"""The Megatron loop: GRPO on a Megatron-core trainer and vLLM engines, part by part or as a whole.

`loop` has the loop, with a drawing of it. `rollout` samples and rewards episodes, `objectives` defines the loss, `trainer`
updates the weights, `checkpoint` saves and loads them, and `run` does all of it from a recipe. This package imports `sync` and
the packages below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbridge_rl.megatron.lora.attach import LoRAConfig, add_lora
    from mbridge_rl.training.batch import Batch
    from mbridge_rl.training.checkpoint.saved_state import latest_checkpoint, load_checkpoint, save_checkpoint
    from mbridge_rl.training.loop import GRPO
    from mbridge_rl.training.objectives.advantages import group_advantages
    from mbridge_rl.training.objectives.config import GRPOConfig, objective
    from mbridge_rl.training.objectives.correction import ImportanceCorrection
    from mbridge_rl.training.objectives.loss import grpo_loss, policy_metrics, supervised_loss
    from mbridge_rl.training.objectives.metrics import mismatch_metrics
    from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
    from mbridge_rl.training.rollout.collect import Rollout
    from mbridge_rl.training.rollout.episodes import Environment, SamplingConfig
    from mbridge_rl.training.rollout.rewards import Problem, exact_match
    from mbridge_rl.training.run.config import RunConfig, load_run_config
    from mbridge_rl.training.run.launcher import launch
    from mbridge_rl.training.run.recipe_run import run_training
    from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

__all__ = [
    "GRPO",
    "Batch",
    "Environment",
    "GRPOConfig",
    "ImportanceCorrection",
    "LoRAConfig",
    "MegatronTrainer",
    "Problem",
    "Rollout",
    "RunConfig",
    "SamplingConfig",
    "TrainerConfig",
    "add_lora",
    "exact_match",
    "group_advantages",
    "grpo_loss",
    "latest_checkpoint",
    "launch",
    "load_checkpoint",
    "load_run_config",
    "mismatch_metrics",
    "objective",
    "policy_metrics",
    "prepare_batch",
    "run_training",
    "save_checkpoint",
    "select_rows",
    "supervised_loss",
]

_HOMES = {
    "Batch": "mbridge_rl.training.batch",
    "Environment": "mbridge_rl.training.rollout.episodes",
    "GRPO": "mbridge_rl.training.loop",
    "GRPOConfig": "mbridge_rl.training.objectives.config",
    "ImportanceCorrection": "mbridge_rl.training.objectives.correction",
    "LoRAConfig": "mbridge_rl.megatron.lora.attach",
    "MegatronTrainer": "mbridge_rl.training.trainer.megatron_trainer",
    "Problem": "mbridge_rl.training.rollout.rewards",
    "Rollout": "mbridge_rl.training.rollout.collect",
    "RunConfig": "mbridge_rl.training.run.config",
    "SamplingConfig": "mbridge_rl.training.rollout.episodes",
    "TrainerConfig": "mbridge_rl.training.trainer.megatron_trainer",
    "add_lora": "mbridge_rl.megatron.lora.attach",
    "exact_match": "mbridge_rl.training.rollout.rewards",
    "group_advantages": "mbridge_rl.training.objectives.advantages",
    "grpo_loss": "mbridge_rl.training.objectives.loss",
    "latest_checkpoint": "mbridge_rl.training.checkpoint.saved_state",
    "launch": "mbridge_rl.training.run.launcher",
    "load_checkpoint": "mbridge_rl.training.checkpoint.saved_state",
    "load_run_config": "mbridge_rl.training.run.config",
    "mismatch_metrics": "mbridge_rl.training.objectives.metrics",
    "objective": "mbridge_rl.training.objectives.config",
    "policy_metrics": "mbridge_rl.training.objectives.loss",
    "prepare_batch": "mbridge_rl.training.objectives.prepare",
    "run_training": "mbridge_rl.training.run.recipe_run",
    "save_checkpoint": "mbridge_rl.training.checkpoint.saved_state",
    "select_rows": "mbridge_rl.training.objectives.prepare",
    "supervised_loss": "mbridge_rl.training.objectives.loss",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mbridge_rl.training' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
