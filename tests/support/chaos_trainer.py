"""The trainer of a run of `chaos.py`, a rank of which is struck amid its second sync."""

from __future__ import annotations

import os
import time
import traceback
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fused_engine import EngineLayout
from standin import RemoteEngine, light_model, random_weights, set_weights
from starving import starved
from torch import Tensor

from mbridge_rl.core.errors import BridgeError, RanksUnreachable, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.process_group import GroupOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet
from mbridge_rl.sync.weight_sync import WeightSync

WAYS = [("staged", "shared_memory"), ("streaming", "shared_memory"), ("staged", "process_group"),
        ("streaming", "process_group"), ("staged", "files")]  # fmt: skip
FAULTS = ["kill rank 0", "kill rank 1", "kill the engine", "drop", "corrupt", "stall"]
OUTLETS: list[Any] = [SlotOutlet, RingOutlet, GroupOutlet, FilesOutlet]
LAYOUT, ENGINE, VARIANT = ParallelLayout(tp=2), EngineLayout(tp=2), "qwen3"
WAIT_SECONDS = 1.5  # of every wait inside of a sync that is struck
STALL_WAITS = 3.0  # that a stalled rank sleeps
UNDISTURBED_TIMEOUT = 300.0  # in seconds, for everybody who is not struck: the machine may be busy with other work


@dataclass(frozen=True)
class Case:
    mode: str
    transport: str
    fault: str
    moment: float  # of the second sync, 0..1
    delta: bool
    seed: int
    engines: int = 1
    copied: bool = False  # a killed engine catches up from a copy on a disk

    @property
    def struck(self) -> int:
        """The engine that is killed, if one is."""
        return self.seed % self.engines

    @property
    def kills(self) -> bool:
        return self.fault.startswith("kill")

    def store(self, engine: int) -> str:
        """What the name of the store has more where workers keep their own images, as on other hosts."""
        own = self.transport != "shared_memory" or (self.delta and self.mode == "staged")
        return f".{engine}" if own else ""


def weights(version: int) -> dict[str, Tensor]:
    """Version 2 is version 1 with other values in one of fifty elements."""
    if version != 2:
        return random_weights(VARIANT, version)
    generator = torch.Generator().manual_seed(2)
    before, after = random_weights(VARIANT, 1), random_weights(VARIANT, 2)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=generator) < 0.02, after[name], tensor)
        for name, tensor in before.items()
    }


def address(folder: Path, engine: int) -> Path:
    """Of the one that started last."""
    return sorted(folder.glob(f"engine{engine}.*"))[-1]


def train(rank: int, folder: Path, name: str, case: Case | None, versions: list[int], engines: int) -> None:
    """Runs one trainer rank: it syncs the versions and writes its outcome to a file, the last version or the error."""
    torch.set_num_threads(1)
    try:
        meet(folder, rank, "-".join(map(str, versions)))
        bridge, model = light_model(VARIANT, LAYOUT, rank, weights(versions[0]))
        clients = (
            [RemoteEngine(address(folder, engine), UNDISTURBED_TIMEOUT) for engine in range(engines)] if rank == 0 else None
        )
        mode, transport = (case.mode, case.transport) if case else ("staged", "shared_memory")
        if mode == "streaming":  # this mode leaves nothing in the store
            plain = {"transport": transport, "store": name, "bucket_bytes": 1 << 11, "timeout": UNDISTURBED_TIMEOUT}
            with closing(WeightSync(bridge, model, clients, **plain)) as staged:
                staged.sync(versions[0])
        sync = WeightSync(
            bridge, model, clients, mode=mode, transport=transport, store=name, url=str(folder / "files"), bucket_bytes=1 << 11,
            timeout=WAIT_SECONDS if case else UNDISTURBED_TIMEOUT, retries=0, delta=case is not None and case.delta,
        )  # fmt: skip
        with closing(sync):
            for version in versions:
                set_weights(bridge, model, rank, weights(version))
                write(folder / f"at-{version}-{rank}", "")
                if version == 2 and case is not None:
                    _sabotage(case, rank, len(list(sync.route.parts_of(rank))), folder)
                    _struck_sync(sync, folder / f"verdict-{rank}")
                else:
                    _undisturbed(sync, version)
        result = str(versions[-1])
    except BridgeError as error:
        result = f"{type(error).__name__}: {error}"
    except Exception:
        result = traceback.format_exc()
    write(folder / f"outcome-{rank}", result)


def write(path: Path, text: str) -> None:
    """Whole: whoever looks finds all of it, or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


def _struck_sync(sync: WeightSync, verdict: Path) -> None:
    try:
        sync.sync(2)
    finally:
        write(verdict, f"{time.monotonic()} {starved(os.getpid())}")


def _undisturbed(sync: WeightSync, version: int) -> None:
    """Syncs until it succeeds. Without a strike, too, a sync may take longer than `WAIT_SECONDS` on a busy machine. An error of
    one rank is raised by all ranks, so all of them try again."""
    deadline = time.monotonic() + UNDISTURBED_TIMEOUT
    while True:
        try:
            sync.sync(version)
            return
        except RanksUnreachable:
            raise
        except SyncError:
            if time.monotonic() > deadline:
                raise


def meet(folder: Path, rank: int, tag: str = "") -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting-{tag}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=UNDISTURBED_TIMEOUT)
    )


def _sabotage(case: Case, rank: int, parts: int, folder: Path) -> None:
    """Of what rank 1 sends; and every sender takes its time, so that strikes from outside find it amid a sync."""
    victim = int(case.moment * parts)
    seen = 0
    for kind in OUTLETS:

        def send(outlet: Any, worker: int, index: int, part: Any, send: Any = kind.send) -> None:
            nonlocal seen
            seen += 1
            time.sleep(0.3 / parts)
            if rank == 1 and seen == victim + 1 and not case.kills:
                write(folder / "struck", str(time.monotonic()))
                if case.fault == "drop":
                    outlet.place(worker, index, part).fill_(0xEE)  # where the bytes would be, other ones are
                    return
                if case.fault == "stall":
                    time.sleep(STALL_WAITS * WAIT_SECONDS)
                if case.fault == "corrupt":
                    outlet.place(worker, index, part)[: 1 + part.nbytes // 2].bitwise_xor_(0x55)
            send(outlet, worker, index, part)

        kind.send = send
