"""Run test functions in another interpreter that stays up.

An in-process vLLM engine initializes process-global state (the default process group, torch's thread settings), which other
tests in the pytest process must not inherit. Start-up is paid once per `Interpreter`, not once per call.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent


class Interpreter:
    """A child that imports a test module and calls its functions by name."""

    def __init__(self, **environment: str) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                cwd=_TESTS.parent,
            )
        self._connection = Connection(mine.detach())

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> Any:
        """`function(*args)` over there; what it raises becomes an `AssertionError` with its traceback."""
        self._connection.send((function.__module__, function.__name__, args))
        if not self._connection.poll(timeout):
            self.close()
            raise AssertionError(f"{function.__name__} took longer than {timeout:g} s")
        succeeded, result = self._connection.recv()
        if not succeeded:
            raise AssertionError(f"in the other interpreter:\n{result}")
        return result

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve(connection: Connection) -> None:
    while True:
        module, name, args = connection.recv()
        try:
            function = getattr(importlib.import_module(module), name)
            gc.freeze()  # vLLM collects garbage again and again as an engine starts, through all that was imported
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    sys.path[:0] = [str(_TESTS), str(_TESTS.parents[1])]  # of helpers, and of test files as `tests.ROOM.test_NAME`
    with contextlib.suppress(EOFError):
        _serve(Connection(int(sys.argv[1])))
    gc.collect()  # arenas that tracebacks kept alive are unlinked
    os._exit(0)  # vLLM's teardown at interpreter exit is slow and proves nothing
