"""Rollouts: the engine's rewarded completions, as batches that every trainer rank holds.

Rank 0 talks to the engine, computes rewards and shares the result; the other ranks have `engine=None`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.training.batch import Batch, Sequences
from mbridge_rl.training.rollout.episodes import (
    NOT_SAMPLED,
    Environment,
    Episode,
    EpisodeRunner,
    SamplingConfig,
    SamplingEngine,
    Tokenizer,
)
from mbridge_rl.training.rollout.rewards import InProcessJudge, Judge, Problem, RewardFunction, Verdict

T = TypeVar("T")

FailedRewards = Literal["mask", "zero", "raise"]
MAX_ERRORS = 3


@dataclass(frozen=True)
class RolloutBatch:
    """Sampled completions, rewarded.

    Attributes:
        batch: the tokens with `rollout_log_probs`; the rows of a group side by side. Only tokens that the policy wrote are in
            its mask.
        rewards: `[batch]` fp32; NaN where the reward raised, timed out or is no finite number.
        token_versions: `[batch, seq]` int64, the version of the weights that sampled the token that a position predicts; -1
            outside of the mask.
        truncated: `[batch]` bool, whether the completion was cut off.
        counts: numbers of the step, for example of groups thrown away.
        errors: the first few reasons of missing rewards.
        samples: `(prompt, completion)` texts; with several turns the completion is the whole transcript.
    """

    batch: Batch
    rewards: Tensor
    token_versions: Tensor
    truncated: Tensor
    counts: dict[str, int] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    samples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def versions(self) -> Tensor:
        """`[batch]` int64: the version of the oldest sampled token of each row, which is that of the weights that began the
        row."""
        unsampled = self.token_versions == NOT_SAMPLED
        return torch.where(unsampled, torch.iinfo(torch.int64).max, self.token_versions).amin(dim=1)


class RewardFailed(BridgeError, ValueError):
    """A reward failed, and the configuration (`RewardConfig.failed`) ends the run in this case."""


def assemble(
    episodes: Sequence[Episode],
    verdicts: Sequence[Verdict],
    *,
    pad_token_id: int,
    length: int | None = None,
    failed_rewards: FailedRewards = "mask",
) -> RolloutBatch:
    """Puts rewarded episodes into one padded batch, those of a group side by side.

    Args:
        failed_rewards: see `RewardConfig.failed`.

    Raises:
        RewardFailed: a reward is missing and `failed_rewards` is `raise`.
        ValueError: an episode is longer than `length`.
    """
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if errors and failed_rewards == "raise":
        raise RewardFailed(f"{len(errors)} of {len(verdicts)} rewards failed: {errors[0]}")
    batch = Batch.from_completions(
        [episode.prompt for episode in episodes],
        [episode.tokens for episode in episodes],
        pad_token_id=pad_token_id,
        length=length,
        log_probs=[episode.log_probs for episode in episodes],
    )
    versions = torch.full_like(batch.tokens, NOT_SAMPLED)
    for row, episode in enumerate(episodes):
        first = len(episode.prompt) - 1
        versions[row, first : first + len(episode.tokens)] = torch.tensor(episode.versions, dtype=torch.int64)
    missing = math.nan if failed_rewards == "mask" else 0.0
    rewards = [verdict.reward if verdict.error is None else missing for verdict in verdicts]
    return RolloutBatch(
        batch.with_tensors(mask=versions != NOT_SAMPLED),
        torch.tensor(rewards, dtype=torch.float32),
        versions,
        torch.tensor([episode.truncated for episode in episodes]),
        {"rewards_failed": len(errors)},
        tuple(dict.fromkeys(errors))[:MAX_ERRORS],
    )


def on_first_rank(group: RankGroup, function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result on every rank; the result may hold batches. An error that it raises
    there is raised on every rank."""
    return group.on_first_rank(function, (RolloutBatch, Batch, Sequences))


class Rollout:
    """Samples from an engine while the trainer waits. All ranks make it and call its methods together.

    Args:
        engine: the engine on rank 0; `None` elsewhere.
        tokenizer: encodes prompts and decodes completions.
        reward: a function that rewards a completion, or a judge.
        environment: makes the environment of a problem's episode; `None` for single turns.
        failed_rewards: see `RewardConfig.failed`.
    """

    def __init__(
        self,
        engine: SamplingEngine | None,
        tokenizer: Tokenizer,
        reward: RewardFunction | Judge,
        config: SamplingConfig | None = None,
        *,
        environment: Callable[[Problem], Environment] | None = None,
        failed_rewards: FailedRewards = "mask",
    ) -> None:
        self._tokenizer, self._config, self._failed_rewards = tokenizer, config or SamplingConfig(), failed_rewards
        self._judge: Judge = reward if hasattr(reward, "judge") else InProcessJudge(reward)  # type: ignore[assignment,arg-type]
        self._group = RankGroup()
        self._calls = 0
        if engine is None and self._group.rank == 0:
            raise ValueError("rank 0 has no engine: give Rollout(engine=...) one there")
        self._runner = None if engine is None else EpisodeRunner(engine, tokenizer, self._config, environment)

    def collect(self, problems: Sequence[Problem], group_size: int) -> RolloutBatch:
        """Samples and rewards `group_size` completions of every problem; on every rank."""
        self._calls += 1
        return on_first_rank(self._group, lambda: self._collect(problems, group_size))

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """Mean reward of the engine's greedy completions, on every rank. A reward that fails counts as 0."""

        def mean() -> float:
            verdicts = self._verdicts(self._finished(problems, 1, greedy=True))
            return sum(verdict.reward for verdict in verdicts) / max(len(verdicts), 1)

        return on_first_rank(self._group, mean)

    def greedy(self, problems: Sequence[Problem]) -> list[Episode]:
        """The engine's greedy episodes. Rank 0 only."""
        if self._runner is None:
            raise ValueError(f"rank {self._group.rank} has no engine; ask rank 0")
        return self._finished(problems, 1, greedy=True)

    def _collect(self, problems: Sequence[Problem], group_size: int) -> RolloutBatch:
        episodes = self._finished(problems, group_size)
        batch = assemble(
            episodes,
            self._verdicts(episodes),
            pad_token_id=self._tokenizer.pad_token_id,
            length=self._config.length,
            failed_rewards=self._failed_rewards,
        )
        assert self._runner is not None
        batch.samples.extend((episode.problem.prompt, self._runner.transcript(episode)) for episode in episodes)
        return batch

    def _finished(self, problems: Sequence[Problem], group_size: int, *, greedy: bool = False) -> list[Episode]:
        assert self._runner is not None
        episodes = [
            self._runner.start(problem, self._calls, index, sample)
            for index, problem in enumerate(problems)
            for sample in range(group_size)
        ]
        self._runner.run(episodes, greedy=greedy)
        return episodes

    def _verdicts(self, episodes: Sequence[Episode]) -> list[Verdict]:
        assert self._runner is not None
        return self._runner.verdicts(episodes, self._judge)
