"""The helper that starts ranks must itself be trustworthy: failures surface, nothing hangs, nothing is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def _children() -> list[str]:
    return [task.read_text() for task in Path("/proc/self/task").glob("*/children") if task.read_text()]


def _sum(rank: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return os.getpid(), total


def test_results_come_back_by_rank() -> None:
    results = run_ranks(_sum, 3, 10)
    assert [total.item() for _, total in results] == [33] * 3
    assert len({pid for pid, _ in results} | {os.getpid()}) == 4
    assert not _children()


def _one_fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("the rank's own words")
    dist.barrier()


def test_a_failure_is_reported_with_its_traceback_though_others_wait_for_that_rank() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*_one_fails.*the rank's own words"):
        run_ranks(_one_fails, 2, timeout=60)
    assert time.monotonic() - started < 20
    assert not _children()


def _one_dies(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), 9)
    dist.barrier()


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(RankError, match="rank 0 of 2 failed"):
        run_ranks(_one_dies, 2, timeout=60)
    assert not _children()


def _hang(rank: int) -> None:
    time.sleep(600)


def test_a_hang_ends_at_the_timeout_and_says_where() -> None:
    with pytest.raises(RankError, match=r"(?s)2 of 2 ranks did not finish in 1.5 s.*in _hang"):
        run_ranks(_hang, 2, timeout=1.5)
    assert not _children()
