"""The training loop, top to bottom: rollouts, log-probabilities, advantages, optimizer steps, sync; evaluation, checkpoint.

The loop is the same in every mode. Whether the next batch is sampled before, while or after this one is trained on is between
the rollout source and the engines; what a step may rely on is that every token says which weights sampled it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.fleet import EngineFleet
from mbridge_rl.training.metrics import Clock, Metrics, memory_metrics, over_updates, rollout_metrics
from mbridge_rl.training.objectives.aggregation import masked_mean
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.loss import grpo_loss, policy_metrics
from mbridge_rl.training.objectives.metrics import mismatch_metrics
from mbridge_rl.training.objectives.mini_batches import mini_batch_rows
from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
from mbridge_rl.training.rollout.batches import RolloutSource
from mbridge_rl.training.rollout.collect import RolloutBatch
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer
from mbridge_rl.training.trainer.step_report import StepReport


class GRPO:
    """The policy's update. Made and called by all trainer ranks together.

    Args:
        trainer: of the policy; its present weights become the reference where the config wants one.
        config: of the objective.
        seed: of the order in which groups come to mini-batches.
    """

    def __init__(self, trainer: MegatronTrainer, config: GRPOConfig, *, seed: int = 0) -> None:
        self.trainer, self.config, self._seed = trainer, config, seed
        self._loss = grpo_loss(config)
        if config.kl_coefficient:
            trainer.snapshot_reference()

    def update(self, rollouts: RolloutBatch, step: int) -> Metrics:
        """The optimizer steps on `rollouts`: one for each mini-batch of each epoch that there is something to learn from.

        Args:
            step: of the loop; with the seed it decides which groups come together.

        Returns:
            Metrics, the same on every rank; `skipped` says why there was no optimizer step, and is `None` if there was.

        Raises:
            ValueError: no reward is known; the message has the first reasons.
        """
        trainer, config = self.trainer, self.config
        if not rollouts.rewards.isfinite().any():
            raise ValueError(f"none of the {len(rollouts.rewards)} rewards is known: {'; '.join(rollouts.errors)}")

        # Rows that count, and rewards as the objective shapes them.
        selection = select_rows(config, rollouts.batch, rollouts.rewards, truncated=rollouts.truncated)
        batch = selection.batch
        if reason := self._nothing_to_learn(rollouts, batch.num_tokens, selection.metrics):
            return {**selection.metrics, "updates": 0, "skipped": reason}

        # What the ratio divides by in all updates: the trainer's own log-probabilities, or the engine's.
        recompute = config.old_log_probs == "recompute"
        old = trainer.compute_log_probs(batch).log_probs if recompute else batch.need("rollout_log_probs")
        batch = batch.with_tensors(old_log_probs=old)
        if config.kl_coefficient:
            batch = batch.with_tensors(reference_log_probs=trainer.reference_log_probs(batch))

        # Advantages and importance weights, on the whole batch.
        prepared = prepare_batch(config, batch, selection.rewards)
        batch = prepared.batch

        # Optimizer steps. The first meets the old policy; the ratio of those that follow is what the objective bounds.
        updates = [(part, trainer.step(part, self._loss)) for part in self._mini_batches(batch, step)]
        if not updates:
            return {**selection.metrics, **prepared.metrics, "updates": 0, "skipped": "every advantage is zero"}

        # The trainer against the engine: before the first update, and so of the whole batch only where that was computed.
        first, report = updates[0]
        before, seen = (old, batch) if recompute else (report.statistics.log_probs, first)
        return {
            "updates": sum(report.updated for _, report in updates),
            "updated": all(report.updated for _, report in updates),
            "tokens": batch.num_tokens,
            **selection.metrics,
            **prepared.metrics,
            **over_updates([self._measured(part, report) for part, report in updates]),
            **mismatch_metrics(before, seen.need("rollout_log_probs"), seen.mask),
            "skipped": None,
        }

    def _measured(self, part: Batch, report: StepReport) -> dict[str, float]:
        """Of one optimizer step."""
        policy, config = report.statistics, self.config
        metrics = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "entropy": masked_mean(policy.entropy, part.mask),
            **policy_metrics(policy.log_probs, part, config),
        }
        if config.kl_coefficient:
            kl = kl_penalty(policy.log_probs, part.need("reference_log_probs"), config.kl_estimator)
            metrics["reference_kl"] = masked_mean(kl, part.mask)
        return metrics

    def _mini_batches(self, batch: Batch, step: int) -> Iterator[Batch]:
        """Those with a gradient: a step without any would still move weights by the optimizer's momentum."""
        config = self.config
        others = config.kl_coefficient or config.entropy_coefficient
        for rows in mini_batch_rows(
            len(batch), config.group_size, config.mini_batches, config.epochs, seed=self._seed, step=step
        ):
            part = batch.rows(rows)
            if part.num_tokens and (others or part.need("advantages").any()):
                yield part

    def _nothing_to_learn(self, rollouts: RolloutBatch, tokens: int, counts: dict[str, float]) -> str | None:
        """Why there will be no optimizer step, known before anything is computed."""
        if tokens == 0:
            return f"no token of the {len(rollouts.batch)} completions counts"
        groups = len(rollouts.batch) // self.config.group_size
        others = self.config.kl_coefficient or self.config.entropy_coefficient
        compared = self.config.baseline != "none"
        if compared and counts["constant_groups"] == groups and not others:
            return f"all {groups} groups have constant rewards, so that every advantage is zero"
        return None


