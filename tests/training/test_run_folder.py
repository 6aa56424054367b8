"""A run folder belongs to one run at a time, and its small files are replaced as a whole."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mbridge_rl.hf.publish import replace_file
from mbridge_rl.training.run.run_folder import RunExists, only_run


def test_the_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    first = os.fork()
    if first == 0:
        with only_run(tmp_path / "run"):
            signal.pause()
    try:
        while not (tmp_path / ".run.run.lock").exists() or not (tmp_path / ".run.run.lock").read_text():
            time.sleep(0.01)
        with (
            pytest.raises(RunExists, match=rf"process {first} on .* is running in this folder; .*kill -9 {first}"),
            only_run(tmp_path / "run"),
        ):
            pass
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    with only_run(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
