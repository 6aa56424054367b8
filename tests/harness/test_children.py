"""What a test starts ends with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import children
import pytest
from children import fork

TESTS = Path(__file__).parents[1] / "support"

# A suite with a fork, an interpreter in a session of its own, and one that this has started and whose parent is gone.
SUITE = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import suite_watch
from children import fork
suite_watch.begin()
fork(lambda: time.sleep(600), lambda pid: print(pid, flush=True))
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleeper, start_new_session=True)
orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-S", "-c", orphan, *sleeper])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_is_interrupted_leaves_no_process(end: signal.Signals) -> None:
    suite = subprocess.Popen(
        [sys.executable, "-c", SUITE, str(TESTS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert suite.stdout is not None
    started = [int(suite.stdout.readline()) for _ in range(3)]
    assert all(map(is_running, started))
    suite.send_signal(end)
    assert suite.wait() != 0
    deadline = time.monotonic() + 60.0
    while left := [pid for pid in started if is_running(pid)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.02)
    suite.stdout.close()


def test_an_interrupt_amid_a_fork_is_raised_when_the_child_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that nobody knew of would live on, and hold the pipe open that its parent's caller reads to the end."""
    real, parent, known = os.fork, os.getpid(), []

    def interrupted() -> Any:
        pid = real()
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches both
        return pid

    monkeypatch.setattr(children.os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork(lambda: time.sleep(600 if os.getpid() != parent else 0), known.append)
    (pid,) = known
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it has not taken the interrupt for its own
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
