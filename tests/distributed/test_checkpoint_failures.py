"""Saves that do not end well: killed ranks, full disks, places that cannot be written."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from live import live, raised
from ranks import RankError, run_ranks
from tiny import hf_state, tiny_checkpoint
from torch import nn

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.writer import plan_files


def fill(model: list[nn.Module], value: float) -> None:
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.fill_(value)


def value_of(directory: Path) -> float:
    """The one number that all tensors of a complete checkpoint consist of; raises CheckpointError for an incomplete one."""
    checkpoint = Checkpoint(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert len(checkpoint) == 39
    values = {value for tensor in checkpoint.values() for value in tensor.unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return values.pop()


def die_at(rank: int, directory: Path, module: str, name: str, calls: int) -> None:
    """Rank 0 is killed at the given call while the second checkpoint replaces the first."""
    import importlib

    bridge, model = live(ParallelLayout(tp=2), directory)
    target = directory / "saved"
    fill(model, 1)
    bridge.save_pretrained(model, target, shard_bytes=1 << 18)
    fill(model, 2)
    owner, _, attribute = name.rpartition(".")
    place = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    real, seen = getattr(place, attribute), count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if rank == 0 and next(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(place, attribute, deadly)
    bridge.save_pretrained(model, target, shard_bytes=1 << 18)


WRITER, PUBLISH = "mbridge_rl.hf.writer", "mbridge_rl.hf.publish"


@pytest.mark.parametrize(
    ("module", "name", "calls", "value"),
    [
        (WRITER, "_reserve", 2, 1),
        (WRITER, "StagingDirectory.write", 1, 1),
        (WRITER, "StagingDirectory.write", 9, 1),
        (WRITER, "StagingDirectory.publish", 1, 1),
        (WRITER, "StagingDirectory.prove", 1, 1),
        (PUBLISH, "_sync_files", 1, 1),
        (PUBLISH, "_exchange", 1, 1),
        (PUBLISH, "_carry_over", 1, 2),
        (PUBLISH, "Replacement.end", 1, 2),
    ],
)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(
    module: str, name: str, calls: int, value: int, tmp_path: Path
) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(RankError, match=r"rank 0 of 2 failed:\s*died with status 9"):
        run_ranks(die_at, 2, directory, module, name, calls, timeout=60)
    assert value_of(directory / "saved") == value
    run_ranks(save_again, 2, directory)
    assert value_of(directory / "saved") == 3
    assert not any(directory.glob(".saved.*"))


def save_again(rank: int, directory: Path) -> None:
    bridge, model = live(ParallelLayout(tp=2), directory)
    fill(model, 3)
    bridge.save_pretrained(model, directory / "saved")


def save_forever(rank: int, directory: Path, alive: int) -> None:
    bridge, model = live(ParallelLayout(tp=2), directory)
    for value in count(1):
        fill(model, value)
        bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << (18 if value % 2 else 30), durable=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killing_all_ranks_at_any_moment_leaves_a_whole_checkpoint(seed: int, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    ended, alive = os.pipe()  # reading `ended` returns when no process holds `alive` any more
    launcher = os.fork()
    if launcher == 0:
        os.close(ended)
        try:
            run_ranks(save_forever, 2, directory, alive, timeout=100)
        finally:
            os._exit(1)
    os.close(alive)
    deadline = time.monotonic() + 60
    while not (directory / "saved" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    os.kill(launcher, signal.SIGKILL)  # its ranks die with it
    os.waitpid(launcher, 0)
    assert os.read(ended, 1) == b""
    os.close(ended)
    assert value_of(directory / "saved") >= 1


def save_with_a_limit(rank: int, directory: Path, limited: int, mapped: bool) -> str:
    """Rank `limited` must not write files of more than 100 kB; the kernel answers as for a full disk."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    fill(model, 1)
    bridge.save_pretrained(model, directory / "saved")
    fill(model, 2)
    if not mapped:
        RankGroup.on_one_machine = False
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    error = raised(lambda: bridge.save_pretrained(model, directory / "saved"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return error


@pytest.mark.parametrize(("limited", "mapped"), [(0, True), (0, False), (1, False)])
def test_what_one_rank_cannot_write_stops_all(limited: int, mapped: bool, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for rank, error in enumerate(run_ranks(save_with_a_limit, 2, directory, limited, mapped)):
        assert error.startswith(CheckpointError.__name__)
        assert "File too large" in error
        assert (f"rank {limited} failed: CheckpointError" in error) == (rank != limited)
    assert not any(directory.glob(".saved.*"))
    assert value_of(directory / "saved") == 1


_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000


def mount_small_disk(path: Path, nbytes: int) -> bool:
    """A RAM disk of `nbytes` at `path`, seen by this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNS if os.getuid() == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    path.mkdir()
    return libc.unshare(flags) == 0 and libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={nbytes}".encode()) == 0


def save_to_full_disk(rank: int, directory: Path, disk: Path, mapped: bool) -> tuple[str, list[str], float]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    if not mapped:
        RankGroup.on_one_machine = False
    fill(model, 1)
    bridge.save_pretrained(model, disk / "saved", dtype=torch.bfloat16)
    fill(model, 2)
    error = raised(lambda: bridge.save_pretrained(model, disk / "saved"))
    return error, sorted(path.name for path in disk.iterdir()), value_of(disk / "saved")


@pytest.mark.parametrize("mapped", [True, False])
def test_a_full_disk_is_an_error_on_every_rank(mapped: bool, tmp_path: Path) -> None:
    """Room for the checkpoint in bf16 and for half of the one in fp32 that is to replace it."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    nbytes = sum(tensor.nbytes for tensor in hf_state(directory).values())
    report = tmp_path / "report"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if mount_small_disk(tmp_path / "disk", nbytes):
                torch.save(run_ranks(save_to_full_disk, 2, directory, tmp_path / "disk", mapped, timeout=60), report)
                status = 0
            else:
                status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 2:
        pytest.skip("no file system may be mounted here")
    assert status == 0
    for error, names, value in torch.load(report):
        assert error.startswith(CheckpointError.__name__)
        assert "No space left on device" in error
        assert f"it needs {nbytes + header_bytes(directory)} bytes" in error
        assert names == ["saved"]
        assert value == 1


def header_bytes(directory: Path) -> int:
    tensors = [HFTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in hf_state(directory).items()]
    return len(plan_files(tensors)[0].header)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "file").write_text("")
    for error in run_ranks(save_below_a_file, 2, directory):
        assert "CheckpointError" in error
        assert "Not a directory" in error


def save_below_a_file(rank: int, directory: Path) -> str:
    bridge, model = live(ParallelLayout(tp=2), directory)
    return raised(lambda: bridge.save_pretrained(model, directory / "file" / "saved"))
