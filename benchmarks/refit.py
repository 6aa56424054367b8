"""A refit of half a billion parameters through shared memory, against memcpy and against verl's bucket protocol.

    python benchmarks/refit.py

Two trainer ranks (TP=2) and an engine of two workers (TP=2) in a process of its own, all on this machine, bf16. The engine is
plain tensors in vLLM's fused layouts: what is measured is moving and loading, not vLLM. The ways alternate and the best of each
counts, since what disturbs a measurement on a shared machine only ever adds to it.

verl's protocol (verl 0.8, `BucketedWeightSender`): per worker one buffer, filled with whole HF tensors, and an ACK for every
bucket before it is filled again; every worker receives every tensor and its loader keeps a part. It is given its tensors
already gathered, which verl would have to do first.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", GLOO_SOCKET_IFNAME="lo")

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fused_engine import EngineLayout, FusedWorker  # noqa: E402
from ranks import run_ranks  # noqa: E402
from standin import RemoteEngine, StandInEngine, connected, light_model, serve  # noqa: E402
from tiny import tiny_config  # noqa: E402
from torch import Tensor  # noqa: E402

from mbridge_rl.bridges import model_spec  # noqa: E402
from mbridge_rl.core.layout import ParallelLayout  # noqa: E402
from mbridge_rl.sync.arena import Arena  # noqa: E402
from mbridge_rl.sync.refit import SyncReport, WeightSync  # noqa: E402

SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 34,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
LAYOUT, ENGINE = ParallelLayout(tp=2), EngineLayout(tp=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--bucket-mib", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SIZES | {"num_hidden_layers": arguments.layers}
    shapes = model_spec(tiny_config("qwen3", **sizes)).hf_shapes
    state = {name: torch.randn(1, dtype=torch.bfloat16).expand(shape).clone() for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(prefix="mbridge_bench_") as folder:
        engine = os.fork()
        if engine == 0:
            _serve(Path(folder), state, sizes)
        try:
            found = run_ranks(_rank, 2, Path(folder), state, sizes, arguments, timeout=1800)[0]
        finally:
            os.kill(engine, signal.SIGKILL)
            os.waitpid(engine, 0)
    _print(found, sum(tensor.numel() for tensor in state.values()))


def _serve(folder: Path, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1)
    engine = StandInEngine("qwen3", ENGINE, state=state, sizes=sizes)
    for worker in engine.workers:
        threading.Thread(target=_receive_as_verl_does, args=(folder / f"verl-{worker.rank}", worker), daemon=True).start()
    serve(folder / "engine", "qwen3", ENGINE, engine)


def _rank(rank: int, folder: Path, state: Mapping[str, Tensor], sizes: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    bridge, model = light_model("qwen3", LAYOUT, rank, state, sizes)
    while not (folder / "engine").exists():
        time.sleep(0.1)
    client = RemoteEngine(folder / "engine", timeout=600.0) if rank == 0 else None
    bucket = arguments.bucket_mib << 20
    found: dict[str, Any] = {"memcpy": [], "verl": []}
    source = [parameter.data for parameter in model[0].parameters()]
    target = [torch.empty_like(tensor).zero_() for tensor in source]
    verl = _VerlSender(folder / f"verl-{rank}", state, bucket)
    version = 0
    for round_number in range(arguments.rounds + 1):  # the first warms up
        for mode in ("staged", "streaming"):
            for verify in (False, True):
                name = f"{mode}{' with proof' if verify else ''}"
                version += 1
                # A route is told to the engine when a sync is made; making it anew is not part of a refit.
                sync = WeightSync(bridge, model, client, mode=mode, verify=verify, bucket_bytes=bucket, nonfinite="pass")
                for again in range(3):  # the first two touch the memory of both slots
                    report, seconds = _timed(lambda sync=sync, version=version, again=again: sync.sync(3 * version + again))
                sync.close()
                if round_number:
                    found.setdefault(name, []).append((seconds, report))
        _, copied = _timed(lambda: [b.copy_(a) for a, b in zip(source, target, strict=True)])
        _, verls = _timed(verl.send_all)
        if round_number:
            found["memcpy"].append(copied)
            found["verl"].append(verls)
    found["bytes"] = 2 * sum(tensor.nbytes for tensor in source)
    return found


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Seconds from when all ranks are ready until all are done."""
    dist.barrier()
    started = time.perf_counter()
    result = action()
    dist.barrier()
    return result, time.perf_counter() - started


class _VerlSender:
    """One buffer in shared memory; metadata and ACKs over a socket."""

    def __init__(self, address: Path, state: Mapping[str, Tensor], bucket: int) -> None:
        self._state = state
        self._size = max(bucket, *(tensor.nbytes for tensor in state.values()))
        self._buffer = Arena.create(self._size)
        while not address.exists():
            time.sleep(0.1)
        self._connection = connected(address)
        self._connection.send((self._buffer.path, self._size))

    def send_all(self) -> None:
        held: list[tuple[str, int, tuple[int, ...]]] = []
        end = 0
        for name, tensor in self._state.items():
            if end + tensor.nbytes > self._size:
                self._flush(held)
                held, end = [], 0
            self._buffer.view(end, tuple(tensor.shape), tensor.dtype).copy_(tensor)
            held.append((name, end, tuple(tensor.shape)))
            end += tensor.nbytes
        self._flush(held)

    def _flush(self, held: list[tuple[str, int, tuple[int, ...]]]) -> None:
        self._connection.send(held)
        self._connection.recv()  # the ACK


def _receive_as_verl_does(address: Path, worker: FusedWorker) -> None:
    with Listener(str(address), "AF_UNIX") as listener, listener.accept() as connection:
        path, size = connection.recv()
        buffer = Arena.attach(path, size)
        while True:
            try:
                held = connection.recv()
            except EOFError:
                return
            with torch.no_grad():
                worker.load_weights((name, buffer.view(at, shape, torch.bfloat16)) for name, at, shape in held)
            connection.send(True)


def _print(found: Mapping[str, Any], parameters: int) -> None:
    nbytes = found["bytes"]
    memcpy, verl = min(found["memcpy"]), min(found["verl"])
    print(f"{parameters / 1e9:.2f} B parameters, {nbytes / 1e9:.2f} GB in the trainer's shards, best of {len(found['memcpy'])}")
    print(f"{'memcpy, both ranks at once':34s} {memcpy:6.3f} s  {nbytes / memcpy / 1e9:6.2f} GB/s")
    print(f"{'verl: one buffer, ACK per bucket':34s} {verl:6.3f} s  {nbytes / verl / 1e9:6.2f} GB/s")
    for name in ("streaming", "streaming with proof", "staged", "staged with proof"):
        seconds, report = min(found[name], key=lambda run: run[0])
        assert isinstance(report, SyncReport)
        engine = report.engine["seconds"]
        transfer = min(run[1].phases["transfer"] for run in found[name])
        load = min(run[1].engine["seconds"].get("load", run[1].phases["transfer"]) for run in found[name])
        pause = report.phases["commit"] if name.startswith("staged") else seconds
        print(
            f"{name:34s} {seconds:6.3f} s  {nbytes / seconds / 1e9:6.2f} GB/s  {verl / seconds:5.2f}x verl; transfer "
            f"{transfer:.3f} s = {memcpy / transfer:4.0%} of memcpy; pause {pause:.3f} s (load {load:.3f}, proof "
            f"{engine['verify']:.3f})"
        )


if __name__ == "__main__":
    main()
