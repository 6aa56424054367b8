"""The Megatron loop: GRPO on a Megatron-core trainer and a vLLM engine, part by part or as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbridge_rl.training.batch import Batch
    from mbridge_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from mbridge_rl.training.config import RunConfig, load_run_config
    from mbridge_rl.training.episodes import Environment, SamplingConfig
    from mbridge_rl.training.grpo import grpo_loss, policy_metrics, supervised_loss
    from mbridge_rl.training.launcher import launch
    from mbridge_rl.training.loop import GRPO
    from mbridge_rl.training.lora import LoRAConfig, add_lora
    from mbridge_rl.training.objectives.advantages import group_advantages
    from mbridge_rl.training.objectives.config import GRPOConfig, objective
    from mbridge_rl.training.objectives.correction import ImportanceCorrection
    from mbridge_rl.training.objectives.metrics import mismatch_metrics
    from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
    from mbridge_rl.training.rewards import Problem, exact_match
    from mbridge_rl.training.rollout import Rollout
    from mbridge_rl.training.run import run_training
    from mbridge_rl.training.trainer import MegatronTrainer, TrainerConfig

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
    "Batch": "batch",
    "Environment": "episodes",
    "GRPO": "loop",
    "GRPOConfig": "objectives.config",
    "ImportanceCorrection": "objectives.correction",
    "LoRAConfig": "lora",
    "MegatronTrainer": "trainer",
    "Problem": "rewards",
    "Rollout": "rollout",
    "RunConfig": "config",
    "SamplingConfig": "episodes",
    "TrainerConfig": "trainer",
    "add_lora": "lora",
    "exact_match": "rewards",
    "group_advantages": "objectives.advantages",
    "grpo_loss": "grpo",
    "latest_checkpoint": "checkpoint",
    "launch": "launcher",
    "load_checkpoint": "checkpoint",
    "load_run_config": "config",
    "mismatch_metrics": "objectives.metrics",
    "objective": "objectives.config",
    "policy_metrics": "grpo",
    "prepare_batch": "objectives.prepare",
    "run_training": "run",
    "save_checkpoint": "checkpoint",
    "select_rows": "objectives.prepare",
    "supervised_loss": "grpo",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mbridge_rl.training' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mbridge_rl.training.{_HOMES[name]}"), name)
