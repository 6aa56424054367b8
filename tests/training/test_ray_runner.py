"""What Ray is asked for, and what is said where it cannot give it or an actor is lost: on a real cluster of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

import ray

from mbridge_rl.training.rollout.rewards import Problem, RewardFunction, Verdict
from mbridge_rl.training.run import ray_runner
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import ConfigError, parse_config
from mbridge_rl.training.run.launcher import LaunchError
from mbridge_rl.training.run.ray_judge import RayJudge, make_ray_judge
from mbridge_rl.training.run.ray_runner import launch_on_ray

SUPPORT = str(Path(__file__).parents[1] / "support")
CPUS = 2


def config_of(tmp_path: Path, **sections: Any) -> RunConfig:
    return parse_config(RunConfig, {"model": {"path": "toy:qwen3"}, "run_dir": tmp_path / "run", **sections})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
        )
        ray.init(num_cpus=CPUS, object_store_memory=128 << 20, include_dashboard=False, logging_level="error")
        yield ray
        ray.shutdown()


def treacherous(problem: Problem, completion: str) -> float:
    if completion == "hang":
        time.sleep(600)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise KeyError("no such thing")
    return float(completion == problem.answer)


def make_treacherous() -> RewardFunction:
    return treacherous


@pytest.mark.slow
def test_rewards_that_hang_or_die_cost_their_own_completion_alone(cluster: Any) -> None:
    judge = RayJudge(partial(make_treacherous), workers=2, timeout=5.0)

    def ask(*completions: str) -> list[Verdict]:
        return judge.judge([(Problem("1+1=", "2"), completion) for completion in completions])

    verdicts = ask("2", "hang", "raise", "die", "3", "2")
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert verdicts[1].error == "the reward took longer than 5 s; its actor was ended"
    assert verdicts[2].error == "reward treacherous raised KeyError: 'no such thing'"
    assert str(verdicts[3].error).startswith("the reward's actor was lost: ")
    assert [verdict.error for verdict in verdicts[::4] + verdicts[5:]] == [None, None, None]
    assert ask("2", "2", "3") == [Verdict(1.0), Verdict(1.0), Verdict(0.0)]  # both were replaced
    workers = list(judge._workers)
    judge.close()
    for worker in workers:
        with pytest.raises(ray.exceptions.RayActorError):
            _ask_forever(worker)


def _ask_forever(worker: Any) -> None:
    """Ray ends an actor some time after it was told to."""
    while True:
        ray.get(worker.verdict.remote((Problem("", ""), "")), timeout=60)


def test_without_workers_rewards_are_computed_in_the_first_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert not isinstance(make_ray_judge(config.task, config.reward), RayJudge)


def test_a_rank_that_dies_ends_all_and_is_named(cluster: Any) -> None:
    @ray.remote(num_cpus=0)
    def rank(dies: bool) -> None:
        if dies:
            os._exit(7)
        time.sleep(600)

    calls = [rank.options(max_retries=0).remote(index == 1) for index in range(2)]
    with pytest.raises(LaunchError, match="rank 1 of 2 failed"):
        ray_runner._results(ray, calls)
    ray.cancel(calls[0], force=True)


def test_a_cluster_without_room_is_said_with_what_it_has(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runner, "_ROOM_SECONDS", 1.0)
    config = config_of(tmp_path, layout={"tp": 2}, runner={"kind": "ray"})  # two ranks and an engine, on two processors
    with pytest.raises(ConfigError, match=r"(?s)no place for \[.*\] within 1 s; it has .*'CPU': 2\.0.* are free"):
        launch_on_ray(config, resume=False)
    assert ray.is_initialized()  # it is not the runner's own
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}  # nobody waits for it any more


def test_what_is_reserved_follows_from_the_placement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bundles(placement: str, **engine: int) -> list[dict[str, float]]:
        runner = {"kind": "ray", "placement": placement, "cpus_per_rank": 2, "cpus_per_engine": 3}
        return ray_runner._bundles(config_of(tmp_path, layout={"tp": 2}, engine=engine, runner=runner))

    assert bundles("separate", count=3) == [{"CPU": 2.0}] * 2 + [{"CPU": 3.0}] * 3
    assert bundles("colocated", count=2, tensor_parallel_size=2) == [{"CPU": 5.0}] * 2
    with pytest.raises(ConfigError, match="3 engines of 1 workers do not fit on 2 ranks; use separate"):
        bundles("colocated", count=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bundles("separate", tensor_parallel_size=2) == [{"CPU": 2.0, "GPU": 1.0}] * 2 + [{"CPU": 3.0, "GPU": 2.0}]
    assert bundles("colocated", count=2) == [{"CPU": 5.0, "GPU": 1.0}] * 2
    with pytest.raises(ConfigError, match="1 engines of 2 workers do not fit on 2 ranks; use separate"):
        bundles("colocated", tensor_parallel_size=2)
