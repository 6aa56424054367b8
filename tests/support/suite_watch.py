"""Ends what an interrupted test suite started: a process of its own waits for the suite's end, whatever ends it.

A suite that is killed cannot end its children. Those that it forked die with it (`children.py`); the interpreters that it
started (pytest-xdist's, those of `interpreter.py`, commands, and what these start) carry a mark in their environment, by which
this process finds them, in whatever session they are and whoever has adopted them.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "MBRIDGE_TEST_SUITE"


def begin() -> None:
    """Every interpreter that this process starts from here on, and whatever that starts, ends with this process."""
    os.environ[MARK] = secrets.token_hex(16)
    command = [sys.executable, "-S", __file__, str(os.getpid()), os.environ[MARK]]
    nowhere = subprocess.DEVNULL  # whoever reads the suite's output does not wait for this process
    subprocess.run(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True, check=True)


def marked(mark: str) -> list[int]:
    """The ids of all running processes that were started with this mark, without the caller's."""
    entry = f"{MARK}={mark}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if entry in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
        except OSError:  # not ours, or gone by now
            continue
    return [pid for pid in pids if pid != os.getpid()]


def main() -> None:
    suite, mark = os.pidfd_open(int(sys.argv[1])), sys.argv[2]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():  # the suite has no child that its tests could take for theirs
        return
    select.select([suite], [], [])
    while left := marked(mark):  # what one of them starts meanwhile has the mark, too
        for other in left:
            try:
                os.kill(other, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


if __name__ == "__main__":
    main()
