"""Processes that a run of `identity_chaos.py` may stop or kill: they do one thing when told to, and say what came of it."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from children import fork
from identity_ground import Hang
from strikes import Reached, StepTracer, Strike, go_on, state_of, stepping

from mbridge_rl.core.errors import BridgeError


@dataclass(frozen=True)
class Answer:
    """What became of one action.

    Attributes:
        error: of the library; empty if it succeeded.
        crash: any other error's traceback.
        state: the actor's own description of its state afterwards.
        place: where a strike came, of one that the actor has survived.
        reached: how often each step was.
    """

    error: str
    crash: str
    state: Any
    place: str
    reached: Reached


class Actor:
    """A forked process that calls `act(argument)` for each `begin(argument)`.

    Args:
        make: called in the process, once; returns `act`, `find` (what is to be known after each action, also one that failed)
            and `close`.
        among: to which it adds itself.
    """

    def __init__(
        self, make: Callable[[], tuple[Callable[[Any], None], Callable[[], Any], Callable[[], Any]]], among: list[Actor]
    ):
        self._connection, theirs = Pipe()
        self.pid, self.ended = 0, False

        def life() -> None:
            self._connection.close()
            _live(theirs, make)

        def register(pid: int) -> None:
            self.pid = pid
            among.append(self)

        fork(life, register)
        theirs.close()

    def begin(self, argument: Any, strike: Strike | None = None) -> None:
        self._connection.send((argument, strike))

    def wait(self, seconds: float) -> Answer | None:
        """The answer; `None` if there is none yet, since the process stands still, or it has ended."""
        deadline = time.monotonic() + seconds
        while True:
            state = state_of(self.pid)  # before the look for an answer: what it has said until then is there
            try:
                if self._connection.poll(0.01):
                    return self._connection.recv()
            except (EOFError, OSError):
                return None
            if state in ("T", "Z", "") or time.monotonic() > deadline:
                return None

    def require(self, seconds: float, what: str) -> Answer | None:
        """As `wait`, of one that nothing holds up: should it stop only now, it goes on at once. `None` if it was killed.

        Raises:
            Hang: there is none in time.
        """
        deadline = time.monotonic() + seconds
        while not self.is_dead:
            go_on(self.pid)
            if (answer := self.wait(0.1)) is not None:
                return answer
            if time.monotonic() > deadline:
                raise Hang(f"{what} has not answered {seconds:g} s after it could go on (state {state_of(self.pid)!r})")
        return self.wait(0.1)

    @property
    def is_dead(self) -> bool:
        return state_of(self.pid) in ("Z", "")

    def kill(self) -> None:
        """Idempotent; a stopped one as well."""
        if self.ended:
            return
        self.ended = True
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._connection.close()

    def leave(self, seconds: float) -> None:
        """It ends by itself."""
        self.begin(None)
        deadline = time.monotonic() + seconds
        while not self.is_dead:
            if time.monotonic() > deadline:
                raise Hang(f"a process did not end within {seconds:g} s")
            time.sleep(0.005)


@contextmanager
def ending() -> Iterator[list[Actor]]:
    """Whoever is added inside is killed afterwards."""
    actors: list[Actor] = []
    try:
        yield actors
    finally:
        for actor in actors:
            actor.kill()


def _live(connection: Connection, make: Callable[[], Any]) -> None:
    """The life of the process."""
    act, find, close = make()
    while True:
        try:
            argument, strike = connection.recv()
        except EOFError:
            return
        if argument is None:
            close()
            return
        error = crash = ""
        tracer = StepTracer(strike)
        try:
            with stepping(tracer):
                act(argument)
        except BridgeError as raised:
            error = f"{type(raised).__name__}: {raised}"
        except Exception:
            crash = traceback.format_exc()
        connection.send(Answer(error, crash, find(), tracer.place, tracer.reached))
