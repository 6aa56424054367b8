"""The checkpoint engine, driven as verl's manager drives it: with verl's own base class where verl is installed (it was run
with 0.9.1), else with a stand-in of it. Actors are gloo Megatron ranks, rollout workers threads beside two of them."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live import live, raised
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import tiny_checkpoint

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.integrations.broadcast import Broadcast
from mbridge_rl.megatron.lora.attach import add_lora

if importlib.util.find_spec("verl") is None:
    sys.path.append(str(Path(__file__).parents[1] / "support" / "stub_frameworks"))

LAYOUT = ParallelLayout(tp=2, pp=2)
WORKERS = (1, 3)  # the ranks beside which a rollout worker lives
BUCKET = 1 << 13  # most tensors are larger


class Manager:
    """Does what `CheckpointEngineManager.update_weights` does, on every rank. Calls of actors and workers run side by side, as
    they do in Ray actors."""

    def __init__(self, rank: int) -> None:
        from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

        importlib.import_module("mbridge_rl.integrations.verl")  # as `custom_backend_module`
        self.backend = CheckpointEngineRegistry.get("mbridge")
        assert issubclass(self.backend, CheckpointEngine)
        options = {"bucket_size": BUCKET, "timeout": 4.0}
        self.actor = CheckpointEngineRegistry.new("mbridge", is_master=rank == 0, **options)
        self.worker = CheckpointEngineRegistry.new("mbridge", **options) if rank in WORKERS else None
        self.rank, self.threads = rank, ThreadPoolExecutor(2)

    def update(self, weights: Iterator[Any], step: int, expected_step: int | None = None) -> tuple[Any, Any]:
        """What sending and receiving gave, on this rank; errors as text."""
        self._build()
        sending = self.threads.submit(
            lambda: _outcome(lambda: asyncio.run(self.actor.send_weights(weights, global_steps=step)))
        )
        received = None
        if self.worker is not None:
            worker, wanted = self.worker, step if expected_step is None else expected_step
            received = self.threads.submit(lambda: _outcome(lambda: asyncio.run(_received(worker, wanted)))).result()
        sent = sending.result()
        self.actor.finalize()
        if self.worker is not None:
            self.worker.finalize()
        dist.barrier()
        return sent, received

    def _build(self) -> None:
        prepared: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(prepared, (self.actor.prepare(), self.worker and self.worker.prepare()))
        metadata = [actor for actor, _ in prepared] + [worker for _, worker in prepared if worker]
        actors, rollout = self.backend.build_topology(len(prepared), len(WORKERS), metadata)
        assert {len(values) for values in actors.values()} == {len(prepared)}
        assert {len(values) for values in rollout.values()} == {len(WORKERS)}
        calls = [(self.actor, actors, self.rank)]
        if self.worker is not None:
            calls.append((self.worker, rollout, WORKERS.index(self.rank)))
        list(self.threads.map(lambda call: call[0].init_process_group(**{k: v[call[2]] for k, v in call[1].items()}), calls))


async def _received(worker: Any, step: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) async for name, tensor in worker.receive_weights(global_steps=step)]


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def breaking(weights: Any) -> Iterator[Any]:
    """Fails half-way, when its share of the export is done."""
    yield from list(weights.received_by([0]))[:9]
    raise ValueError("the disk is gone")


def flipping(send: Any, header: bytes, payload: torch.Tensor) -> None:
    """A bit that flips on its way, once, in a bucket that has a payload."""
    if len(payload):
        payload[4] ^= 1
    send(header, payload)


def updates(rank: int, directory: Path) -> dict[str, Any]:
    bridge, model = live(LAYOUT, directory)
    manager = Manager(rank)
    from mbridge_rl.integrations.verl import per_tensor_param

    def weights() -> Iterator[Any]:
        stream, peft_config = per_tensor_param(bridge, model)
        assert peft_config is None
        return stream

    results: dict[str, Any] = {"first": manager.update(weights(), 1)}
    channels = manager.actor._group
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(2)  # exact in any dtype
    results["second"] = manager.update(weights(), 2)
    results["same group"] = manager.actor._group == channels
    results["stale"] = manager.update(weights(), 3, expected_step=4)
    results["broken"] = manager.update(breaking(weights()) if rank == 0 else weights(), 4)
    with pytest.MonkeyPatch.context() as patch:
        send = Broadcast._send
        patch.setattr(Broadcast, "_send", lambda self, header, payload: flipping(lambda *a: send(self, *a), header, payload))
        results["flipped"] = manager.update(weights(), 5)
    results["recovered"] = manager.update(weights(), 6)
    results["misuse"] = [
        raised(lambda: asyncio.run(manager.backend(bucket_size=1).send_weights(iter(()), 1))),
        raised(lambda: manager.backend.build_topology(1, 1, [{"member": "a", "cuda": False}] * 2)),
    ]
    add_lora(model, LoRAConfig(rank=4, alpha=8, targets=("q_proj",), seed=1))
    stream, peft_config = per_tensor_param(bridge, model, adapters_only=True)
    results["adapters"] = manager.update(stream, 7)
    results["peft_config"] = peft_config
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("peft")
    directory, _ = tiny_checkpoint(tmp_path_factory.mktemp("start"), "qwen3", seed=3)
    return load_file(directory / "model.safetensors"), run_ranks(updates, LAYOUT.world_size, directory, timeout=60)


def test_rollout_workers_receive_the_live_weights(results: Any) -> None:
    expected, ranks = results
    for update, factor in (("first", 1), ("second", 2), ("recovered", 2)):
        for rank in WORKERS:
            received = dict(ranks[rank][update][1])
            assert received.keys() == expected.keys()
            assert all(torch.equal(received[name], factor * expected[name]) for name in expected)
        sent = ranks[0][update][0]
        assert sent["checkpoint_engine/bytes"] == sum(tensor.nbytes for tensor in expected.values())
        assert sent["checkpoint_engine/buckets"] > sent["checkpoint_engine/bytes"] / BUCKET
        assert [rank[update][0] for rank in ranks[1:]] == [{}, {}, {}]
    assert all(rank["same group"] for rank in ranks)


def test_adapters_travel_alone(results: Any) -> None:
    expected, ranks = results
    received = dict(ranks[1]["adapters"][1])
    layers = {name.removesuffix(".weight") for name in expected if "q_proj" in name}
    assert received.keys() == {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    config = ranks[0]["peft_config"]
    assert (config["r"], config["lora_alpha"], config["peft_type"].name) == (4, 8, "LORA")


def test_failures_are_heard_by_all_and_survived(results: Any) -> None:
    _, ranks = results
    for rank in WORKERS:
        assert ranks[rank]["stale"][1] == "SyncError: the sender sends version 3, this receiver waits for version 4"
        assert ranks[rank]["broken"][1] == "SyncError: the sender failed: ValueError: the disk is gone"
        assert ranks[rank]["flipped"][1].startswith("DigestMismatch: a bucket of version 5 arrived with other bytes: ")
    assert ranks[0]["broken"][0] == "ValueError: the disk is gone"
    assert ranks[0]["flipped"][0].startswith("TransferTimeout: the sender and the receivers of this broadcast did not all come")
    no_group, no_master = ranks[0]["misuse"]
    assert no_group == "SyncError: only actors send weights, after init_process_group"
    assert "must be made with is_master=True" in no_master
