"""Light ends of a sync for tests that need many of them: an engine of plain tensors, and a trainer without Megatron.

Between them everything is the library's own: the engine's workers run the real receiver, store, transports and proofs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Client, Listener
from pathlib import Path
from threading import Thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any

import torch
from fused_engine import EngineLayout, FusedWorker
from tiny import tiny_config
from torch import Tensor, nn

from mbridge_rl.bridges import model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.errors import EngineMismatch, EngineProcessError, EngineUnusable, SyncError
from mbridge_rl.core.failure import Failure
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.host import machine_id
from mbridge_rl.sync.payload.compatibility import require_same_config
from mbridge_rl.sync.payload.message_codec import decode, encode
from mbridge_rl.sync.payload.messages import (
    Announcement,
    CommitReport,
    Introduction,
    UpdateRequest,
    WorkerDescription,
    WorkerStatus,
)
from mbridge_rl.sync.record.timeline import Stopwatch
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.joining import load_live_version
from mbridge_rl.sync.worker.payload_receiver import PayloadReceiver, merged_report
from mbridge_rl.sync.worker.serving_state import Serving
from mbridge_rl.sync.worker.update_watch import UpdateWatch

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 131}


class Latch:
    """A guard of nothing but a reason."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def block(self, reason: str) -> None:
        self.reason = reason

    def release(self) -> None:
        self.reason = None


class PlainModel:
    """What `PayloadReceiver` asks of an engine's model; tensors named in `unsplit` are placed by the worker's own loader."""

    settles = False

    def __init__(self, worker: FusedWorker) -> None:
        self.worker = worker

    def parameters(self) -> dict[str, Tensor]:
        return self.worker.parameters_by_name()

    @contextmanager
    def plain(self) -> Iterator[None]:
        yield

    def open(self) -> None:
        pass

    def load_unsplit(self, hf_name: str, tensor: Tensor) -> None:
        self.worker.load_weights([(hf_name, tensor.view(self.worker.hf_shapes[hf_name]))])

    def settle(self) -> None:
        pass

    def derive(self) -> None:
        pass


class StandInEngine:
    """An engine whose answer to every prompt is the digest of its live weights."""

    def __init__(
        self,
        variant: str = "qwen3",
        layout: EngineLayout | None = None,
        untraceable: Sequence[str] = (),
        state: Mapping[str, Tensor] | None = None,
        sizes: Mapping[str, Any] = SIZES,
        config: Any = None,
    ) -> None:
        self.config = config or tiny_config(variant, **sizes)
        self.layout = layout or EngineLayout(tp=2)
        self._untraceable = tuple(untraceable)
        state = random_weights(variant, 0) if state is None else state
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self.workers = [FusedWorker(self.config, shapes, self.layout, rank, dtypes) for rank in range(self.layout.size)]
        self.receivers = [PayloadReceiver(PlainModel(worker), Serving(Latch())) for worker in self.workers]
        for worker in self.workers:
            worker.load_weights(state.items())
        self.version = 0
        self._watch: UpdateWatch | None = None
        self._open: UpdateRequest | None = None

    def generate(self) -> tuple[int, str]:
        for receiver in self.receivers:
            if receiver.serving.guard.reason is not None:
                raise EngineUnusable(receiver.serving.guard.reason)
        if len({receiver.serving.fill for receiver in self.receivers}) > 1:
            raise EngineUnusable("the workers hold weights of different syncs")
        return self.version, weights_digest([worker.parameters_by_name() for worker in self.workers])

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        require_same_config(announcement.config, self.config)
        if wide := [tensor.hf_name for tensor in announcement.tensors if tensor.dtype == torch.float64]:
            raise EngineMismatch(f"{wide[0]}: the trainer sends torch.float64, the engine holds torch.float32")
        return [self._description(worker.describe(list(announcement.tensors))) for worker in self.workers]

    def _description(self, worker: WorkerDescription) -> WorkerDescription:
        unsplit = {name: "a test wants it so" for name in self._untraceable if name in worker.landings}
        landings = {name: parts for name, parts in worker.landings.items() if name not in unsplit}
        return replace(worker, host=machine_id(), unsplit=unsplit, landings=landings)

    def adopt(self, introduction: Introduction) -> None:
        for rank, receiver in enumerate(self.receivers):
            receiver.adopt(rank, introduction)

    def begin(self, request: UpdateRequest) -> None:
        self._open = None
        for receiver in self.receivers:
            receiver.begin(request)
        self._open = request
        if request.mode == "streaming":
            self._watch = UpdateWatch(self.status, self.abort, request.timeout)

    def status(self) -> list[WorkerStatus]:
        return [receiver.status() for receiver in self.receivers]

    def commit(self, version: int, requests: str = "keep", timeout: float = 600.0) -> CommitReport:
        self._end_watch()
        if self._open is None or self._open.version != version:
            raise SyncError(f"version {version} cannot be committed: open is {self._open}")
        request, self._open = self._open, None
        watch = Stopwatch("engine")
        with watch("pause"):
            report = self._commit(version, request.fill)
        return replace(report, spans=(*report.spans, *watch.spans))

    def abort(self, reason: str) -> None:
        self._end_watch()
        self._open = None
        for receiver in self.receivers:
            receiver.abort(reason)

    def publish(self, paths: Sequence[str]) -> list[str]:
        for receiver, path in zip(self.receivers, paths, strict=True):
            receiver.publish_to(path)
        return [receiver.fingerprint for receiver in self.receivers]

    def catch_up(self, name: str, directory: str) -> CommitReport:
        return load_live_version(self, WeightStore(name, directory))

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _commit(self, version: int, fill: str) -> CommitReport:
        """As `TransactionalEngine`: if one worker fails, none serves the update alone."""
        try:
            report = merged_report([receiver.commit(version, fill) for receiver in self.receivers])
        except Exception as error:
            for receiver in self.receivers:
                receiver.lose(version, str(error), fill)
            raise
        self.version = version
        return report


