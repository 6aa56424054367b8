"""The generator: a thread on the first rank that keeps an engine busy and has groups of rewarded episodes ready, in every mode.

The modes differ in two numbers. Batch `s` (counted from 0) is trained on by weights after `s` updates.

    max_staleness   a group may start while no more than `(updates + max_staleness + 1) * groups_per_step` have been started:
                    0 is synchronous, 1 lets the next batch be sampled while this one is trained on, more is a queue
    segment_tokens  None: weights change only when everything that may be started is finished (so every token is sampled by the
                    same version in every run); a number: they change between two segments, and unfinished episodes go on with
                    the new weights (partial rollouts, Kimi k1.5, arXiv:2501.12599)

Both together bound the age of every token: no token of batch `s` is older than `max_staleness` updates (AReaL,
arXiv:2505.24298, has the same rule for starting). A batch takes the groups that are ready, in the order of their start, but it
waits for groups that would be too old for the next batch. No group is thrown away for its age.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mbridge_rl.training.rollout.episodes import Episode, EpisodeRunner
from mbridge_rl.training.rollout.rewards import Judge, Problem, Verdict

_log = logging.getLogger(__name__)


class Problems(Protocol):
    """A source of problems that learns the mean reward of their groups: `sampler.EpochSampler`,
    `sampler.UnsolvedFirstSampler`."""

    def draw(self, count: int) -> list[Problem]: ...
    def update(self, problem: Problem, mean_reward: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class GeneratorConfig:
    """The settings of a generator; the module's docstring explains `max_staleness` and `segment_tokens`.

    Attributes:
        last_step: number of steps for which groups are started.
        dynamic_sampling: throw groups with equal rewards away, `max_rejected * groups_per_step` of them per step at most.
    """

    groups_per_step: int
    group_size: int
    last_step: int
    max_staleness: int = 0
    segment_tokens: int | None = None
    dynamic_sampling: bool = False
    max_rejected: int = 4


@dataclass
class EpisodeGroup:
    """Episodes of one problem.

    Attributes:
        index: number of groups that were started before this one.
        last_step: number (counted from 0) of the last batch that may take this group; it would be too old for a later one.
        verdicts: verdicts on its episodes; empty while some are unfinished.
    """

    index: int
    problem: Problem
    last_step: int
    episodes: list[Episode]
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def informative(self) -> bool:
        """Whether the rewards of its episodes differ."""
        return len({verdict.reward for verdict in self.verdicts if verdict.error is None}) > 1


Group = EpisodeGroup  # the name in checkpoints of version 0.1, which pickled unfinished groups


class Generator:
    """Samples and rewards groups of episodes in a thread. Made on the first rank only; paused until the first `resume`."""

    def __init__(self, runner: EpisodeRunner, problems: Problems, judge: Judge, config: GeneratorConfig) -> None:
        self._runner, self._problems, self._judge, self.config = runner, problems, judge, config
        self._groups: list[EpisodeGroup] = []
        self._started = self._taken = self._updates = 0
        self._rejected = self._rejected_since_take = 0
        self._paused, self._pause_wanted, self._busy, self._closed = True, False, False, False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rollout-generator", daemon=True)
        self._thread.start()

    def take(self) -> tuple[list[EpisodeGroup], int]:
        """Waits for the groups of the next batch; returns them and the number of groups thrown away since the last batch.

        Raises:
            Exception: what the engine raised; call `retry` when it can generate again.
        """
        with self._changed:
            self._wait(lambda: self._chosen() is not None)
            chosen = self._chosen() or []
            self._groups = [group for group in self._groups if group not in chosen]
            self._taken += 1
            rejected, self._rejected_since_take = self._rejected_since_take, 0
            self._changed.notify_all()
        return chosen, rejected

    def pause(self) -> None:
        """Stops sampling, and returns when the engine's weights may change.

        Raises:
            Exception: as in `take`.
        """
        with self._changed:
            if self._paused:
                return
            self._pause_wanted = self.config.segment_tokens is not None
            self._wait(lambda: not self._busy and (self._pause_wanted or not self._has_work()))
            self._paused, self._pause_wanted = True, False

    def resume(self, updates: int) -> None:
        """Goes on sampling, with weights after `updates` updates."""
        with self._changed:
            self._updates, self._paused = updates, False
            self._changed.notify_all()

    def retry(self) -> None:
        """Goes on after a failure of the engine; episodes keep the tokens that they have."""
        with self._changed:
            self._failure = None
            self._changed.notify_all()

    def close(self) -> None:
        """Waits until the engine has answered its last call, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._judge.close()

    def verdicts(self, episodes: Sequence[Episode]) -> list[Verdict]:
        """The verdicts on finished episodes, by their environments or by the judge."""
        return self._runner.verdicts(episodes, self._judge)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on in another process, with unfinished episodes. Call it only while paused."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {"counters": counters, "groups": self._groups, "problems": self._problems.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; call it before the first `resume`."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._groups = state["groups"]
        self._problems.load_state_dict(state["problems"])

    def _wait(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    def _chosen(self) -> list[EpisodeGroup] | None:
        """The groups of the next batch; `None` if too few are ready, or if a group that is left could then not be taken in
        time."""
        per_step = self.config.groups_per_step
        ready = [group for group in self._groups if group.verdicts][:per_step]
        if len(ready) < per_step:
            return None
        left = [group for group in self._groups if group not in ready]
        for steps in range(self.config.max_staleness + 1):
            if sum(group.last_step <= self._taken + steps for group in left) > steps * per_step:
                return None
        return ready

    def _startable(self) -> int:
        """How many groups may be started now."""
        steps = min(self._updates + self.config.max_staleness + 1, self.config.last_step)
        free = steps * self.config.groups_per_step - (self._started - self._rejected)
        if self.config.segment_tokens is None:  # one batch at a time, so that calls of the engine are the same in every run
            return 0 if self._under_way() else min(free, self.config.groups_per_step)
        return free

    def _under_way(self) -> list[Episode]:
        return [episode for group in self._groups if not group.verdicts for episode in group.episodes if not episode.finish]

    def _has_work(self) -> bool:
        return bool(self._under_way()) or self._startable() > 0

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_work())
                if self._closed:
                    return
                self._start_groups()
                episodes, self._busy = self._under_way(), True
            failure = None
            try:
                self._runner.advance(episodes, self.config.segment_tokens)
                judged = self._judged()
            except Exception as error:  # `take` and `pause` raise it
                failure = error
            with self._changed:
                if failure is None:
                    self._record_verdicts(judged)
                self._busy, self._failure = False, failure
                self._changed.notify_all()

    def _may_work(self) -> bool:
        return not (self._paused or self._pause_wanted or self._failure) and self._has_work()

    def _start_groups(self) -> None:
        count, size = self._startable(), self.config.group_size
        for problem in self._problems.draw(count) if count > 0 else ():
            episodes = [self._runner.start(problem, self._started, sample) for sample in range(size)]
            last_step = self._updates + self.config.max_staleness
            self._groups.append(EpisodeGroup(self._started, problem, last_step, episodes))
            self._started += 1

    def _judged(self) -> list[tuple[EpisodeGroup, list[Verdict]]]:
        """The groups that have finished in this round, with the verdicts on their episodes."""
        finished = [group for group in self._groups if not group.verdicts and all(episode.finish for episode in group.episodes)]
        verdicts = iter(self.verdicts([episode for group in finished for episode in group.episodes]))
        return [(group, [next(verdicts) for _ in group.episodes]) for group in finished]

    def _record_verdicts(self, judged: Sequence[tuple[EpisodeGroup, list[Verdict]]]) -> None:
        for group, verdicts in judged:
            group.verdicts = verdicts
            rewards = [verdict.reward for verdict in verdicts if verdict.error is None]
            if rewards:
                self._problems.update(group.problem, sum(rewards) / len(rewards))
            limit = self.config.max_rejected * self.config.groups_per_step
            if self.config.dynamic_sampling and not group.informative and self._rejected_since_take < limit:
                self._groups.remove(group)
                self._rejected += 1
                self._rejected_since_take += 1


_COUNTERS = ("_started", "_taken", "_updates", "_rejected", "_rejected_since_take")
