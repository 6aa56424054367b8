"""Two processes that save into one directory, each of them stopped or killed before any of its calls to the file system."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View
from mbridge_rl.hf import lock, publish
from mbridge_rl.hf.writer import StagingDirectory, plan_files

TENSORS = [HFTensor("a", torch.float32, (4, 64)), HFTensor("b", torch.bfloat16, (3, 5)), HFTensor("c", torch.float32, ())]
EVENTS = (
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.listdir", "os.scandir", "os.truncate"),
    *("shutil.rmtree", "fcntl.flock", "ctypes.dlsym"),  # the last before an exchange, and before space is reserved
)


def values(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {one.hf_name: torch.randn(one.shape, generator=drawn).to(one.dtype) for one in TENSORS}


def sha256(state: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hasher.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


EXCHANGE = publish._exchange
KNOWN = {sha256(values(seed)): seed for seed in range(4)}


def held(directory: Path) -> int | None:
    """The seed that all of a checkpoint was made from, `None` where there is none; fails for anything in between."""
    if not directory.exists():
        return None
    index = directory / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    state = {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
    seed = KNOWN[sha256(state)]
    assert (directory / "config.json").read_text() == str(seed)
    assert len(list(directory.glob("model*.safetensors"))) == len(files)
    return seed


def save(directory: Path, seed: int) -> None:
    """In one file or in three, in turn."""
    staging = StagingDirectory(directory, plan_files(TENSORS, 1 << 20 if seed % 2 else 1))
    try:
        mapped = staging.create(mapped=True).mapped
        for name, tensor in values(seed).items():
            staging.write(View(name, 0, tensor.stride()), tuple(tensor.shape), tensor, mapped=mapped)
        staging.prove(staging.finish())
        (staging.path / "config.json").write_text(str(seed))
        staging.publish()
    finally:
        staging.discard()


def before_call(number: int, folder: Path, action: Callable[[], Any]) -> list[int]:
    """Runs `action` before this process's call of this number to the file system below `folder`. The hook stays."""
    calls = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event[0] != "f" and event[0] != "c" and str(folder) not in str(arguments)):
            return
        calls[0] += 1
        if calls[0] == number:
            action()

    sys.addaudithook(hook)
    return calls