def weights_digest(workers: Sequence[Mapping[str, Tensor]]) -> str:
    """Of all workers' parameters, padding included."""
    state = hashlib.blake2b(digest_size=8)
    for parameters in workers:
        for name, tensor in sorted(parameters.items()):
            state.update(name.encode())
            state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def served(state: Mapping[str, Tensor], variant: str = "qwen3", layout: EngineLayout | None = None) -> str:
    """The digest of a fresh engine that loaded `state`."""
    return StandInEngine(variant, layout, state=state).generate()[1]


class _Module(nn.Module):
    """Takes any tree of names."""

    def add(self, path: Sequence[str], tensor: Tensor) -> None:
        if len(path) == 1:
            self.register_parameter(path[0], nn.Parameter(tensor, requires_grad=False))
            return
        if path[0] not in self._modules:
            self.add_module(path[0], _Module())
        child = self._modules[path[0]]
        assert isinstance(child, _Module)
        child.add(path[1:], tensor)


def light_model(
    variant: str, layout: ParallelLayout, rank: int, state: Mapping[str, Tensor], sizes: Mapping[str, Any] = SIZES
) -> tuple[Any, list[nn.Module]]:
    """`plain_trainer` of a tiny model."""
    return plain_trainer(tiny_config(variant, **sizes), layout, rank, state)


def plain_trainer(config: Any, layout: ParallelLayout, rank: int, state: Mapping[str, Tensor]) -> tuple[Any, list[nn.Module]]:
    """A bridge and what one rank of `layout` holds of `state`, under Megatron's own names: a trainer without Megatron."""
    spec = model_spec(config)
    dtype = next(iter(state.values())).dtype
    side = megatron_side(spec, layout, rank)
    tensors = virtual.allocate(side, dict.fromkeys(spec.hf_shapes, dtype))
    virtual.run(compile_plan(spec, hf_side(spec), side), {0: state}, {rank: tensors})
    chunk = _Module()
    numbers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")})
    before = layout.coordinates(rank).ep * (spec.num_experts or 0) // layout.ep
    for name, tensor in tensors.items():
        path = name.split(".")
        if name.startswith("decoder.layers."):
            path[2] = str(numbers.index(int(path[2])))
        if ".experts.linear_fc" in name:
            path[-1] = f"weight{int(path[-1].removeprefix('weight')) - before}"
        chunk.add(path, tensor)
    if "decoder" not in chunk._modules:
        chunk.add_module("decoder", _Module())
    layers = nn.ModuleList(chunk.decoder._modules.pop("layers", nn.ModuleList()).children())
    for layer, number in zip(layers, numbers, strict=True):
        layer.layer_number = number + 1
    chunk.decoder.layers = layers
    chunk.parallel_layout = layout
    chunk.config = SimpleNamespace(params_dtype=dtype)
    return SimpleNamespace(spec=spec, hf_config=config), [chunk]


def random_weights(variant: str, seed: int) -> dict[str, Tensor]:
    """A state dict, nowhere zero."""
    spec: ModelSpec = model_spec(tiny_config(variant, **SIZES))
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) + 0.5 + seed for name, shape in spec.hf_shapes.items()}


def set_weights(bridge: Any, model: list[nn.Module], rank: int, state: Mapping[str, Tensor]) -> None:
    """What an optimizer step does: other values in the same parameters."""
    from mbridge_rl.megatron.parameters import live_side

    live, side = live_side(model, bridge.spec, model[0].parallel_layout, rank)
    virtual.run(compile_plan(bridge.spec, hf_side(bridge.spec), side), {0: state}, {rank: {n: live.stored(n) for n in live}})


def serve(address: Path, variant: str, layout: EngineLayout, engine: StandInEngine | None = None) -> None:
    """An engine in a process of its own, for any number of clients one after the other or side by side; ends when killed, or
    when a client calls `shut_down`."""
    torch.set_num_threads(1)
    engine = engine or StandInEngine(variant, layout)
    with Listener(str(address), "AF_UNIX") as listener:
        while True:
            Thread(target=_serve_client, args=(engine, listener.accept()), daemon=True).start()


def _serve_client(engine: StandInEngine, connection: Any) -> None:
    while True:
        try:
            method, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if method == "shut_down":
                engine.close()
                connection.send((True, [thread.name for thread in enumerate_threads() if thread.name.startswith("mbridge")]))
                os._exit(0)
            reply = (True, encode(getattr(engine, method)(*decode(args), **decode(kwargs))))
        except Exception as error:
            reply = (False, Failure.of(error).to_json())
        try:
            connection.send(reply)
        except OSError:
            return


def connected(address: Path) -> Any:
    """The socket's file is there a moment before anyone listens."""
    deadline = time.monotonic() + 20.0
    while True:
        try:
            return Client(str(address), "AF_UNIX")
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class RemoteEngine:
    """A client of `serve`."""

    def __init__(self, address: Path, timeout: float = 20.0) -> None:
        self._connection, self._timeout = connected(address), timeout

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                self._connection.send((method, encode(args), encode(kwargs)))
                if not self._connection.poll(self._timeout):
                    raise EngineProcessError(f"the engine did not answer {method} within {self._timeout:g} s")
                succeeded, result = self._connection.recv()
            except (EOFError, OSError) as error:
                raise EngineProcessError(f"the engine died at {method}") from error
            if not succeeded:
                Failure.from_json(result).raise_()
            return decode(result)

        return call
