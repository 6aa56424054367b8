"""What one operation of all ranks costs: seconds, processor seconds, peak extra memory, collectives."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all"),
    *("all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "gather_object"),
    *("recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)


@dataclass(frozen=True)
class Cost:
    """Of one run, over all ranks.

    Attributes:
        seconds: from the moment all ranks are ready until all are done.
        cpu_seconds: user and system time of all ranks together; other programs on the machine disturb it less.
        peak_bytes: the largest growth of a rank's resident memory during the run.
        collectives: calls of torch.distributed by one rank.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    collectives: int


def measured(function: Callable[[], Any]) -> Cost:
    """Runs `function` on all ranks at once and measures it. Every rank gets the same numbers."""
    ctypes.CDLL(None).malloc_trim(0)  # so that memory kept from the run before does not hide this one's
    dist.barrier()
    before = _reset_peak()
    with _counted() as count:
        cpu, start = time.process_time(), time.perf_counter()
        function()
        cpu_seconds, calls = time.process_time() - cpu, count[0]
        dist.barrier()
        seconds = time.perf_counter() - start
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (seconds, cpu_seconds, _status("VmHWM") - before, calls))
    seconds, cpu, peaks, calls_of = zip(*gathered, strict=True)
    return Cost(max(seconds), sum(cpu), max(peaks), max(calls_of))


def best(costs: list[Cost]) -> Cost:
    """The fastest run: what disturbs a measurement on a shared machine only ever adds to it."""
    return min(costs, key=lambda cost: cost.seconds)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Counts this rank's calls of torch.distributed. Messages between pairs count one by one, also in a batch."""
    count, real = [0], {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += len(args[0]) if function is real["batch_isend_irecv"] else 1
            return function(*args, **kwargs)

        return call

    for name, function in real.items():
        setattr(dist, name, counting(function))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def _reset_peak() -> int:
    """Starts a new high-water mark of resident memory; returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")
