"""Batches of rollouts for the training loop in every mode: this module brings what the generator on rank 0 has to all ranks.

All ranks make the source and call its methods together. The generator, its thread and the engines are on rank 0.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.errors import EngineProcessError
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.weight_sync import SyncReport
from mbridge_rl.training.fleet import EngineFleet
from mbridge_rl.training.rollout.collect import FailedRewards, RolloutBatch, assemble, on_first_rank
from mbridge_rl.training.rollout.episodes import EpisodeRunner
from mbridge_rl.training.rollout.generator import EpisodeGroup, Generator
from mbridge_rl.training.rollout.rewards import Problem


class RolloutSource:
    """Returns batches of rollouts; between `publish` and `resume` the engines do not sample.

    Args:
        fleet: the engines from which `runner` samples.
        generator: the generator on rank 0; `None` elsewhere.
        runner: the runner of episodes on rank 0; `None` elsewhere.
        out_of_the_way: makes a context that every rank enters while batches are sampled and problems evaluated, and that may
            free the trainer's memory. It has ended, and the trainer's weights are back, when a lost engine is replaced.
    """

    def __init__(
        self,
        fleet: EngineFleet,
        *,
        generator: Generator | None,
        runner: EpisodeRunner | None,
        pad_token_id: int,
        length: int | None = None,
        failed_rewards: FailedRewards = "mask",
        out_of_the_way: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._out_of_the_way = out_of_the_way
        self._fleet, self._generator, self._runner = fleet, generator, runner
        self._pad_token_id, self._length, self._failed_rewards = pad_token_id, length, failed_rewards
        self._group, self.version = RankGroup(), 0

    def next(self) -> RolloutBatch:
        """The next batch, on every rank.

        Raises:
            EngineProcessError: too many engines were lost.
            RewardFailed: see `assemble`.
        """
        return self._retry_when_engines_are_lost(lambda: self._batch(*self._on_first_rank()[1].take()), sampling=True)

    def publish(self, version: int) -> SyncReport:
        """Waits until the engines' weights may change, and sends them the trainer's as `version`. Sampling goes on after
        `resume`."""
        self._retry_when_engines_are_lost(lambda: self._on_first_rank()[1].pause())
        report = self._fleet.sync(version)
        self.version = version
        return report

    def resume(self, updates: int) -> None:
        """Goes on sampling, with weights after `updates` updates."""
        if self._generator is not None:
            self._generator.resume(updates)

    def evaluate(self, problems: Sequence[Problem]) -> list[tuple[str, float]]:
        """Greedy completions (of several turns: the whole transcript) with their rewards, on every rank. Call it between
        `publish` and `resume`. A failed reward counts as 0."""

        def completed() -> list[tuple[str, float]]:
            runner, generator = self._on_first_rank()
            episodes = [runner.start(problem, -1, index) for index, problem in enumerate(problems)]
            runner.run(episodes, greedy=True)
            verdicts = generator.verdicts(episodes)
            return [(runner.transcript(episode), verdict.reward) for episode, verdict in zip(episodes, verdicts, strict=True)]

        return self._retry_when_engines_are_lost(completed, sampling=True)

    def state(self) -> Tensor:
        """The generator's state with its unfinished episodes, pickled: a uint8 tensor, the same on every rank. Call it between
        `publish` and `resume`."""
        pickled = on_first_rank(self._group, lambda: pickle.dumps(self._on_first_rank()[1].state_dict()))
        return torch.frombuffer(bytearray(pickled), dtype=torch.uint8)

    def load_state(self, state: Tensor) -> None:
        """Loads what `state` returned; call it before the first `resume`. Unpickling runs code: the state must come from the
        run's own checkpoints."""
        if self._generator is not None:
            self._generator.load_state_dict(pickle.loads(state.numpy().tobytes()))

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()

    def _retry_when_engines_are_lost(self, function: Callable[[], Any], *, sampling: bool = False) -> Any:
        """Calls `function` on rank 0 and returns its result on every rank; calls it again whenever an engine was lost and
        replaced."""
        while True:
            try:
                with ExitStack() as stack:
                    if sampling:
                        with self._group.fail_together():
                            stack.enter_context(self._out_of_the_way())
                    return on_first_rank(self._group, function)
            except EngineProcessError as error:
                self._fleet.replace_lost(self.version, error)
                if self._generator is not None:
                    self._generator.retry()

    def _on_first_rank(self) -> tuple[EpisodeRunner, Generator]:
        assert self._runner is not None
        assert self._generator is not None
        return self._runner, self._generator

    def _batch(self, groups: list[EpisodeGroup], rejected: int) -> RolloutBatch:
        episodes = [episode for group in groups for episode in group.episodes]
        batch = assemble(
            episodes,
            [verdict for group in groups for verdict in group.verdicts],
            pad_token_id=self._pad_token_id,
            length=self._length,
            failed_rewards=self._failed_rewards,
        )
        counts = {**batch.counts, "groups_rejected": rejected, "turns": sum(max(episode.turns, 1) for episode in episodes)}
        runner, _ = self._on_first_rank()
        samples = [(episode.problem.prompt, runner.transcript(episode)) for episode in episodes]
        return replace(batch, counts=counts, samples=samples)
