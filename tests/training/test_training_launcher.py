"""Ranks end cleanly whatever one of them does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mbridge_rl.training.run.launcher import LaunchError, launch


def test_the_result_of_rank_0_comes_back() -> None:
    def work(offset: int) -> tuple[torch.Tensor, list[int]]:
        total = torch.full((100_000,), dist.get_rank() + offset)
        dist.all_reduce(total)
        return total, [dist.get_rank(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])]

    total, environment = launch(work, 3, 10)
    assert torch.equal(total, torch.full((100_000,), 33))  # although the process that made it is gone
    assert environment == [0, 0, 3]
    assert "RANK" not in os.environ
    assert not dist.is_initialized()


def test_one_failure_ends_all_and_names_the_rank(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / str(os.getpid())).touch()
        dist.barrier()
        if dist.get_rank() == 1:
            raise KeyError("no such weight")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"(?s)rank 1 of 2 failed.*KeyError: 'no such weight'"):
        launch(work, 2)
    assert time.monotonic() - started < 30
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_rank_that_dies_without_a_word_is_reported() -> None:
    def work() -> None:
        if dist.get_rank() == 0:
            os._exit(7)
        time.sleep(60)

    with pytest.raises(LaunchError, match=r"rank 0 of 2 failed.*\n.*exit code 7"):
        launch(work, 2)


def test_time_is_limited(capfd: pytest.CaptureFixture[str]) -> None:
    def stuck() -> None:
        time.sleep(60)

    with pytest.raises(LaunchError, match=r"ranks \[0\] were not done after 2 s"):
        launch(stuck, 1, timeout=2)
    assert "stuck" in capfd.readouterr().err  # the stack names the function


def test_results_that_cannot_travel_are_an_error() -> None:
    with pytest.raises(LaunchError, match="rank 0 of 1 failed"):
        launch(lambda: lambda: 0, 1)


_UNDER_TORCHRUN = """
import torch.distributed as dist
from mbridge_rl.training.run.launcher import launch

def work(word):
    return f"{word} {dist.get_rank()} of {dist.get_world_size()}"

print(launch(work, 2, "rank"), flush=True)
"""


@pytest.mark.slow
def test_under_torchrun_the_ranks_are_there_already(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_UNDER_TORCHRUN)

    def torchrun(count: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    completed = torchrun(2)
    assert completed.returncode == 0, completed.stderr
    # Ranks share a pipe, and print writes text and line end apart: lines may run into each other.
    assert sorted(re.findall(r"rank \d of \d", completed.stdout)) == ["rank 0 of 2", "rank 1 of 2"]
    wrong = torchrun(1)
    assert wrong.returncode != 0
    assert "torchrun started 1 ranks, this layout needs 2" in wrong.stderr
