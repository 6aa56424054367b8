"""Starts trainer ranks on one machine with one call, and ends all of them in every case.

    launch(train, layout.world_size, settings)

Without a GPU the ranks are forks of this process, so that Megatron and torch are imported only once, which takes seconds. With
GPUs they are fresh processes, since CUDA cannot be forked. Under torchrun the ranks exist already and `launch` only calls the
function.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.megatron.cpu.runtime import megatron_runtime

_PR_SET_PDEATHSIG = 1


class LaunchError(BridgeError, RuntimeError):
    """A rank failed, died or did not finish in time; the message holds its traceback."""


def launch(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 24 * 3600.0,
    collective_timeout: float = 600.0,
    threads: int = 1,
) -> Any:
    """Runs `function(*args)` on `world_size` ranks with `torch.distributed` up (gloo, or nccl with a GPU per rank).

    The ranks find `RANK`, `LOCAL_RANK` and `WORLD_SIZE` in their environment. If one fails, all are killed.

    Args:
        function: with GPUs it must be importable by name, without GPUs it may be a closure.
        timeout: seconds for the whole run.
        collective_timeout: seconds for one collective.
        threads: number of torch's threads, per rank.

    Returns:
        The value that rank 0 returned; it must be picklable. Under torchrun every rank gets its own value.

    Raises:
        LaunchError: a rank failed, and the message has its traceback; or the message names the ranks that were not done in
            time.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _call_under_torchrun(function, world_size, args, collective_timeout)
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() < world_size:
        raise LaunchError(f"{world_size} ranks need a GPU each, this machine has {torch.cuda.device_count()}")
    if not on_gpu:
        _import_megatron()
    context = multiprocessing.get_context("spawn" if on_gpu else "fork")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="mbridge_rl-ranks-") as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                settings = (rank, world_size, f"file://{folder}/rendezvous", collective_timeout, threads)
                process = context.Process(target=_run_rank, args=(function, args, sender, settings))
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(processes, pipes, timeout)[0]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _call_under_torchrun(function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> Any:
    started = int(os.environ["WORLD_SIZE"])
    if started != world_size:
        raise LaunchError(
            f"torchrun started {started} ranks, this layout needs {world_size}: use --nproc-per-node={world_size}"
        )
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return function(*args)


def _import_megatron() -> None:
    """Imports Megatron before the ranks are forked, so that every rank has it from the start."""
    with megatron_runtime():
        import megatron.core.distributed
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection, settings: tuple[int, int, str, float, int]
) -> None:
    """The main function of a rank's process; at its end it sends `(succeeded, result or traceback)`."""
    rank, world_size, init_method, timeout, threads = settings
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the rank ends if the launcher is killed
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(threads)  # more than one would hang in a fork of a process that had used OpenMP
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        _send(pipe, True, result if rank == 0 else None)
    except BaseException:  # the launcher must learn of every failure
        _send(pipe, False, traceback.format_exc())
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the launcher's exit handlers are not this process's


def _send(pipe: Connection, succeeded: bool, result: Any) -> None:
    """By plain pickle: `pipe.send` would hand out tensors as shared memory of a process that is about to end."""
    pipe.send_bytes(pickle.dumps((succeeded, result)))


def _collect(processes: list[BaseProcess], pipes: list[Connection], timeout: float) -> list[Any]:
    """Every rank's result, in rank order."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise LaunchError(_dump_stacks(processes, [rank for rank in range(len(pipes)) if rank not in results], timeout))
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            succeeded, results[rank] = _received(pipe, processes[rank])  # type: ignore[arg-type]
            if not succeeded:
                raise LaunchError(f"rank {rank} of {len(pipes)} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _received(pipe: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(5)
        return False, f"it died without an exception (exit code {process.exitcode})"


def _dump_stacks(processes: list[BaseProcess], unfinished: list[int], timeout: float) -> str:
    """Makes the unfinished ranks write their stacks to stderr; returns the message of the error."""
    for rank in unfinished:
        sys.stderr.write(f"--- stack of rank {rank}:\n")
        sys.stderr.flush()
        os.kill(processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.2)
    return f"ranks {unfinished} were not done after {timeout:g} s; their stacks are on stderr"
