"""Processes of a test that end when it does, whatever ends it: its end, an error, Ctrl-C, or a SIGKILL."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """The kernel kills this process as soon as the thread that started it ends.

    Args:
        parent: its process, which may have ended before this was called.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def fork(life: Callable[[], object], register: Callable[[int], object]) -> int:
    """Runs `life` in a forked process, which leaves by `os._exit` and does not hear of Ctrl-C, and returns its pid.

    Args:
        register: called with the pid before an interrupt can be raised here, so that whoever cleans up knows of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with _interrupts_held_back():
        pid = os.fork()
        if pid == 0:
            _live(life, parent)
        register(pid)
    return pid


def _live(life: Callable[[], object], parent: int) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent(parent)
        life()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """An interrupt that comes inside is raised after it: not between a fork and its registration, nor by the child.

    It is held back where Python calls its handler: to block the signal in this thread would leave it to the others.
    """
    if threading.current_thread() is not threading.main_thread():  # where none is ever raised
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
