"""The generator: a thread on the first rank that keeps an engine busy and groups of rewarded episodes ready. One for all modes.

What tells the modes apart are two numbers. Batch `s` (counted from 0) is trained at weights that have seen `s` updates.

    max_staleness   a group may start while no more than `(updates + max_staleness + 1) * groups_per_step` have been started:
                    0 is synchronous, 1 lets the next batch be sampled while this one is trained on, more is a queue
    segment_tokens  None: weights change only when everything that may be started is finished (so which weights sampled what is
                    the same in every run); a number: they change between two segments, and unfinished episodes go on with the
                    new weights (partial rollouts, Kimi k1.5, arXiv:2501.12599)

Both together bound the age of every token: no token of batch `s` is older than `max_staleness` updates (AReaL,
arXiv:2505.24298, has the same rule for starting). Groups are taken as they are ready, the first started first, except that a
batch waits for groups that would be too old for the next; none is thrown away for its age.
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
    """Where problems come from, and what they learn of their groups: `sampler.EpochSampler`, `sampler.UnsolvedFirstSampler`."""

    def draw(self, count: int) -> list[Problem]: ...
    def update(self, problem: Problem, mean_reward: float) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class GeneratorConfig:
    """See the module's docstring.

    Attributes:
        last_step: groups are started for so many steps in all.
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
class Group:
    """Episodes of one problem.

    Attributes:
        index: of all groups that were started.
        last_step: of the batch (counted from 0) that must have it, lest it be too old.
        verdicts: of its episodes; empty while some are under way.
    """

    index: int
    problem: Problem
    last_step: int
    episodes: list[Episode]
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def informative(self) -> bool:
        """Whether its rewards differ."""
        return len({verdict.reward for verdict in self.verdicts if verdict.error is None}) > 1


class Generator:
    """Made on the first rank; paused until `resume`."""

    def __init__(self, runner: EpisodeRunner, problems: Problems, judge: Judge, config: GeneratorConfig) -> None:
        self._runner, self._problems, self._judge, self.config = runner, problems, judge, config
        self._groups: list[Group] = []
        self._started = self._taken = self._updates = 0
        self._rejected = self._rejected_since_take = 0
        self._paused, self._pause_wanted, self._busy, self._closed = True, False, False, False
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rollout-generator", daemon=True)
        self._thread.start()

    def take(self) -> tuple[list[Group], int]:
        """The groups of the next batch, and how many were thrown away since the last; waits for them.

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
        """Returns when the engine's weights may change.

        Raises:
            Exception: as `take`.
        """
        with self._changed:
            if self._paused:
                return
            self._pause_wanted = self.config.segment_tokens is not None
            self._wait(lambda: not self._busy and (self._pause_wanted or not self._has_work()))
            self._paused, self._pause_wanted = True, False

    def resume(self, updates: int) -> None:
        """Goes on, with weights that have seen so many updates."""
        with self._changed:
            self._updates, self._paused = updates, False
            self._changed.notify_all()

    def retry(self) -> None:
        """Goes on where the engine had failed: episodes keep what they have."""
        with self._changed:
            self._failure = None
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread, when the engine has answered its last call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._judge.close()

    def verdicts(self, episodes: Sequence[Episode]) -> list[Verdict]:
        """Of finished episodes: their environments', or the judge's."""
        return self._runner.verdicts(episodes, self._judge)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on in another process, unfinished episodes included; while paused only."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {"counters": counters, "groups": self._groups, "problems": self._problems.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first `resume`."""
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._groups = state["groups"]
        self._problems.load_state_dict(state["problems"])

    def _wait(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    def _chosen(self) -> list[Group] | None:
        """A whole batch that is ready and leaves no group behind that could then not be taken in time."""
        each = self.config.groups_per_step
        ready = [group for group in self._groups if group.verdicts][:each]
        if len(ready) < each:
            return None
        left = [group for group in self._groups if group not in ready]
        for steps in range(self.config.max_staleness + 1):
            if sum(group.last_step <= self._taken + steps for group in left) > steps * each:
                return None
        return ready

    def _startable(self) -> int:
        """How many groups may be started now."""
        steps = min(self._updates + self.config.max_staleness + 1, self.config.last_step)
        free = steps * self.config.groups_per_step - (self._started - self._rejected)
        if self.config.segment_tokens is None:  # batch by batch, so that calls of the engine are the same in every run
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
            except Exception as error:  # raised where somebody waits
                failure = error
            with self._changed:
                if failure is None:
                    self._keep(judged)
                self._busy, self._failure = False, failure
                self._changed.notify_all()

    def _may_work(self) -> bool:
        return not (self._paused or self._pause_wanted or self._failure) and self._has_work()

    def _start_groups(self) -> None:
        count, size = self._startable(), self.config.group_size
        for problem in self._problems.draw(count) if count > 0 else ():
            episodes = [self._runner.start(problem, self._started, sample) for sample in range(size)]
            last_step = self._updates + self.config.max_staleness
            self._groups.append(Group(self._started, problem, last_step, episodes))
            self._started += 1

    def _judged(self) -> list[tuple[Group, list[Verdict]]]:
        """Groups that are finished now, with the verdicts of their episodes."""
        finished = [group for group in self._groups if not group.verdicts and all(episode.finish for episode in group.episodes)]
        said = iter(self.verdicts([episode for group in finished for episode in group.episodes]))
        return [(group, [next(said) for _ in group.episodes]) for group in finished]

    def _keep(self, judged: Sequence[tuple[Group, list[Verdict]]]) -> None:
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
