"""A refit of half a billion parameters through shared memory, against memcpy and against verl's bucket protocol.

    python benchmarks/refit.py

Two trainer ranks (TP=2) and an engine of two workers (TP=2), each worker a process of its own, as vLLM's are; all on this
machine, bf16. The workers hold plain tensors in vLLM's fused layouts: what is measured is moving and loading, not vLLM. All
ways take turns, round after round; medians count, and processor seconds of all four processes together, which other programs on
the machine disturb least.

verl's protocol (`verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py`): each trainer rank fills one buffer with whole
HF tensors, describes it in a message, and waits for the ACK of its worker, which has passed all of them to `load_weights`,
before it fills it again. Three ways to count it:

* `fed for nothing`: the rank has all whole HF tensors at hand, and one buffer of a cache's size, mapped once and kept.
* `gathered`: the same, fed from Megatron's shards, by the fastest gather that we have (`TensorStream` through shared memory).
* `as published`: gathered, and a new segment of 512 MiB, its default, for every update.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", GLOO_SOCKET_IFNAME="lo")

import argparse
import mmap
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Listener
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fused_engine import EngineLayout, FusedWorker  # noqa: E402
from ranks import run_ranks  # noqa: E402
from standin import RemoteEngine, StandInEngine, connected, light_model, serve  # noqa: E402
from tiny import tiny_config  # noqa: E402
from torch import Tensor  # noqa: E402

from mbridge_rl.bridges import model_spec  # noqa: E402
from mbridge_rl.core.layout import ParallelLayout  # noqa: E402
from mbridge_rl.core.plan import compile_plan  # noqa: E402
from mbridge_rl.core.segments import hf_side, megatron_side  # noqa: E402
from mbridge_rl.distributed.group import RankGroup  # noqa: E402
from mbridge_rl.distributed.stream import TensorStream  # noqa: E402
from mbridge_rl.megatron.parameters import live_side  # noqa: E402
from mbridge_rl.sync.payload.messages import (  # noqa: E402
    Announcement,
    CommitReport,
    Introduction,
    WorkerDescription,
    WorkerReport,
    WorkerStatus,
)
from mbridge_rl.sync.weight_sync import SyncReport, WeightSync  # noqa: E402
from mbridge_rl.sync.worker.payload_receiver import merged_report  # noqa: E402

SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 34,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
LAYOUT, ENGINE = ParallelLayout(tp=2), EngineLayout(tp=2)
WAYS = {
    "streaming": {"mode": "streaming"},
    "staged": {"mode": "staged"},
    "streaming, bare": {"mode": "streaming", "verify": False, "nonfinite": "pass"},
    "staged, bare": {"mode": "staged", "verify": False, "nonfinite": "pass"},
}
REUSED_BUFFER, PUBLISHED_BUFFER = 16 << 20, 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--bucket-mib", type=float, help="instead of the default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SIZES | {"num_hidden_layers": arguments.layers}
    shapes = model_spec(tiny_config("qwen3", **sizes)).hf_shapes
    state = {name: torch.randn(1, dtype=torch.bfloat16).expand(shape).clone() for name, shape in shapes.items()}
    workers: list[int] = []
    with tempfile.TemporaryDirectory(prefix="mbridge_bench_") as folder:
        try:
            for rank in range(ENGINE.size):
                workers.append(os.fork())
                if workers[-1] == 0:
                    _serve(Path(folder), rank, state, sizes)
            results = run_ranks(_rank, LAYOUT.world_size, Path(folder), state, sizes, arguments, timeout=3000)[0]
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
                os.waitpid(worker, 0)
    _print(results, sum(tensor.numel() for tensor in state.values()))


class _Worker(StandInEngine):
    """One of the engine's workers, in its process."""

    def __init__(self, rank: int, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> None:
        super().__init__("qwen3", ENGINE, state=state, sizes=sizes)
        self.workers, self.receivers = self.workers[rank : rank + 1], self.receivers[rank : rank + 1]
        self._rank = rank

    def adopt(self, introduction: Introduction) -> None:
        self.receivers[0].adopt(self._rank, introduction)

    def commit(self, version: int, requests: str = "keep", timeout: float = 600.0) -> WorkerReport:  # type: ignore[override]
        self._end_watch()
        return self.receivers[0].commit(version)

    def processor_seconds(self) -> float:
        return _processor_seconds()


class _Engine:
    """A client that asks all workers at once."""

    def __init__(self, folder: Path) -> None:
        self._workers = [RemoteEngine(folder / f"worker-{rank}", timeout=600.0) for rank in range(ENGINE.size)]
        self._threads = ThreadPoolExecutor(ENGINE.size)

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        return [workers[0] for workers in self._all("describe", announcement)]

    def status(self) -> list[WorkerStatus]:
        return [workers[0] for workers in self._all("status")]

    def commit(self, *args: Any, **kwargs: Any) -> CommitReport:
        return merged_report(self._all("commit", *args, **kwargs))

    def processor_seconds(self) -> float:
        return sum(self._all("processor_seconds"))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._all(method, *args, **kwargs)[0]

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return list(self._threads.map(lambda worker: getattr(worker, method)(*args, **kwargs), self._workers))


def _serve(folder: Path, rank: int, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1)
    worker = _Worker(rank, state, sizes)
    receive = threading.Thread(target=_receive_as_verl_does, args=(folder / f"verl-{rank}", worker.workers[0]), daemon=True)
    receive.start()
    serve(folder / f"worker-{rank}", "qwen3", ENGINE, worker)


def _rank(rank: int, folder: Path, state: Mapping[str, Tensor], sizes: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    bridge, model = light_model("qwen3", LAYOUT, rank, state, sizes)
    while not all((folder / f"{kind}-{other}").exists() for kind in ("worker", "verl") for other in range(ENGINE.size)):
        time.sleep(0.1)
    engine = _Engine(folder) if rank == 0 else None
    source = [parameter.data for parameter in model[0].parameters()]
    target = [torch.zeros_like(tensor) for tensor in source]
    verl, gathered = _VerlSender(folder / f"verl-{rank}"), _gather(bridge, model, rank)
    references: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: [b.copy_(a) for a, b in zip(source, target, strict=True)],
        "verl, fed for nothing": lambda: verl.send_all(state.items()),
        "verl, gathered": lambda: verl.send_all(gathered()),
        "verl, as published": lambda: verl.send_all(gathered(), PUBLISHED_BUFFER),
    }
    bucket = {} if arguments.bucket_mib is None else {"bucket_bytes": int(arguments.bucket_mib * (1 << 20))}
    results: dict[str, Any] = {name: [] for name in (*references, *WAYS)}
    version = 0
    for name, options in WAYS.items():  # the engine gets its route when a sync is made, before any refit
        sync = WeightSync(bridge, model, engine, **options, **bucket)
        for round_number in range(-2, arguments.rounds):  # the first two touch the memory of both slots
            version += 1
            measured = _measured(lambda sync=sync, version=version: sync.sync(version), engine)
            if round_number >= 0:
                results[name].append(measured)
            for reference, action in references.items():
                measured = _measured(action, engine)
                if round_number >= 0:
                    results[reference].append(measured)
        sync.close()
    verl.close()
    results["bytes"] = 2 * sum(tensor.nbytes for tensor in source)
    return results


def _gather(bridge: Any, model: Any, rank: int) -> Callable[[], Iterable[tuple[str, Tensor]]]:
    """Whole HF tensors, from the shards of all ranks, on every rank."""
    live, _ = live_side(model, bridge.spec, LAYOUT, rank)
    plan = compile_plan(bridge.spec, megatron_side(bridge.spec, LAYOUT), hf_side(bridge.spec, range(LAYOUT.world_size)))
    stream = TensorStream(plan, dict.fromkeys(bridge.spec.hf_shapes, torch.bfloat16), RankGroup(), transport="shared_memory")
    return lambda: stream.run(live)


def _measured(action: Callable[[], Any], engine: _Engine | None) -> tuple[float, float, Any]:
    """Seconds from when all ranks are ready until all are done, processor seconds of all processes, and what came out of it."""
    before = _everybodys_processor_seconds(engine)
    dist.barrier()
    started = time.perf_counter()
    result = action()
    dist.barrier()
    seconds = time.perf_counter() - started
    return seconds, _everybodys_processor_seconds(engine) - before, result if isinstance(result, SyncReport) else None


def _everybodys_processor_seconds(engine: _Engine | None) -> float:
    own = torch.tensor(_processor_seconds() + (engine.processor_seconds() if engine else 0.0), dtype=torch.float64)
    dist.all_reduce(own)
    return float(own)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _VerlSender:
    """Sends tensors through one buffer in shared memory, and metadata and ACKs over a socket."""

    def __init__(self, address: Path) -> None:
        self._connection = connected(address)
        self._reused: _Segment | None = None

    def send_all(self, tensors: Iterable[tuple[str, Tensor]], new_buffer: int = 0) -> None:
        """Sends all tensors through a buffer of `new_buffer` bytes, made for this update, or else through the reused one."""
        if self._reused is None and not new_buffer:
            self._reused = _Segment.create(max(REUSED_BUFFER, SIZES["vocab_size"] * SIZES["hidden_size"] * 2))
        segment = _Segment.create(new_buffer) if new_buffer else self._reused
        assert segment is not None
        self._connection.send((segment.path, bool(new_buffer)))
        size, buffer = new_buffer or REUSED_BUFFER, segment.bytes
        held: list[tuple[str, int, tuple[int, ...]]] = []
        end = 0
        for name, tensor in tensors:
            if held and end + tensor.nbytes > size:
                self._flush(held, last=False)
                held, end = [], 0
            buffer[end : end + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            held.append((name, end, tuple(tensor.shape)))
            end += tensor.nbytes
        self._flush(held, last=True)
        if new_buffer:
            os.unlink(segment.path)

    def close(self) -> None:
        if self._reused is not None:
            os.unlink(self._reused.path)

    def _flush(self, held: list[tuple[str, int, tuple[int, ...]]], last: bool) -> None:
        self._connection.send((held, last))
        self._connection.recv()  # the ACK


class _Segment:
    """Shared memory whose pages come as they are touched, and go with the last that maps it."""

    def __init__(self, path: str) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR)
        self.bytes = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
        os.close(descriptor)

    @classmethod
    def create(cls, size: int) -> _Segment:
        descriptor, path = tempfile.mkstemp(prefix="verl_weights_", dir="/dev/shm")
        os.ftruncate(descriptor, size)
        os.close(descriptor)
        return cls(path)


def _receive_as_verl_does(address: Path, worker: FusedWorker) -> None:
    reused: dict[str, _Segment] = {}
    with Listener(str(address), "AF_UNIX") as listener, listener.accept() as connection:
        while True:
            try:
                path, once = connection.recv()
            except EOFError:
                return
            segment = reused.get(path) or _Segment(path)
            if not once:
                reused[path] = segment
            _receive_update(connection, segment.bytes, worker)


def _receive_update(connection: Any, buffer: Tensor, worker: FusedWorker) -> None:
    last = False
    while not last:
        held, last = connection.recv()
        with torch.no_grad():
            worker.load_weights((name, _tensor(buffer, at, shape)) for name, at, shape in held)
        connection.send(True)


def _tensor(buffer: Tensor, at: int, shape: Sequence[int]) -> Tensor:
    return buffer[at : at + 2 * torch.Size(shape).numel()].view(torch.bfloat16).view(shape)


def _print(results: Mapping[str, Any], parameters: int) -> None:
    nbytes = results["bytes"]
    copied = median(seconds for seconds, _, _ in results["memcpy"])
    verl = {name: _medians(runs) for name, runs in results.items() if name.startswith("verl")}
    print(
        f"{parameters / 1e9:.2f} B parameters, {nbytes / 1e9:.2f} GB in the trainer's shards; medians; cpu: processor seconds"
    )
    print(f"{'':22s} seconds    cpu   GB/s   times faster than verl fed for nothing, gathered, as published (cpu)")
    for name, runs in results.items():
        if name == "bytes":
            continue
        seconds, busy = _medians(runs)
        ratios = ", ".join(f"{their / seconds:.2f} ({theirs / busy:.2f})" for their, theirs in verl.values())
        print(f"{name:22s} {seconds:7.3f} {busy:6.2f} {nbytes / seconds / 1e9:6.2f}   {ratios}")
    print(f"of which, in seconds; the transfer also in parts of memcpy's bandwidth (both ranks at once, {copied:.3f} s)")
    for name in WAYS:
        reports = [report for _, _, report in results[name]]
        transfer = median(report.phases["transfer"] for report in reports)
        pause = median(map(_pause, reports))
        phases = {phase: median(report.phases.get(phase, 0.0) for report in reports) for phase in reports[0].phases}
        detail = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in phases.items())
        print(f"{name:22s} transfer {transfer:.3f} = {copied / transfer:4.0%}; pause {pause:.3f}; {detail}")


def _pause(report: SyncReport) -> float:
    """Seconds in which engines do not generate: staged at the commit, streaming from the first byte on."""
    return report.phases["commit"] if report.mode == "staged" else report.seconds - report.phases["check"]


def _medians(runs: Sequence[tuple[float, float, Any]]) -> tuple[float, float]:
    return median(seconds for seconds, _, _ in runs), median(busy for _, busy, _ in runs)


if __name__ == "__main__":
    main()
