"""A process that strikes itself at a chosen step: every line of the library's own code that a thread comes to is a step.

Nothing of the library is named here, so that a step which is written tomorrow is struck as well. A dry run notes the lines in
the order in which they were first reached; a `Strike` says at which of them, and at which of its repetitions, what happens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import mbridge_rl

_ROOT = Path(mbridge_rl.__file__).parent
_TRACED = tuple(f"{_ROOT / part}{os.sep}" for part in ("sync", "hf"))

Action = Literal["stop", "kill", "delay", "wait"]
Reached = list[tuple[str, int]]  # lines, as `file:line`, in the order in which they are first reached, and how often each was


@dataclass(frozen=True)
class Strike:
    """What happens at which step.

    Attributes:
        step: index of the line among all lines, in the order in which they are first reached.
        repetition: the how-manieth time that this line is reached, from 1.
        action: `stop` and `kill` the process, `delay` the thread, or let it `wait` for the one who holds the tracer.
        seconds: of a delay.
    """

    step: int
    repetition: int
    action: Action
    seconds: float = 0.3


def drawn(reached: Reached, file: float, moment: float, repetition: float, action: Action, seconds: float = 0.3) -> Strike:
    """A strike among the steps of a dry run. Files are equally likely, so that few lines that matter are not lost among many
    that describe or count.

    Args:
        file, moment, repetition: 0..1, of the files, of the chosen file's lines, and of the chosen line's repetitions.
    """
    files = sorted({place.partition(":")[0] for place, _ in reached})
    chosen = files[int(file * len(files))]
    steps = [step for step, (place, _) in enumerate(reached) if place.partition(":")[0] == chosen]
    step = steps[int(moment * len(steps))]
    return Strike(step, 1 + int(repetition * reached[step][1]), action, seconds)


class StepTracer:
    """Counts the steps of the threads that it is set for, and strikes once.

    Attributes:
        place: where it struck, `file:line`; empty as long as it has not.
        arrived: set when a `wait` has begun; `released`: ends it.
    """

    def __init__(self, strike: Strike | None) -> None:
        self._strike = strike
        self._reached: dict[tuple[str, int], int] = {}
        self._chosen: tuple[str, int] | None = None
        self.place = ""
        self.arrived, self.released = threading.Event(), threading.Event()

    @property
    def reached(self) -> Reached:
        reached = self._reached.copy()  # in one step: other threads may be counting still
        return [(_place(line), times) for line, times in reached.items()]

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._at_line if frame.f_code.co_filename.startswith(_TRACED) else None

    def _at_line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self._reached[line] = self._reached.get(line, 0) + 1
            strike = self._strike
            if strike is not None and not self.place:
                if self._chosen is None and len(self._reached) > strike.step:
                    self._chosen = line
                if line == self._chosen and self._reached[line] >= strike.repetition:
                    self.place = _place(line)
                    self._act(strike)
        return self._at_line

    def _act(self, strike: Strike) -> None:
        if strike.action == "wait":
            self.arrived.set()
            self.released.wait(60.0)
        elif strike.action == "delay":
            time.sleep(strike.seconds)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if strike.action == "stop" else signal.SIGKILL)


def _place(line: tuple[str, int]) -> str:
    return f"{Path(line[0]).relative_to(_ROOT)}:{line[1]}"


@contextmanager
def stepping(tracer: StepTracer | None) -> Iterator[None]:
    """The steps of this thread, and of threads that start meanwhile, are the tracer's."""
    if tracer is None:
        yield
        return
    start(tracer)
    try:
        yield
    finally:
        start(None)


def start(tracer: StepTracer | None) -> None:
    """From here on, until another one is set; with `None` nobody counts."""
    threading.settrace(tracer)  # type: ignore[arg-type]
    sys.settrace(tracer)


def state_of(pid: int) -> str:
    """The letter under which the kernel shows a process: `T` stopped, `Z` dead and not waited for; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def go_on(pid: int) -> None:
    """Ends a stop, where there is one."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return
