"""Several ranks on one machine, in a fraction of a second: import once, fork, gloo over a file.

    results = run_ranks(function, 4, argument)      # [function(0, argument), ..., function(3, argument)]

Starting four interpreters with torchrun takes 8 to 15 seconds, nearly all of it imports. A fork has them already.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from children import fork

_GRACE_SECONDS = 3.0
_IMPORTED_BEFORE_THE_FORK = (
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "torch._dynamo",  # torch.optim imports it at the first optimizer
)


class RankError(AssertionError):
    """A rank raised, died, or did not finish in time; the message has the rank's traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run `function(rank, *args)` in `world_size` forked processes with a gloo process group, and return what they returned.

    `function` may be a closure; its results travel by `torch.save`. Megatron-core is imported before the fork.

    Raises:
        RankError: caused by the first rank that failed, with its traceback, or by the time-out (seconds, for everything), with
            the stack on which each rank hung. No process is left behind in any case.
    """
    _import_megatron()
    with tempfile.TemporaryDirectory(prefix="mbridge_ranks_") as folder:
        pids: list[int] = []
        try:
            for rank in range(world_size):
                fork(lambda rank=rank: _run_rank(function, rank, world_size, args, Path(folder), timeout), pids.append)
            finished = _wait(pids, timeout)
            stacks = [] if len(finished) == world_size else _stacks(pids, finished, Path(folder))
        finally:
            _kill(pids)
        return _collect(world_size, finished, stacks, Path(folder), timeout)


def _import_megatron() -> None:
    from mbridge_rl.megatron.cpu.runtime import megatron_runtime

    with megatron_runtime():
        for name in _IMPORTED_BEFORE_THE_FORK:
            importlib.import_module(name)


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: Path, timeout: float
) -> NoReturn:
    """The life of a child. It leaves by `os._exit`: the parent's exit handlers and pytest are not its own."""
    status = 1
    try:
        stack_file = (folder / f"{rank}.stack").open("w")
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
        torch.set_num_threads(int(os.environ.get("MBRIDGE_TEST_THREADS", "1")))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(rank, *args), folder / f"{rank}.partial")
        (folder / f"{rank}.partial").rename(folder / f"{rank}.result")
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int], timeout: float) -> dict[int, int]:
    """Exit codes by rank, in the order of exit, of the ranks that finished; after a failure the others get a short grace."""
    handles = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    poll, finished = select.poll(), {}
    for handle in handles:
        poll.register(handle, select.POLLIN)
    deadline = time.monotonic() + timeout
    try:
        while len(finished) < len(pids):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            for handle, _ in poll.poll(remaining * 1000):
                poll.unregister(handle)
                rank = handles[handle]
                # A zombie until _kill reaps it, so that its number is not given away.
                info = os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOWAIT)
                finished[rank] = info.si_status if info is not None else -1
                if finished[rank] != 0:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    finally:
        for handle in handles:
            os.close(handle)
    return finished


def _stacks(pids: list[int], finished: dict[int, int], folder: Path) -> list[str]:
    """Where the unfinished ranks stand."""
    hung = [rank for rank in range(len(pids)) if rank not in finished]
    for rank in hung:
        os.kill(pids[rank], signal.SIGUSR1)
    time.sleep(0.2)
    return [f"rank {rank} did not finish:\n{(folder / f'{rank}.stack').read_text()}" for rank in hung]


def _kill(pids: list[int]) -> None:
    """Kill and reap; a killed process that has exited already is only reaped."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def _collect(world_size: int, finished: dict[int, int], stacks: list[str], folder: Path, timeout: float) -> list[Any]:
    failed = [rank for rank, status in finished.items() if status != 0]
    if failed:
        error = folder / f"{failed[0]}.error"
        what = error.read_text() if error.exists() else f"died with status {finished[failed[0]]}, without an exception\n"
        others = f"(ranks {failed[1:]} failed after it)\n" if failed[1:] else ""
        raise RankError(f"rank {failed[0]} of {world_size} failed:\n{what}{others}" + "\n".join(stacks))
    if stacks:
        raise RankError(f"{len(stacks)} of {world_size} ranks did not finish in {timeout} s\n" + "\n".join(stacks))
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]
