"""The GRPO loop, top to bottom: rollout, rewards, advantages, log-probabilities, step, sync."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mbridge_rl.sync.refit import SyncReport
from mbridge_rl.training.grpo import grpo_loss, policy_metrics
from mbridge_rl.training.objectives.aggregation import masked_mean
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.metrics import mismatch_metrics
from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
from mbridge_rl.training.rewards import Problem
from mbridge_rl.training.rollout import Rollout
from mbridge_rl.training.trainer import MegatronTrainer


class Sync(Protocol):
    """Makes the engine's weights those of the trainer: `sync.refit.WeightSync`."""

    def sync(self, version: int) -> SyncReport: ...


Metrics = dict[str, float | int | str | bool | None]


class GRPO:
    """One policy, trained and rolled out. Made and called by all trainer ranks together.

    Args:
        trainer: of the policy.
        rollout: around the engine that serves the policy.
        sync: from the one to the other; the engine must hold the trainer's weights before the first step.
        config: of the algorithm.
    """

    def __init__(self, trainer: MegatronTrainer, rollout: Rollout, sync: Sync, config: GRPOConfig) -> None:
        self.trainer, self.rollout, self.weight_sync, self.config = trainer, rollout, sync, config
        self._loss = grpo_loss(config)
        if config.kl_coefficient:
            trainer.snapshot_reference()

    def step(self, problems: Sequence[Problem], version: int) -> tuple[Metrics, Tensor]:
        """One step of GRPO on `problems`; afterwards the engine serves the new weights as `version`.

        Returns:
            Metrics, the same on every rank, and the mean reward of each problem, `[problems]`.
        """
        trainer, config, clock = self.trainer, self.config, _Clock()

        rollouts = self.rollout.collect(problems, config.group_size)
        clock.lap("rollout_seconds")

        selection = select_rows(config, rollouts.batch, rollouts.rewards)
        batch = selection.batch

        recompute = config.old_log_probs == "recompute"
        old = trainer.compute_log_probs(batch).log_probs if recompute else batch.need("rollout_log_probs")
        batch = batch.with_tensors(old_log_probs=old)
        if config.kl_coefficient:
            batch = batch.with_tensors(reference_log_probs=trainer.reference_log_probs(batch))
        prepared = prepare_batch(config, batch, selection.rewards)
        batch = prepared.batch

        report = trainer.step(batch, self._loss)
        clock.lap("train_seconds")

        synced = self.weight_sync.sync(version)
        clock.lap("sync_seconds")

        policy = report.statistics
        metrics: Metrics = {
            "version": version,
            "reward": rollouts.rewards.mean().item(),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "tokens": report.tokens,
            "entropy": masked_mean(policy.entropy, batch.mask),
            "rollout_version": int(rollouts.versions.min()),
            **policy_metrics(policy.log_probs, batch, config),
            **mismatch_metrics(policy.log_probs, batch.need("rollout_log_probs"), batch.mask),
            "refit_ms": synced.seconds * 1e3,
            "digest": synced.digest,
            "verified": synced.verified,
            **selection.metrics,
            **prepared.metrics,
            **clock.laps,
        }
        if config.kl_coefficient:
            reference = batch.need("reference_log_probs")
            metrics["reference_kl"] = masked_mean(kl_penalty(policy.log_probs, reference, config.kl_estimator), batch.mask)
        return metrics, rollouts.rewards.view(len(problems), -1).mean(dim=1)


class ProblemSampler:
    """Draws problems, those more often that the policy solved less of when it last met them.

    Where all completions of a group get the same reward there is no gradient; DAPO (arXiv:2503.14476) throws such groups away
    after sampling, this avoids most of them before. Every rank draws the same: the seed and the rewards are.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int = 0, floor: float = 0.05) -> None:
        self._problems = list(problems)
        self._weights = torch.ones(len(problems))
        self._floor = floor
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.zeros(0, dtype=torch.int64)

    def draw(self, count: int) -> list[Problem]:
        """`count` different problems."""
        self._drawn = torch.multinomial(self._weights, count, generator=self._generator)
        return [self._problems[index] for index in self._drawn.tolist()]

    def update(self, mean_rewards: Tensor) -> None:
        """How well the problems of the last draw were solved, `[count]` in 0..1."""
        self._weights[self._drawn] = 1 - mean_rewards.clamp(0, 1) + self._floor


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
