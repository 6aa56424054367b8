"""What is compared: pairs of ways to do the same, on the same live Megatron model, measured alternately in one run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Cost, measured
from models import Workload
from peer_mbridge import peer_bridge, without_cuda
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.digest import digest
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.segments import Side, hf_side
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.parameters import live_side

Runs = dict[str, list[Cost]]
PAGE = 4096


@dataclass
class Bench:
    """Holds one rank's live model and runs everything that is measured on it."""

    workload: Workload
    checkpoint: Path
    rounds: int
    bridge: AutoBridge
    model: list[nn.Module]
    peer: Any

    @classmethod
    def start(cls, workload: Workload, checkpoint: Path, rounds: int, with_peer: bool) -> Bench:
        initialize_parallel(workload.layout)
        bridge = AutoBridge.from_pretrained(checkpoint)
        model = bridge.build_model(dtype=torch.bfloat16)
        bridge.load_weights(model)
        return cls(workload, checkpoint, rounds, bridge, model, peer_bridge(bridge.hf_config) if with_peer else None)

    # (a) export

    def export(self) -> Runs:
        """Every rank receives every tensor and drops it."""
        ways: dict[str, Callable[[], Any]] = {}
        if self.peer is not None:
            ways["mbridge 0.15.1, gloo"] = self._peer_export
        ways["mbridge_rl, gloo"] = lambda: _drain(self.bridge.export_weights(self.model, transport="collective"))
        ways["mbridge_rl, shared memory"] = lambda: _drain(self.bridge.export_weights(self.model))
        ways["mbridge_rl, gloo, to rank 0 only"] = lambda: _drain(
            self.bridge.export_weights(self.model, transport="collective", ranks=[0])
        )
        ways["mbridge_rl, shared memory, to rank 0 only"] = lambda: _drain(self.bridge.export_weights(self.model, ranks=[0]))
        self._compare_with_peer()
        return self._alternately(ways)

    def _compare_with_peer(self) -> None:
        """Raises an error unless both deliver the same bits: otherwise their times cannot be compared."""
        if self.peer is None:
            return
        with without_cuda():
            expected = {name: digest(tensor) for name, tensor in self.peer.export_weights(self.model)}
        bridge = AutoBridge.from_pretrained(
            self.checkpoint
        )  # apart, so that the first measured export plans as a first one does
        for transport in ("shared_memory", "collective"):
            delivered = {name: digest(tensor) for name, tensor in bridge.export_weights(self.model, transport=transport)}
            if delivered != expected:
                raise RuntimeError(f"by {transport} we deliver other tensors than mbridge does")

    def _peer_export(self) -> None:
        with without_cuda():
            _drain(self.peer.export_weights(self.model))

    # (b) save

    def save(self) -> Runs:
        """A checkpoint on the disk: with and without waiting for the disk itself."""
        target = self.checkpoint.parent / f"saved-{self.workload.name}"
        ways: dict[str, Callable[[], Any]] = {}
        for durable in (False, True):
            label = ", synced" if durable else ""
            ways[f"gather and save_file{label}"] = lambda durable=durable: self._gather_and_save(target, durable)
            ways[f"mbridge_rl save_pretrained{label}"] = lambda durable=durable: self.bridge.save_pretrained(
                self.model, target, durable=durable
            )
        if self.peer is not None:
            ways["mbridge 0.15.1 save_weights"] = lambda: self._peer_save(target)

        def clear(_: str) -> None:
            if dist.get_rank() == 0:
                shutil.rmtree(target, ignore_errors=True)
                os.sync()  # what the run before left to write is none of this one's business

        try:
            return self._alternately(ways, before=clear)
        finally:
            clear("")

    def _gather_and_save(self, target: Path, durable: bool) -> None:
        """The usual way at its best: rank 0 collects everything (packed, by messages to it alone) and writes it."""
        state = dict(self.bridge.export_weights(self.model, transport="collective", ranks=[0]))
        if dist.get_rank() == 0:
            target.mkdir(exist_ok=True)
            save_file(state, target / "model.safetensors", metadata={"format": "pt"})
            if durable:
                with (target / "model.safetensors").open("rb") as written:
                    os.fsync(written.fileno())

    def _peer_save(self, target: Path) -> None:
        self.peer.safetensor_io = self.peer._get_safetensor_io(str(self.checkpoint))
        with without_cuda():
            self.peer.save_weights(self.model, str(target))

    # (c) load

    def load(self) -> Runs:
        """From the disk into the live model; `cold` means with nothing of the file in memory."""
        plan = compile_plan(self.bridge.spec, hf_side(self.bridge.spec), self._side())
        ways: dict[str, Callable[[], Any]] = {}
        for label in ("cached", "cold"):
            ways[f"every rank reads whole tensors, {label}"] = lambda: self._read_whole_tensors(plan)
            ways[f"mbridge_rl load_weights, {label}"] = lambda: self.bridge.load_weights(self.model)
        if self.peer is not None:
            ways["mbridge 0.15.1 load_weights, cached"] = self._peer_load
        return self._alternately(ways, before=lambda name: self._drop_cache() if "cold" in name else None)

    def _side(self) -> Side:
        return live_side(self.model, self.bridge.spec, self.workload.layout, dist.get_rank())[1]

    @torch.no_grad()
    def _read_whole_tensors(self, plan: Plan) -> None:
        """Reads every tensor that this rank holds a part of into memory, copies the part and drops the rest."""
        live, _ = live_side(self.model, self.bridge.spec, self.workload.layout, dist.get_rank())
        with safe_open(self.checkpoint / "model.safetensors", framework="pt") as opened:
            for hf_name, copies in plan.by_hf_name.items():
                full_tensor = opened.get_tensor(hf_name).clone()
                for copy in copies:
                    target = live.stored(copy.target.name)
                    copy.target.of(target, copy.shape).copy_(copy.source.of(full_tensor, copy.shape))

    def _peer_load(self) -> None:
        with without_cuda(), torch.no_grad():
            self.peer.load_weights(self.model, str(self.checkpoint), memory_efficient=True)

    def _drop_cache(self) -> None:
        descriptor = os.open(self.checkpoint / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    # (d) what the machine can do

    def throughput(self) -> Runs:
        """The same bytes, without any names: copied in memory, and written to the disk, by all ranks at once."""
        total = sum(tensor.nbytes for tensor in self.bridge.metadata(torch.bfloat16))
        share = total // dist.get_world_size() // PAGE * PAGE
        source = torch.ones(share, dtype=torch.uint8)
        small, target = source[: 8 << 20], torch.empty(8 << 20, dtype=torch.uint8)

        def copy_in_cache() -> None:
            for _ in range(total // len(small)):
                target.copy_(small)

        def copy_in_memory() -> None:
            fresh = torch.empty(share, dtype=torch.uint8)
            fresh.copy_(source)

        path = self.checkpoint.parent / "raw.bin"

        def write_raw() -> None:
            with path.with_suffix(f".{dist.get_rank()}").open("wb", buffering=0) as opened:
                memory = memoryview(source.numpy())
                for start in range(0, share, 8 << 20):
                    opened.write(memory[start : start + (8 << 20)])
                os.fdatasync(opened.fileno())

        def clear(_: str) -> None:
            path.with_suffix(f".{dist.get_rank()}").unlink(missing_ok=True)
            dist.barrier()

        ways = {
            "memcpy, every rank all bytes, reused 8 MiB": copy_in_cache,
            "memcpy, every rank its share, fresh memory": copy_in_memory,
            "write() and fdatasync, every rank its share": write_raw,
        }
        try:
            return self._alternately(ways, before=clear)
        finally:
            clear("")

    def _alternately(self, ways: dict[str, Callable[[], Any]], before: Callable[[str], None] | None = None) -> Runs:
        """`rounds` runs of every way, one way after the other in each round, so that disturbances hit all of them alike.

        The first round counts as well: what is planned or allocated once shows in the first run's numbers, not in the best's.
        """
        runs: Runs = {name: [] for name in ways}
        for _ in range(self.rounds):
            for name, way in ways.items():
                if before is not None:
                    before(name)
                runs[name].append(measured(way))
        return runs


def _drain(stream: Iterable[tuple[str, Tensor]]) -> None:
    """Receives everything and keeps nothing."""
    for _, tensor in stream:
        del tensor
