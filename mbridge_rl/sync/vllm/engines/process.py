"""A vLLM engine in a process of its own, with the interface of `InProcessEngine`.

Calls and metadata go through a socket pair; weights through shared memory (`distributed.arena`). The child is a fresh
interpreter, started by command line rather than by `multiprocessing`, which would import the user's main script a second time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mbridge_rl.core.errors import EngineProcessError
from mbridge_rl.core.failure import Failure
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterSlotsInfo, AdapterUpdate
from mbridge_rl.sync.payload.message_codec import decode, encode
from mbridge_rl.sync.payload.messages import (
    Announcement,
    CommitReport,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerStatus,
)
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.sync.vllm.engines.process_calls import Call, Reply

logger = logging.getLogger(__name__)

_READY = -1  # the reply id under which a child reports that its engine is up
_LOG_LINES = 30
PROOF_OF_LIFE = 5.0  # seconds for a call while an earlier one is unanswered, so that a hung engine costs one call_timeout
_CALLS_AT_ONCE = 8
_IN_ORDER = frozenset(
    (
        "describe",
        "adopt",
        "begin",
        "commit",
        "abort",
        "publish",
        "catch_up",
        "put_adapter",
    )
)  # calls that change what is served; they run in the order in which they were made, even if the caller gave one up


class EngineProcess:
    """An `InProcessEngine` in a child process, which ends when this one does.

    `start` returns at once, so that the trainer can be built meanwhile; the first call waits for the engine.

    Args:
        model_dir: the checkpoint of `InProcessEngine`, which gets `engine_args` as well.
        start_timeout: seconds until the engine must be up.
        call_timeout: seconds until a call must be answered; after a call that was not, at most five until any answer comes.
        environment: environment variables of the child, beside those of this process.
        log_path: the file of the child's output; by default a temporary file, whose end is shown when the child fails.
        engine_args: the other arguments of `InProcessEngine`.
    """

    _program = "mbridge_rl.sync.vllm.engines.process"  # the module that the child runs

    def __init__(
        self,
        model_dir: str | Path,
        *,
        start_timeout: float = 300.0,
        call_timeout: float = 600.0,
        environment: Mapping[str, str] | None = None,
        log_path: str | Path | None = None,
        **engine_args: Any,
    ) -> None:
        self._settings = {"model_dir": str(model_dir), **engine_args}
        self._start_timeout, self._call_timeout = start_timeout, call_timeout
        self._environment = dict(environment or {})
        self._log = Path(log_path) if log_path else Path(tempfile.mkstemp(prefix="mbridge_rl-engine-", suffix=".log")[1])
        self._keeps_log = log_path is not None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = False
        self._segments: list[str] = []  # shared-memory files of the engine's workers, which stay if they are killed
        self._calls = 0
        self._replies: dict[int, Reply] = {}
        self._awaited: set[int] = set()
        self._reading = False
        self._silent = False
        self._lock = threading.Condition()

    def start(self) -> EngineProcess:
        """Starts the child and returns at once."""
        if self._process is not None:
            return self
        own_end, child_end = socket.socketpair()
        arguments = [str(child_end.fileno()), str(os.getpid()), json.dumps(self._settings)]
        command = [sys.executable, "-m", self._program, *arguments]
        with child_end, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=(child_end.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # so that its own workers can be ended with it
            )
        self._connection = Connection(own_end.detach())
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the engine is up.

        Raises:
            EngineProcessError: it died, or is not up in time; the message has the end of its log.
        """
        self.start()
        with self._lock:
            self._wait_ready(timeout)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """As `InProcessEngine.generate`."""
        return self._call("generate", [list(prompt) for prompt in prompts], **options)

    @property
    def weight_version(self) -> int:
        """The version that is served now, or was served last."""
        return self._call("weight_version")

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        return self._call("describe", announcement)

    def adopt(self, introduction: Introduction) -> None:
        self._call("adopt", introduction)

    def begin(self, request: UpdateRequest) -> None:
        self._call("begin", request)

    def status(self) -> list[WorkerStatus]:
        return self._call("status")

    def commit(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> CommitReport:
        return self._call("commit", version, requests, timeout)

    def abort(self, reason: str) -> None:
        self._call("abort", reason)

    def publish(self, paths: Sequence[str]) -> list[str]:
        return self._call("publish", list(paths))

    def catch_up(self, name: str, directory: str | None = None) -> CommitReport:
        return self._call("catch_up", name, directory)

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache")

    def adapter_info(self) -> AdapterSlotsInfo:
        return self._call("adapter_info")

    def put_adapter(self, update: AdapterUpdate) -> AdapterReport:
        return self._call("put_adapter", update)

    def remove_adapter(self, adapter: str) -> None:
        self._call("remove_adapter", adapter)

    def adapter_versions(self) -> dict[str, int]:
        return self._call("adapter_versions")

    def adapter_digests(self, adapter: str) -> dict[str, str]:
        return self._call("adapter_digests", adapter)

    def close(self, timeout: float = 20.0) -> None:
        """Ends the child, by force if it does not end within `timeout` seconds. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._connection is not None:
            self._connection.close()  # the child ends at the end of its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout if self._ready else 0.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _unlink(self._segments)
        if not self._keeps_log:
            self._log.unlink(missing_ok=True)

    def __enter__(self) -> EngineProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the child's engine. Calls of several threads run side by side in the child."""
        self.start()
        with self._lock:
            self._wait_ready(None)
            self._calls += 1
            call = self._calls
            assert self._connection is not None
            self._awaited.add(call)
            try:
                self._connection.send(Call(call, method, encode(args), encode(kwargs)))
            except OSError as error:
                raise self._failed(f"is gone, so that {method} could not be called") from error
            timeout = min(PROOF_OF_LIFE, self._call_timeout) if self._silent else self._call_timeout
            return self._reply(call, timeout, f"did not answer {method}")

    def _wait_ready(self, timeout: float | None) -> None:
        if not self._ready:
            self._awaited.add(_READY)
            self._segments = self._reply(_READY, self._start_timeout if timeout is None else timeout, "was not up")
            self._ready = True

    def _reply(self, call: int, timeout: float, complaint: str) -> Any:
        """The answer to `call`. One of the waiting threads reads for all; late answers to calls that timed out are dropped.

        Raises:
            EngineProcessError: there is no answer in time, or the child died; otherwise what the engine raised.
        """
        deadline = time.monotonic() + timeout
        try:
            while call not in self._replies:
                remaining = max(0.0, deadline - time.monotonic())
                if self._reading:
                    self._lock.wait(remaining)
                else:
                    self._read(remaining)
                if call not in self._replies and time.monotonic() >= deadline:
                    self._silent = True
                    raise self._failed(f"{complaint} within {timeout:g} s")
        finally:
            self._awaited.discard(call)
        reply = self._replies.pop(call)
        if reply.failure is not None:
            reply.failure.raise_()
        return decode(reply.result)

    def _read(self, seconds: float) -> None:
        """Reads one answer, and releases the lock meanwhile."""
        assert self._connection is not None
        self._reading = True
        self._lock.release()
        reply: Reply | None = None
        try:
            if self._connection.poll(seconds):
                reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._failed("died") from error
        finally:
            self._lock.acquire()
            self._reading = False
            self._silent = self._silent and reply is None
            if reply is not None and reply.call in self._awaited:
                self._replies[reply.call] = reply
            self._lock.notify_all()

    def _failed(self, complaint: str) -> EngineProcessError:
        code = None if self._process is None else self._process.poll()
        ended = "" if code is None else f" (exit status {code})"
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if self._log.exists() else []
        return EngineProcessError(f"the engine process {complaint}{ended}. The end of its log:\n" + "\n".join(lines))


def _unlink(segments: Sequence[str]) -> None:
    for path in segments:
        Path(path).unlink(missing_ok=True)


def _serve(connection: Connection, settings: dict[str, Any], segments: list[str]) -> None:
    """Runs in the child: builds the engine, adds its shared-memory files to `segments`, then answers calls until the connection
    ends."""
    from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine, import_vllm

    try:
        import_vllm()
        gc.freeze()  # vLLM collects garbage again and again as it starts, which takes seconds of going through imported modules
        engine = InProcessEngine(**settings)
    except Exception as error:
        connection.send(Reply(_READY, failure=Failure.of(error)))
        raise
    segments += engine.shared_memory_files()
    connection.send(Reply(_READY, segments))
    sending = threading.Lock()

    def answer(call: Call) -> None:
        try:
            member = getattr(engine, call.method)
            result = member(*decode(call.args), **decode(call.kwargs)) if callable(member) else member
            reply = Reply(call.number, encode(result))
        except Exception as error:
            logger.exception("%s failed", call.method)
            reply = Reply(call.number, failure=Failure.of(error))
        with sending:
            connection.send(reply)

    with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool, ThreadPoolExecutor(1) as in_order:
        while True:
            try:
                call: Call = connection.recv()
            except EOFError:
                break
            (in_order if call.method in _IN_ORDER else pool).submit(answer, call)
    engine.close()


def _end_with(parent: int, segments: Sequence[str]) -> None:
    """Ends this process when its parent dies. A thread watches for that, because the main thread may be generating."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        _unlink(segments)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> None:
    """Entry point of the child process. Its arguments are the file descriptor of its socket, the parent's pid, and the engine's
    settings as JSON."""
    descriptor, parent, settings = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    segments: list[str] = []
    _end_with(int(parent), segments)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(descriptor)), json.loads(settings), segments)
    sys.stdout.flush()
    os._exit(0)  # vLLM's teardown at interpreter exit takes seconds and has nothing left to do


if __name__ == "__main__":
    main()