@dataclass(frozen=True)
class LoopHooks:
    """What happens around the steps; all ranks call all of them.

    Attributes:
        evaluate: greedy accuracy of the engines as they are, after a step (0: before the first); `None` where it is not due.
        save: a checkpoint after a step, if it is due.
        log: metrics of a step, with its rollouts.
        enough: whether the run has reached what it was for, by its last evaluation.
    """

    evaluate: Callable[[int], float | None]
    save: Callable[[int], None]
    log: Callable[[Metrics, RolloutBatch], None]
    enough: Callable[[float], bool]


class Trained(NamedTuple):
    """The last step that was made, and the accuracy before the first, if it was evaluated."""

    last_step: int
    accuracy_before: float | None


def train(
    grpo: GRPO, source: RolloutSource, fleet: EngineFleet, hooks: LoopHooks, *, first_step: int, last_step: int
) -> Trained:
    """Steps `first_step..last_step`, counted from 1: of each a batch, and one version more. The weights before step `s` are
    version `s`."""
    source.publish(first_step)
    accuracy = before = hooks.evaluate(first_step - 1)
    source.resume(first_step - 1)
    for step in range(first_step, last_step + 1):
        if accuracy is not None and hooks.enough(accuracy):
            return Trained(step - 1, before)
        clock, lost = Clock(), fleet.lost

        with clock("rollout"):
            rollouts = source.next()

        with clock("train"):
            update = grpo.update(rollouts, step)

        with clock("sync"):
            synced = source.publish(step + 1)

        with clock("evaluate"):
            accuracy = hooks.evaluate(step)

        with clock("checkpoint"):
            hooks.save(step)
        source.resume(step)

        metrics: Metrics = {
            "step": step,
            "version": step + 1,
            **rollout_metrics(rollouts, version=step),
            **update,
            "accuracy": accuracy,
            "refit_ms": synced.seconds * 1e3,
            "digest": synced.digest,
            "verified": synced.verified,
            "refit_share": synced.share,
            "engines_lost": fleet.lost - lost,
            "engines_resting": len(synced.failed),
            **memory_metrics(),
            **clock.metrics(rollouts.batch.num_tokens),
        }
        hooks.log(metrics, rollouts)
    return Trained(last_step, before)
