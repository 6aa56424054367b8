"""Engines that somebody else runs: a user's `AsyncLLM`, a `vllm serve`, a Ray actor. All are real, and all take the same
transaction; `make nightly` plays what takes longest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray_scenarios

pytest.importorskip("vllm")

import attached_scenarios as scenarios
from adapter_scenarios import ENGINE
from adapters_in_turn import adapt_in_turn
from interpreter import Interpreter
from ranks import run_ranks
from tiny import tiny_checkpoint

from mbridge_rl.core.errors import EngineProcessError, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.lora.attach import LoRAConfig
from mbridge_rl.sync.vllm.engines.async_engine import AsyncEngine
from mbridge_rl.sync.vllm.engines.server import ServerEngine

ENVIRONMENT = {"VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
START_SECONDS = 300.0
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
LAYOUT, LORA = ParallelLayout(tp=2), LoRAConfig(rank=4, alpha=10.0)


@pytest.fixture
def elsewhere() -> Iterator[Interpreter]:
    interpreter = Interpreter(**ENVIRONMENT)
    yield interpreter
    interpreter.close()


@pytest.mark.slow
@pytest.mark.nightly
def test_an_async_llm(elsewhere: Interpreter, tmp_path: Path) -> None:
    elsewhere.call(scenarios.an_async_llm, tmp_path, timeout=500)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_ray_actor(elsewhere: Interpreter, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    elsewhere.call(ray_scenarios.a_ray_actor, tmp_path, timeout=500)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_an_async_llm_with_two_workers(elsewhere: Interpreter, tmp_path: Path) -> None:
    scenarios.make_checkpoints(tmp_path)
    wanted = elsewhere.call(scenarios.fresh, tmp_path, "B")
    elsewhere.close()

    def start() -> AsyncEngine:
        return scenarios.started_async_engine(tmp_path / "A", **scenarios.LIMITS, **TWO_WORKERS)

    run_ranks(scenarios.refit_from_megatron, 2, tmp_path, start, wanted, timeout=500)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_a_ray_actor_with_two_workers(elsewhere: Interpreter, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    elsewhere.call(ray_scenarios.a_ray_actor_with_two_workers, tmp_path, timeout=500)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_a_killed_ray_actor_with_two_workers_leaves_nothing(elsewhere: Interpreter, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    elsewhere.call(ray_scenarios.a_killed_ray_actor_with_two_workers, tmp_path, timeout=500)


@contextmanager
def serving(model: Path, *options: str, **environment: str) -> Iterator[str]:
    """The URL of a `vllm serve` with `options`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(1 << 26)]
    command += ["--weight-transfer-config", '{"backend": "mbridge"}', "--logprobs-mode", "processed_logprobs"]
    command += ["--worker-extension-cls", "mbridge_rl.sync.vllm.extension.WorkerExtension"]
    variables = os.environ | ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"} | environment
    shown = model.parent / "server.log"
    with shown.open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(shown.read_text()[-3000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_server(elsewhere: Interpreter, tmp_path: Path) -> None:
    scenarios.make_checkpoints(tmp_path)
    with serving(tmp_path / "A") as url:
        elsewhere.call(scenarios.a_server, tmp_path, url, timeout=500)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_a_server_with_two_workers(elsewhere: Interpreter, tmp_path: Path) -> None:
    scenarios.make_checkpoints(tmp_path)
    wanted = elsewhere.call(scenarios.fresh, tmp_path, "B")
    elsewhere.close()
    with serving(tmp_path / "A", "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="nobind") as url:
        run_ranks(scenarios.refit_from_megatron, 2, tmp_path, lambda: ServerEngine(url), wanted, timeout=500)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_server_whose_trainer_is_killed(elsewhere: Interpreter, tmp_path: Path) -> None:
    scenarios.make_checkpoints(tmp_path)
    with serving(tmp_path / "A") as url:
        elsewhere.call(scenarios.trainers_are_killed, tmp_path, url, timeout=500)


@pytest.mark.slow
@pytest.mark.nightly
def test_adapters_of_an_async_llm(tmp_path: Path) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", "qwen3", seed=0, **scenarios.SIZES)
    adapt_in_turn(LAYOUT, start, LORA, lambda: scenarios.started_async_engine(start, **ENGINE), updates=4, timeout=500)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_adapters_of_a_server_with_two_workers(tmp_path: Path) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", "qwen3", seed=0, **scenarios.SIZES)
    options = ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "8", "--tensor-parallel-size", "2"]
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(start, *options, **variables) as url:
        adapt_in_turn(LAYOUT, start, LORA, lambda: ServerEngine(url), updates=4, timeout=500)
        scenarios.names_adapters_for_everybody(url, start)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class OtherServer(BaseHTTPRequestHandler):
    """A server that was started without what a trainer needs."""

    answers: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012  one for all requests

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path.partition("?")[0], (404, b"{}"))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_a_server_that_cannot_be_synced_says_what_it_lacks() -> None:
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(SyncError, match=r"has no /get_world_size.*VLLM_SERVER_DEV_MODE=1"):
            ServerEngine(url)
        OtherServer.answers["/get_world_size"] = (200, b'{"world_size": 2}')
        OtherServer.answers["/collective_rpc"] = (500, b"Method 'mbridge_rl_call' is not implemented.")
        with pytest.raises(SyncError, match=r"--worker-extension-cls mbridge_rl.sync.vllm.extension.WorkerExtension"):
            ServerEngine(url)
        server.shutdown()
    with pytest.raises(EngineProcessError, match="cannot be reached"):
        ServerEngine(url)
