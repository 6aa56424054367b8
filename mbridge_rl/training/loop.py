"""The training loop.

    train() in this file; the weights before step s are version s
      |
      +-> sample   rollout/sampler.py           chooses the problems
      |     |      rollout/generator.py         a thread on rank 0 samples episodes (episodes.py) from the engines (fleet.py)
      |     v
      |   reward   rollout/rewards.py           a judge gives every episode a verdict
      |     |      rollout/batches.py           brings the batch to every rank
      |     v
      |   prepare  objectives/prepare.py        leaves rows out, shapes rewards (shaping.py), computes advantages
      |     |                                   (advantages.py) and importance weights (correction.py)
      |     |      trainer/megatron_trainer.py  computes old and reference log-probabilities
      |     v
      |   update   objectives/mini_batches.py   divides the batch: one optimizer step for each mini-batch
      |     |      trainer/megatron_trainer.py  forward, loss (objectives/loss.py), backward, optimizer step
      |     v
      |   sync     fleet.py                     sends the weights to all engines as version s + 1
      |     |
      +-----+      then the hooks (made in run/rank.py): evaluation and checkpoint (checkpoint/saved_state.py), where due

`GRPO.update` is prepare and update. The loop is the same in every mode: the rollout source decides whether the next batch is
sampled before, while or after this one is trained on. A step relies on one thing only: every token names the version of the
weights that sampled it.
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
    """Updates the policy by one batch of rollouts at a time. All trainer ranks make it and call it together.

    Args:
        trainer: the policy's trainer; its present weights become the reference policy where the config needs one.
        config: the objective.
        seed: decides, together with the step, which groups form a mini-batch.
    """

    def __init__(self, trainer: MegatronTrainer, config: GRPOConfig, *, seed: int = 0) -> None:
        self.trainer, self.config, self._seed = trainer, config, seed
        self._loss = grpo_loss(config)
        if config.kl_coefficient:
            trainer.snapshot_reference()

    def update(self, rollouts: RolloutBatch, step: int) -> Metrics:
        """Makes the optimizer steps on `rollouts`: one for each mini-batch of each epoch, except mini-batches without a
        gradient.

        Args:
            step: the number of the loop's step; with the seed it decides which groups form a mini-batch.

        Returns:
            Metrics, the same on every rank; `skipped` says why there was no optimizer step, and is `None` if there was.

        Raises:
            ValueError: no reward is finite; the message has the first reasons.
        """
        trainer, config = self.trainer, self.config
        if not rollouts.rewards.isfinite().any():
            raise ValueError(f"none of the {len(rollouts.rewards)} rewards is known: {'; '.join(rollouts.errors)}")

        # Leave out rows that cannot be trained on, and shape the rewards.
        selection = select_rows(config, rollouts.batch, rollouts.rewards, truncated=rollouts.truncated)
        batch = selection.batch
        if reason := self._nothing_to_learn(rollouts, batch.num_tokens, selection.metrics):
            return {**selection.metrics, "updates": 0, "skipped": reason}

        # The denominator of the ratio in all updates: the trainer's own log-probabilities, or the engine's.
        recompute = config.old_log_probs == "recompute"
        old = trainer.compute_log_probs(batch).log_probs if recompute else batch.need("rollout_log_probs")
        batch = batch.with_tensors(old_log_probs=old)
        if config.kl_coefficient:
            batch = batch.with_tensors(reference_log_probs=trainer.reference_log_probs(batch))

        # Advantages and importance weights are computed on the whole batch.
        prepared = prepare_batch(config, batch, selection.rewards)
        batch = prepared.batch

        # The first optimizer step sees the old policy, with a ratio of 1; the objective bounds the ratio of the later ones.
        updates = [(part, trainer.step(part, self._loss)) for part in self._mini_batches(batch, step)]
        if not updates:
            return {**selection.metrics, **prepared.metrics, "updates": 0, "skipped": "every advantage is zero"}

        # Compare the trainer with the engine before the first update: on the whole batch where its log-probabilities were
        # computed, otherwise on the first mini-batch.
        first, report = updates[0]
        log_probs_before, compared = (old, batch) if recompute else (report.statistics.log_probs, first)
        return {
            "updates": sum(report.updated for _, report in updates),
            "updated": all(report.updated for _, report in updates),
            "tokens": batch.num_tokens,
            **selection.metrics,
            **prepared.metrics,
            **over_updates([self._step_metrics(part, report) for part, report in updates]),
            **mismatch_metrics(log_probs_before, compared.need("rollout_log_probs"), compared.mask),
            "skipped": None,
        }

    def _step_metrics(self, part: Batch, report: StepReport) -> dict[str, float]:
        """The metrics of one optimizer step on the mini-batch `part`."""
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
        """The mini-batches that have a gradient. A step without one would still move weights by the optimizer's momentum."""
        config = self.config
        has_other_terms = config.kl_coefficient or config.entropy_coefficient
        for rows in mini_batch_rows(
            len(batch), config.group_size, config.mini_batches, config.epochs, seed=self._seed, step=step
        ):
            part = batch.rows(rows)
            if part.num_tokens and (has_other_terms or part.need("advantages").any()):
                yield part

    def _nothing_to_learn(self, rollouts: RolloutBatch, tokens: int, counts: dict[str, float]) -> str | None:
        """The reason why there will be no optimizer step, `None` if there may be one; known before anything is computed."""
        if tokens == 0:
            return f"no token of the {len(rollouts.batch)} completions counts"
        groups = len(rollouts.batch) // self.config.group_size
        has_other_terms = self.config.kl_coefficient or self.config.entropy_coefficient
        has_baseline = self.config.baseline != "none"
        if has_baseline and counts["constant_groups"] == groups and not has_other_terms:
            return f"all {groups} groups have constant rewards, so that every advantage is zero"
        return None


@dataclass(frozen=True)
class LoopHooks:
    """Functions that the loop calls around its steps; all ranks call all of them.

    Attributes:
        evaluate: takes the number of the last step (0 before the first one) and returns the greedy accuracy of the engines with
            their present weights, or `None` where no evaluation is due.
        save: takes the number of the last step and saves a checkpoint, if one is due.
        log: takes the metrics of a step and its rollouts.
        enough: takes the accuracy of the last evaluation and returns whether the run may end.
    """

    evaluate: Callable[[int], float | None]
    save: Callable[[int], None]
    log: Callable[[Metrics, RolloutBatch], None]
    enough: Callable[[float], bool]


class Trained(NamedTuple):
    """The number of the last step, and the accuracy before the first step, `None` if it was not evaluated."""

    last_step: int
    accuracy_before: float | None


def train(
    grpo: GRPO, source: RolloutSource, fleet: EngineFleet, hooks: LoopHooks, *, first_step: int, last_step: int
) -> Trained:
    """Runs steps `first_step..last_step`, counted from 1. Each step trains on one batch and publishes the next version: the
    weights before step `s` are version `s`."""
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
