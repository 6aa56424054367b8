"""Syncs that are hit at random: processes killed, buckets dropped or corrupted, wires stalled.

    python tests/chaos.py 200 [seed]      # 200 runs, some minutes; prints what happened to them

Each run has two trainer ranks, an engine of two workers in a process of its own (plain tensors, but the library's own receiver,
store, transports and proofs; see `standin.py`) and a store by name, which has version 1. Half of the runs send version 2 as a
delta. Afterwards, whatever was hit:

* the engine serves exactly version 1 or exactly version 2, as it says, by digest; or refuses and says what it lost;
* every trainer rank that lives has finished or raised;
* an engine that was killed starts again and catches up from the store, without the trainer;
* a new trainer then syncs version 3 into whatever is there;
* no process and no shared memory is left.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fused_engine import EngineLayout
from standin import RemoteEngine, light_model, random_weights, serve, served, set_weights
from torch import Tensor

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.arena import remove_stale
from mbridge_rl.sync.errors import EngineUnusable, SyncError
from mbridge_rl.sync.refit import WeightSync
from mbridge_rl.sync.store import WeightStore, remove_stale_stores
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.process_group import GroupOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet

WAYS = [("staged", "shared_memory"), ("streaming", "shared_memory"), ("staged", "process_group"),
        ("streaming", "process_group"), ("staged", "files")]  # fmt: skip
FAULTS = ["kill rank 0", "kill rank 1", "kill the engine", "drop", "corrupt", "stall"]
OUTLETS: list[Any] = [SlotOutlet, RingOutlet, GroupOutlet, FilesOutlet]
LAYOUT, ENGINE, VARIANT = ParallelLayout(tp=2), EngineLayout(tp=2), "qwen3"
WAIT_SECONDS = 1.5  # of every wait inside of a sync
RUN_SECONDS = 90.0  # until a whole run must be over, on a machine that does much else


@dataclass(frozen=True)
class Case:
    mode: str
    transport: str
    fault: str
    moment: float  # of the second sync, 0..1
    delta: bool
    seed: int

    @property
    def store(self) -> str:
        """What the name of the store has more where workers keep their own images, as on other hosts."""
        own = self.transport != "shared_memory" or (self.delta and self.mode == "staged")
        return ".0" if own else ""


@dataclass
class Outcome:
    served: str
    trainers: list[str]
    seconds: float


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [
        Case(*WAYS[index % len(WAYS)], draw.choice(FAULTS), draw.random(), draw.random() < 0.5, seed + index)
        for index in range(count)
    ]


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


def run(case: Case) -> Outcome:
    """One run; raises AssertionError where something does not hold."""
    started = time.monotonic()
    name = f"chaos.{os.getpid()}.{secrets.token_hex(4)}"
    digests = {version: served(weights(version), VARIANT, ENGINE) for version in (0, 1, 2, 3)}
    with tempfile.TemporaryDirectory(prefix="mbridge_chaos_") as folder:
        engine = _fork(lambda: serve(Path(folder) / "engine", VARIANT, ENGINE))
        pids = [engine]
        try:
            _wait_for(lambda: (Path(folder) / "engine").exists(), "the engine's socket")
            ranks = [_fork(lambda rank=rank: _train(rank, Path(folder), name, case, [1, 2])) for rank in range(2)]
            pids += ranks
            _strike(case, ranks, engine, Path(folder))
            _wait_for(lambda: all(_has_ended(pid) for pid in ranks), f"trainer ranks of {case}", RUN_SECONDS)
            said = [_said(Path(folder), rank) for rank in range(2)]
            found = _examine(case, Path(folder), name, engine, digests, pids)
            again = [_fork(lambda rank=rank: _train(rank, Path(folder), name, None, [3])) for rank in range(2)]
            pids += again
            _wait_for(lambda: all(_has_ended(pid) for pid in again), f"the next trainer of {case}", RUN_SECONDS)
            assert [_said(Path(folder), rank) for rank in range(2)] == ["3", "3"], (case, _said(Path(folder), 0))
            address = Path(folder) / ("engine2" if (Path(folder) / "engine2").exists() else "engine")
            assert RemoteEngine(address).generate() == (3, digests[3]), case
        finally:
            for pid in pids:
                _end(pid)
            WeightStore(name).remove()
            for replica in range(2):
                WeightStore(f"{name}.{replica}").remove()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    remove_stale()
    remove_stale_stores()
    left = [path.name for path in Path("/dev/shm").glob("mbridge_rl-*") if _is_of(path.name, name, pids)]
    assert not left, left
    return Outcome(found, said, time.monotonic() - started)


def _is_of(file_name: str, store: str, pids: list[int]) -> bool:
    return store in file_name or any(str(pid) in file_name.replace("-", ".").split(".") for pid in pids)


def _train(rank: int, folder: Path, name: str, case: Case | None, versions: list[int]) -> None:
    """A trainer rank: syncs the versions, and leaves a file that says which was the last, or why there was none."""
    torch.set_num_threads(1)
    try:
        _meet(folder, rank, "-".join(map(str, versions)))
        bridge, model = light_model(VARIANT, LAYOUT, rank, weights(versions[0]))
        address = folder / ("engine2" if (folder / "engine2").exists() else "engine")
        mode, transport = (case.mode, case.transport) if case else ("staged", "shared_memory")
        engine = RemoteEngine(address) if rank == 0 else None
        if mode == "streaming":  # which leaves nothing in the store
            staged = WeightSync(bridge, model, engine, transport=transport, store=name, bucket_bytes=1 << 11)
            _undisturbed(staged, versions[0])
            staged.close()
        sync = WeightSync(
            bridge, model, engine, mode=mode, transport=transport, store=name, url=str(folder / "files"), bucket_bytes=1 << 11,
            timeout=WAIT_SECONDS if case else 20.0, retries=0, delta=case is not None and case.delta,
        )  # fmt: skip
        for version in versions:
            set_weights(bridge, model, rank, weights(version))
            (folder / f"at-{version}-{rank}").touch()
            if version == 2 and case is not None:
                _sabotage(case, rank, len(list(sync.route.parts_of(rank))))
            if version == 2:
                sync.sync(version)
            else:
                _undisturbed(sync, version)
            (folder / f"done-{version}-{rank}").touch()
        sync.close()
        result = str(versions[-1])
    except BridgeError as error:
        result = f"{type(error).__name__}: {error}"
    except Exception:
        result = traceback.format_exc()
    (folder / f"said-{rank}.partial").write_text(result)
    (folder / f"said-{rank}.partial").rename(folder / f"said-{rank}")


def _undisturbed(sync: WeightSync, version: int) -> None:
    """What nobody strikes may still be late on a machine that does much else."""
    for attempt in range(8):
        try:
            sync.sync(version)
            return
        except SyncError:
            if attempt == 7:
                raise


def _meet(folder: Path, rank: int, tag: str = "") -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting-{tag}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=20))


def _sabotage(case: Case, rank: int, parts: int) -> None:
    """Of what rank 1 sends; and every sender takes its time, so that strikes from outside find it amid a sync."""
    victim = int(case.moment * parts)
    seen = 0
    for kind in OUTLETS:

        def send(outlet: Any, worker: int, index: int, part: Any, send: Any = kind.send) -> None:
            nonlocal seen
            seen += 1
            time.sleep(0.3 / parts)
            if rank == 1 and seen == victim + 1:
                if case.fault == "drop":
                    outlet.place(worker, index, part).fill_(0xEE)  # where the bytes would be, other ones are
                    return
                if case.fault == "stall":
                    time.sleep(3 * WAIT_SECONDS)
                if case.fault == "corrupt":
                    outlet.place(worker, index, part)[: 1 + part.nbytes // 2].bitwise_xor_(0x55)
            send(outlet, worker, index, part)

        kind.send = send


def _strike(case: Case, ranks: list[int], engine: int, folder: Path) -> None:
    """SIGKILL at a moment of the second sync, which takes about half a second; a little late also, to meet the commit."""
    victims = {"kill rank 0": ranks[0], "kill rank 1": ranks[1], "kill the engine": engine}
    if case.fault not in victims:
        return
    _wait_for(lambda: (folder / "at-2-0").exists() or all(_has_ended(pid) for pid in ranks), f"the second sync of {case}", 60.0)
    time.sleep(case.moment * 0.7)
    os.kill(victims[case.fault], signal.SIGKILL)
    _wait_for(lambda: _has_ended(victims[case.fault]), "the end of a killed process")


def _examine(case: Case, folder: Path, name: str, engine: int, digests: dict[int, str], pids: list[int]) -> str:
    """What the engine serves now; one that was killed is started again and catches up."""
    store = name + case.store
    head = WeightStore(store).head()
    if _has_ended(engine):
        assert case.fault == "kill the engine", f"the engine died of {case}"
        pids.append(_fork(lambda: serve(folder / "engine2", VARIANT, ENGINE)))
        _wait_for(lambda: (folder / "engine2").exists(), "the next engine's socket")
        client = RemoteEngine(folder / "engine2")
        assert head is not None, f"{case}: the store is empty"
        client.catch_up(store, "/dev/shm")
        version, digest = client.generate()
        assert (version, digest) == (head.version, digests[head.version]), case
        return f"caught up to {version}"
    client = RemoteEngine(folder / "engine")
    deadline = time.monotonic() + 20 * WAIT_SECONDS  # a worker whose trainer died gives up when its own wait is over
    while True:
        refusal = None
        try:
            version, digest = client.generate()
        except EngineUnusable as error:
            refusal = str(error)
        if refusal is None:
            assert digest == digests[version], f"{case}: a mixture is served as version {version}"
            return f"serves {version}"
        if "was lost" in refusal:
            assert case.mode == "streaming", f"{case}: {refusal}"
            return "refuses and says what it lost"
        assert time.monotonic() < deadline, f"{case}: the engine waits for a trainer that is gone: {refusal}"
        time.sleep(0.05)


def _said(folder: Path, rank: int) -> str:
    path = folder / f"said-{rank}"
    text = path.read_text() if path.exists() else "killed"
    path.unlink(missing_ok=True)
    return text


def _fork(function: Callable[[], None]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_for(done: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.01)


def main() -> None:
    count, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    tally: collections.Counter[tuple[str, str]] = collections.Counter()
    started, failures = time.monotonic(), 0
    for case in cases(count, seed):
        try:
            tally[case.fault, f"{case.mode}: {run(case).served}"] += 1
        except Exception as error:
            failures += 1
            print(f"FAILED {case}: {type(error).__name__}: {error}", flush=True)
    for (fault, found), times in sorted(tally.items()):
        print(f"{times:4d}  {fault:16s} -> {found}")
    print(f"{count} runs, {failures} failed, {time.monotonic() - started:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
