"""Rewards in separate processes: a reward function that hangs, leaks or crashes costs only one completion its reward.

A worker is a fresh interpreter (as `sync.vllm.engines.process` starts one, and for the same reason), which builds the reward
function from a picklable factory and answers one question at a time. A worker that does not answer in time is killed and
started anew.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from mbridge_rl.core.typed_values import shown
from mbridge_rl.training.rollout.rewards import Question, RewardFunction, Verdict, described_error, verdict_of

_START_SECONDS = 120.0
_EXIT_SECONDS = 1.0  # how long to wait for the exit status of a worker whose connection has ended


class PoolJudge:
    """Rewards completions in `workers` processes.

    Args:
        factory: a picklable function without arguments that returns the reward function; called in each worker.
        timeout: seconds for one reward.
    """

    def __init__(self, factory: Callable[[], RewardFunction], workers: int, timeout: float) -> None:
        self._factory, self._timeout = pickle.dumps(factory), timeout
        self._workers = [_Worker(self._factory) for _ in range(workers)]

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(questions)
        waiting = list(range(len(questions)))[::-1]
        pending: dict[_Worker, tuple[int, float]] = {}
        while waiting or pending:
            for worker in self._workers:
                if waiting and worker not in pending:
                    index = waiting.pop()
                    try:
                        pending[worker] = (index, time.monotonic() + worker.ask(questions[index], self._timeout))
                    except Exception as error:  # metadata of any type that cannot be sent
                        verdicts[index] = Verdict.failed(f"the problem cannot be sent to a worker: {described_error(error)}")
            if not pending:
                continue
            deadline = min(deadline for _, deadline in pending.values())
            connections = {worker.connection: worker for worker in pending}
            for connection in wait(list(connections), max(0.0, deadline - time.monotonic())):
                worker = connections[connection]  # type: ignore[index]
                index, _ = pending.pop(worker)
                verdicts[index] = worker.answer()
            for worker, (index, deadline) in list(pending.items()):
                if time.monotonic() >= deadline:
                    del pending[worker]
                    verdicts[index] = Verdict(error=f"the reward took longer than {self._timeout:g} s; its worker was ended")
                    worker.restart()
        return [verdict if verdict is not None else Verdict(error="no verdict") for verdict in verdicts]

    def close(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    def __init__(self, factory: bytes) -> None:
        self._factory = factory
        self._start()

    def _start(self) -> None:
        own_end, worker_end = socket.socketpair()
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mbridge_rl.training.rollout.reward_pool", str(worker_end.fileno())],
                pass_fds=(worker_end.fileno(),),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # so that processes which the reward function starts end with the worker
            )
        for direction in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # for a message that a worker reads or sends only in part
            own_end.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", int(_START_SECONDS), 0))
        self.connection = Connection(own_end.detach())
        self.connection.send_bytes(self._factory)
        self._is_new = True

    def ask(self, question: Question, timeout: float) -> float:
        """Sends the question; returns how many seconds the answer may take, more for a new worker, which has to import
        first."""
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is read
            self.connection.send(question)
        allowed = timeout + (_START_SECONDS if self._is_new else 0.0)
        self._is_new = False
        return allowed

    def answer(self) -> Verdict:
        try:
            verdict = self.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
            code = self._process.poll()
            self.restart()
            died = f"died (exit status {code})" if code is not None else "closed its connection"
            return Verdict.failed(f"the reward's worker {died}")
        except Exception as error:  # a reward function that writes to our socket
            self.restart()
            return Verdict.failed(f"the reward's worker sent what is no verdict: {described_error(error)}")
        if isinstance(verdict, Verdict):
            return verdict
        self.restart()
        return Verdict.failed(f"the reward's worker sent {shown(verdict)}, which is no verdict")

    def restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def main() -> None:
    """Entry point of a worker; its argument is the file descriptor of its socket."""
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function, failure = None, ""
        try:
            function = pickle.loads(connection.recv_bytes())()
        except Exception as error:
            failure = f"the reward function could not be made: {described_error(error)}"
        while True:
            problem, completion = connection.recv()
            connection.send(Verdict.failed(failure) if function is None else verdict_of(function, problem, completion))


if __name__ == "__main__":
    main()
