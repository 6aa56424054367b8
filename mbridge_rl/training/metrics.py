"""What a step is measured by, besides what the objective says of itself (`objectives.metrics`)."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.training.rollout.collect import RolloutBatch

Metrics = dict[str, float | int | str | bool | None]


def rollout_metrics(rollouts: RolloutBatch, version: int) -> Metrics:
    """Of a batch that is trained on at weights of `version`.

    Returns:
        `reward` (mean of those that are known), `reward_std`, `reward_min`, `reward_max`; `length_mean` and `length_max` of
        what the policy wrote, `prompt_length_mean`; `truncated` (share); `rollout_version` (of the oldest token),
        `staleness_mean` and `staleness_max` (updates that tokens are behind); `partial` (share of completions that more than
        one version wrote); and the batch's counts.
    """
    mask, versions = rollouts.batch.mask, rollouts.token_versions
    rewards = rollouts.rewards[rollouts.rewards.isfinite()].double()
    lengths = mask.sum(dim=1).double()
    behind = (version - versions)[mask].double()
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
        "staleness_mean": behind.mean().item(),
        "staleness_max": int(behind.max()),
        "partial": (newest > rollouts.versions).double().mean().item(),
        **rollouts.counts,
    }


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps of a batch; of `ratio_max_deviation` the largest."""
    largest = {"ratio_max_deviation"}
    columns = {name: [update[name] for update in updates] for name in updates[0]}
    return {name: max(values) if name in largest else sum(values) / len(values) for name, values in columns.items()}


def memory_metrics() -> Metrics:
    """`memory_gib`: the most that this rank has held, of device memory with a GPU and resident without."""
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
        """The phases, the whole step, and its tokens per second."""
        whole = self._watch.now() - self._watch.created
        phases = {f"{phase}_seconds": seconds for phase, seconds in self._watch.seconds.items()}
        return {**phases, "step_seconds": whole, "tokens_per_second": tokens / whole}