def child(function: Callable[[], Any]) -> int:
    """A fork that runs `function`; its exit status is 0 for an end without an exception, 3 for a CheckpointError."""
    pid = os.fork()
    if pid == 0:
        status = 4
        try:
            function()
            status = 0
        except CheckpointError:
            status = 3
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def struck(number: int, folder: Path, kind: int) -> None:
    before_call(number, folder, lambda: os.kill(os.getpid(), kind))
    save(folder / "saved", 2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the disk, which nobody cuts off here, or for another saver."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.0)


@pytest.fixture(params=["exchange", "two renames"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a checkpoint in it and what else somebody keeps there; on file systems that can exchange directories, and others."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    return tmp_path


def begin_with_the_first(folder: Path) -> Path:
    directory = folder / "saved"
    save(directory, 1)
    (directory / "optimizer").mkdir(exist_ok=True)
    (directory / "optimizer" / "state").write_text("precious")
    (directory / "notes.txt").write_text("precious")
    return directory


def assert_tidy(directory: Path) -> None:
    assert [path.name for path in directory.parent.iterdir()] == ["saved"]
    assert (directory / "optimizer" / "state").read_text() == "precious"
    assert (directory / "notes.txt").read_text() == "precious"


def calls_of_a_save(folder: Path) -> Iterator[int]:
    """All of them, by running one to its end."""
    report = folder.parent / f"{folder.name}.calls"

    def count() -> None:
        calls = before_call(0, folder, lambda: None)
        save(folder / "saved", 2)
        report.write_text(str(calls[0]))

    assert status_of(child(count)) == 0
    total = int(report.read_text())
    assert total > 40
    return iter(range(1, total + 1))


def test_a_saver_that_is_killed_anywhere_leaves_the_old_one_or_the_new(folder: Path) -> None:
    directory, can_exchange, repaired = begin_with_the_first(folder), publish._exchange is EXCHANGE, 0
    seen = set()
    for number in calls_of_a_save(folder):
        begin_with_the_first(folder)
        assert status_of(child(lambda number=number: struck(number, folder, signal.SIGKILL))) == -signal.SIGKILL
        if not directory.exists():
            assert not can_exchange  # where there is no moment without a checkpoint
            assert publish.put_back(directory)
            repaired += 1
        seen.add(held(directory))
        save(directory, 3)
        assert held(directory) == 3
        assert_tidy(directory)
    assert seen == {1, 2}
    assert can_exchange or repaired


def test_a_first_save_that_is_killed_leaves_nothing_or_all(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    seen = set()
    for number in range(1, 41):
        status_of(child(lambda number=number: struck(number, tmp_path, signal.SIGKILL)))
        seen.add(held(directory))
        save(directory, 3)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    assert None in seen


def test_a_saver_that_sleeps_anywhere_and_wakes_up_after_another(folder: Path) -> None:
    """The other one either saves, or is told whom it waits for; at no moment is there a mixture."""
    directory = begin_with_the_first(folder)
    outcomes = set()
    for number in calls_of_a_save(folder):
        begin_with_the_first(folder)
        sleeper = child(lambda number=number: struck(number, folder, signal.SIGSTOP))
        os.waitpid(sleeper, os.WUNTRACED)
        try:
            before = held(directory)
            other = status_of(child(lambda: save(directory, 3)))
            assert held(directory) == (3 if other == 0 else before)
        finally:
            os.kill(sleeper, signal.SIGCONT)
        woken = status_of(sleeper)
        assert (other, woken) in ((0, 0), (3, 0)), f"before call {number}"
        assert held(directory) == (3 if before == 2 and other == 0 else 2)  # 3 if only the lock was to be released
        assert_tidy(directory)
        outcomes.add(other)
    assert outcomes == {0, 3}


def test_who_waits_in_vain_is_told_for_whom_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.2)
    directory = tmp_path / "saved"
    save(directory, 1)
    holder = child(lambda: (publish.Replacement(directory).begin(), signal.pause()))
    try:
        while not list(tmp_path.glob(".saved.*.incomplete")):
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=rf"process {holder} on .*was not done within 0.2 s.*kill -9 {holder}"):
            save(directory, 2)
        assert held(directory) == 1
    finally:
        os.kill(holder, signal.SIGKILL)
        status_of(holder)
    save(directory, 2)
    assert held(directory) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_child_of_a_killed_saver_does_not_hold_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.2)
    grandchild = tmp_path / "pid"

    def begin_and_fork() -> None:
        publish.Replacement(tmp_path / "saved").begin()
        pid = os.fork()
        if pid == 0:
            signal.pause()
        grandchild.write_text(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)

    status_of(child(begin_and_fork))
    try:
        save(tmp_path / "saved", 1)
    finally:
        os.kill(int(grandchild.read_text()), signal.SIGKILL)


def test_a_lock_that_somebody_removed_stops_its_holder(tmp_path: Path) -> None:
    save(tmp_path / "saved", 1)
    replacement = publish.Replacement(tmp_path / "saved")
    replacement.begin()
    (tmp_path / ".saved.lock").unlink()
    with pytest.raises(CheckpointError, match=r"somebody removed the lock .*\.saved\.lock"):
        replacement.publish(durable=False)
    replacement.end()
    assert held(tmp_path / "saved") == 1


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"cannot be locked .*mount the file system with locks"):
        save(tmp_path / "saved", 1)


@pytest.mark.parametrize("damage", ["a byte", "the end", "the header", "a file"])
def test_what_reads_back_as_something_else_replaces_nothing(damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    save(directory, 1)
    staging = StagingDirectory(directory, plan_files(TENSORS))
    mapped = staging.create(mapped=True).mapped
    for name, tensor in values(3).items():
        staging.write(View(name, 0, tensor.stride()), tuple(tensor.shape), tensor, mapped=mapped)
    written = staging.finish()
    file = staging.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    position = {"a byte": len(content) - 1, "the header": 20}.get(damage, 0)
    content[position] ^= 1
    if damage == "a file":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "the end" else content)
    expected = {"a byte": "b has digest", "the end": "bytes", "the header": "header is another", "a file": "is gone"}
    with pytest.raises(CheckpointError, match=f"{expected[damage]}.*Nothing was replaced"):
        staging.prove(written)
    staging.discard()
    assert held(directory) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_missing_write_is_seen(tmp_path: Path) -> None:
    """Files are made at their full size: what nobody wrote would be zeros."""
    staging = StagingDirectory(tmp_path / "saved", plan_files(TENSORS))
    staging.create(mapped=False)
    written = staging.finish()
    written[0] += 1
    with pytest.raises(CheckpointError, match="has digest 0000000000000000 when it is read back, 0000000000000001"):
        staging.prove(written)
    staging.discard()


def test_a_checkpoint_that_is_gone_between_two_renames_is_put_back_when_it_is_loaded(tmp_path: Path) -> None:
    from mbridge_rl.hf.config import local_directory

    save(tmp_path / "saved", 1)
    (tmp_path / "saved").rename(tmp_path / ".saved.0123456789abcdef.previous")
    assert local_directory(tmp_path / "saved") == tmp_path / "saved"
    assert held(tmp_path / "saved") == 1
