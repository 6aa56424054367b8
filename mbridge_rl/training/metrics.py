"""Metrics of a step that do not depend on the objective (those that do are in `objectives.metrics`)."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.training.rollout.collect import RolloutBatch

Metrics = dict[str, float | int | str | bool | None]


def rollout_metrics(rollouts: RolloutBatch, version: int) -> Metrics:
    """Metrics of a batch on which weights of `version` are trained.

    Returns:
        `reward` (mean of the finite rewards), `reward_std`, `reward_min`, `reward_max`; `length_mean` and `length_max` (tokens
        that the policy wrote in a row), `prompt_length_mean` (tokens); `truncated` (share of the rows); `rollout_version`
        (version of the oldest token), `staleness_mean` and `staleness_max` (number of updates between a token's version and
        `version`); `partial` (share of the completions that more than one version wrote); and the batch's own counts.
    """
    mask, versions = rollouts.batch.mask, rollouts.token_versions
    rewards = rollouts.rewards[rollouts.rewards.isfinite()].double()
    lengths = mask.sum(dim=1).double()
    staleness = (version - versions)[mask].double()
    newest = versions.amax(dim=1)
    return {
        "reward": rewards.mean().item() if len(rewards) else None,
        "reward_std": rewards.std(correction=0).item() if len(rewards) else None,
        "reward_min": rewards.min().item() if len(rewards) else None,
        "reward_max": rewards.max().item() if len(rewards) else None,
        "length_mean": lengths.mean().item(),
        "length_max": int(lengths.max()),
        "prompt_length_mean": mask.int().argmax(dim=1).double().add(1).mean().item(),
        "truncated": rollouts.truncated.double().mean().item(),
        "rollout_version": int(rollouts.versions.min()),
        "staleness_mean": staleness.mean().item(),
        "staleness_max": int(staleness.max()),
        "partial": (newest > rollouts.versions).double().mean().item(),
        **rollouts.counts,
    }


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps of a batch; for `ratio_max_deviation` the largest value."""
    largest = {"ratio_max_deviation"}
    columns = {name: [update[name] for update in updates] for name in updates[0]}
    return {name: max(values) if name in largest else sum(values) / len(values) for name, values in columns.items()}


def memory_metrics() -> Metrics:
    """`memory_gib`: the peak memory of this rank, device memory with a GPU and resident memory without one."""
    if torch.cuda.is_available():
        return {"memory_gib": torch.cuda.max_memory_allocated() / (1 << 30)}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}


class Clock:
    """Wall time by phase: `with clock("train"): ...` adds to `train_seconds`."""

    def __init__(self) -> None:
        self._watch = Stopwatch("step")

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        return self._watch(phase)

    def metrics(self, tokens: int) -> Metrics:
        """The seconds of each phase and of the whole step, and `tokens` per second of the step."""
        step_seconds = self._watch.now() - self._watch.created
        phases = {f"{phase}_seconds": seconds for phase, seconds in self._watch.seconds.items()}
        return {**phases, "step_seconds": step_seconds, "tokens_per_second": tokens / step_seconds}
