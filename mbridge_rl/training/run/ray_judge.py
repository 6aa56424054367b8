"""Rewards in Ray actors: an actor that takes too long or dies costs only one completion its reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mbridge_rl.sync.vllm.engines.ray_actor import import_ray
from mbridge_rl.training.rollout.rewards import Judge, Question, RewardFunction, Verdict, verdict_of
from mbridge_rl.training.run.tasks import make_judge, reward_function


class RewardActor:
    """An actor that computes rewards, one at a time."""

    def __init__(self, factory: Callable[[], RewardFunction]) -> None:
        self._function = factory()

    def verdict(self, question: Question) -> Verdict:
        return verdict_of(self._function, *question)


class RayJudge:
    """Rewards completions in actors. An actor that takes too long or dies is replaced, and costs only one completion its
    reward.

    Args:
        timeout: seconds for one reward, after the actor's start.
    """

    def __init__(self, factory: Callable[[], RewardFunction], workers: int, timeout: float) -> None:
        self._ray, self._factory, self._timeout = import_ray(), factory, timeout
        self._workers = [self._start() for _ in range(workers)]

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        ray, verdicts = self._ray, [Verdict(error="no verdict")] * len(questions)
        waiting, pending = list(range(len(questions)))[::-1], {}
        while waiting or pending:
            busy = {worker for worker, _, _ in pending.values()}
            for worker in range(len(self._workers)):
                if waiting and worker not in busy:
                    index = waiting.pop()
                    call = self._workers[worker].verdict.remote(questions[index])
                    pending[call] = (worker, index, time.monotonic() + self._timeout)
            deadline = min(deadline for _, _, deadline in pending.values())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            late = [call for call, (_, _, until) in pending.items() if call not in ready and time.monotonic() >= until]
            for call in ready:
                worker, index, _ = pending.pop(call)
                verdicts[index] = self._answer(call, worker)
            for call in late:
                worker, index, _ = pending.pop(call)
                verdicts[index] = Verdict(error=f"the reward took longer than {self._timeout:g} s; its actor was ended")
                self._restart(worker)
        return verdicts

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)

    def _answer(self, call: Any, worker: int) -> Verdict:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._restart(worker)
            return Verdict(error=f"the reward's actor was lost: {str(error).splitlines()[0]}")

    def _start(self) -> Any:
        worker = self._ray.remote(RewardActor).options(num_cpus=0).remote(self._factory)
        self._ray.get(worker.__ray_ready__.remote())
        return worker

    def _restart(self, worker: int) -> None:
        self._ray.kill(self._workers[worker])
        self._workers[worker] = self._start()


def make_ray_judge(task: Any, reward: Any) -> Judge:
    """Makes the judge whose workers are actors. Without workers, or with a service, it is the judge of a local run."""
    if reward.workers:
        return RayJudge(partial(reward_function, task, reward), reward.workers, reward.timeout)
    return make_judge(task, reward)
