"""Syncs that are hit at random: processes killed, buckets dropped or corrupted, wires stalled.

    python tests/chaos.py 200 [seed]      # 200 runs, some minutes; prints what happened to them

Each run has two trainer ranks, one or two engines of two workers, each engine in a process of its own (plain tensors, but the
library's own receiver, store, transports and proofs; see `standin.py`) and a store by name, which has version 1. Half of the
runs send version 2 as a delta. Afterwards, whatever was hit:

* every engine serves exactly version 1 or exactly version 2, as it says, by digest; or refuses and says what it lost;
* every trainer rank that lives has finished, or raised an error of this library;
* both within `BOUND_WAITS` times the time-out of a wait, counted from the strike;
* an engine that was killed starts again and catches up from the store, or from its copy on a disk, without the trainer;
* a new trainer then syncs version 3 into whatever is there;
* then everybody ends without being killed; no process is left, none that they started, no thread of an engine, and of shared
  memory and files just what docs/sync.md says, before anything is cleaned up (`leftovers.py`).
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
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import leftovers
import torch
import torch.distributed as dist
from children import fork
from fused_engine import EngineLayout
from standin import RemoteEngine, light_model, random_weights, serve, served, set_weights
from torch import Tensor

from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.errors import EngineUnusable, SyncError
from mbridge_rl.sync.refit import WeightSync
from mbridge_rl.sync.store import WeightStore
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.process_group import GroupOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet

WAYS = [("staged", "shared_memory"), ("streaming", "shared_memory"), ("staged", "process_group"),
        ("streaming", "process_group"), ("staged", "files")]  # fmt: skip
FAULTS = ["kill rank 0", "kill rank 1", "kill the engine", "drop", "corrupt", "stall"]
OUTLETS: list[Any] = [SlotOutlet, RingOutlet, GroupOutlet, FilesOutlet]
LAYOUT, ENGINE, VARIANT = ParallelLayout(tp=2), EngineLayout(tp=2), "qwen3"
WAIT_SECONDS = 1.5  # of every wait inside of a sync
BOUND_WAITS = 4.0  # from the strike to every survivor's verdict: its own wait, and those for whoever waits for it
STALL_WAITS = 3.0  # that a stalled rank sleeps
RUN_SECONDS = 90.0  # until a process that hangs is given up


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


@dataclass
class Outcome:
    served: list[str]  # by every engine
    trainers: list[str]
    waits: float  # from the strike until the last survivor's verdict, in units of a wait


def cases(count: int, seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [
        Case(
            *WAYS[index % len(WAYS)],
            draw.choice(FAULTS),
            draw.random(),
            draw.random() < 0.5,
            seed + index,
            draw.choice([1, 1, 2]),
            draw.random() < 0.3,
        )
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
    name = f"chaos.{os.getpid()}.{secrets.token_hex(4)}"
    stores = [name, *(f"{name}.{engine}" for engine in range(case.engines))]
    before = leftovers.children()
    with leftovers.orphans_adopted(), tempfile.TemporaryDirectory(prefix="mbridge_chaos_") as folder:
        scene = Scene(case, Path(folder), name)
        try:
            outcome = scene.play()
            scene.end()
            assert leftovers.children() <= before, f"{case}: processes are left"
            assert not (left := leftovers.arenas(scene.pids)), f"{case}: {left}"
            for store in stores:
                assert not (left := leftovers.unexpected(store, partial=case.kills)), f"{case}: {store} keeps {left}"
            if case.fault != "kill rank 0":
                assert not list((scene.folder / "files").glob("*")), f"{case}: files are left"
        finally:
            for pid in scene.running:
                _end(pid)
            for store in stores:
                WeightStore(store).remove()
    assert not list(Path("/dev/shm").glob(f"*{name}*"))
    return outcome


class Scene:
    """The processes of one run."""

    def __init__(self, case: Case, folder: Path, name: str) -> None:
        self.case, self.folder, self.name = case, folder, name
        self.pids: list[int] = []
        self.running: set[int] = set()
        self._digests = {version: served(weights(version), VARIANT, ENGINE) for version in (0, 1, 2, 3)}
        self._engines: list[int] = []

    def play(self) -> Outcome:
        case = self.case
        self._engines += [self._serving(engine) for engine in range(case.engines)]
        ranks = self._trainers(case, [1, 2])
        _strike(case, ranks, self._engines[case.struck], self.folder)
        _wait_for(lambda: all(map(_has_ended, ranks)), f"trainer ranks of {case}", RUN_SECONDS)
        said = [_said(self.folder, rank) for rank in range(2)]
        for rank, text in enumerate(said):
            assert text in ("2", "killed") or "Traceback" not in text, (case, text)
            assert text != "killed" or case.fault == f"kill rank {rank}", f"{case}: rank {rank} died"
        assert (self.folder / "at-2-0").exists(), f"{case} never came to version 2: {said}"
        killed = [case.struck] if case.fault == "kill the engine" else []
        found = [self._verdict_of(engine) for engine in range(case.engines) if engine not in killed]
        verdicts = [time.monotonic(), *(float(path.read_text()) for path in self.folder.glob("verdict-*"))]
        found += map(self._starts_again, killed)
        waits = max(0.0, max(verdicts) - self._moment()) / WAIT_SECONDS
        bound = BOUND_WAITS + (STALL_WAITS if case.fault == "stall" else 0.0)
        assert waits < bound, f"{case}: {said}, {found} after {waits:.1f} times the time-out of a wait"
        self._reap()
        again = self._trainers(None, [3])
        _wait_for(lambda: all(map(_has_ended, again)), f"the next trainer of {case}", RUN_SECONDS)
        assert [_said(self.folder, rank) for rank in range(2)] == ["3", "3"], case
        for engine in range(case.engines):
            assert RemoteEngine(_address(self.folder, engine)).generate() == (3, self._digests[3]), case
        return Outcome(found, said, waits)

    def end(self) -> None:
        """Nobody is killed: trainers are done, and engines close."""
        for engine in range(self.case.engines):
            threads = RemoteEngine(_address(self.folder, engine)).shut_down()
            assert not threads, f"{self.case}: engine {engine} still has the threads {threads}"
        _wait_for(lambda: all(map(_has_ended, self.pids)), f"the end of all processes of {self.case}")
        self._reap()

    def _reap(self) -> None:
        """As a launcher would: until somebody has waited for it, a dead process counts as alive."""
        for pid in filter(_has_ended, list(self.running)):
            os.waitpid(pid, 0)
            self.running.remove(pid)

    def _serving(self, engine: int) -> int:
        path = self.folder / f"engine{engine}.{len(list(self.folder.glob(f'engine{engine}.*')))}"
        pid = fork(lambda: serve(path, VARIANT, ENGINE), self._register)
        _wait_for(path.exists, "the engine's socket")
        return pid

    def _register(self, pid: int) -> None:
        self.pids.append(pid)
        self.running.add(pid)

    def _trainers(self, case: Case | None, versions: list[int]) -> list[int]:
        engines = self.case.engines
        return [
            fork(lambda rank=rank: _train(rank, self.folder, self.name, case, versions, engines), self._register)
            for rank in range(2)
        ]

    def _moment(self) -> float:
        """Of the strike; one that never came would have been the last thing."""
        struck = self.folder / "struck"
        return float(struck.read_text()) if struck.exists() else time.monotonic()

    def _starts_again(self, engine: int) -> str:
        """One that was killed catches up."""
        store = WeightStore(self.name + self.case.store(engine))
        head = store.head()
        assert head is not None, f"{self.case}: the store is empty"
        self._engines[engine] = self._serving(engine)
        client = RemoteEngine(_address(self.folder, engine))
        if self.case.copied:
            store.copy_to(WeightStore("copy", self.folder, durable=True))
            client.catch_up("copy", str(self.folder))
        else:
            client.catch_up(store.name, "/dev/shm")
        assert client.generate() == (head.version, self._digests[head.version]), self.case
        return f"caught up to {head.version}"

    def _verdict_of(self, engine: int) -> str:
        """What an engine that lives serves now."""
        case, deadline = self.case, time.monotonic() + RUN_SECONDS
        assert not _has_ended(self._engines[engine]), f"engine {engine} died of {case}"
        client = RemoteEngine(_address(self.folder, engine))
        while True:
            refusal = None
            try:
                version, digest = client.generate()
            except EngineUnusable as error:
                refusal = str(error)
            if refusal is None:
                assert digest == self._digests[version], f"{case}: a mixture is served as version {version}"
                return f"serves {version}"
            if "was lost" in refusal:
                assert case.mode == "streaming", f"{case}: {refusal}"
                return "refuses and says what it lost"
            assert time.monotonic() < deadline, f"{case}: the engine waits for a trainer that is gone: {refusal}"
            time.sleep(0.02)


def _address(folder: Path, engine: int) -> Path:
    """Of the one that started last."""
    return sorted(folder.glob(f"engine{engine}.*"))[-1]


def _train(rank: int, folder: Path, name: str, case: Case | None, versions: list[int], engines: int) -> None:
    """A trainer rank: syncs the versions, and leaves a file that says which was the last, or why there was none."""
    torch.set_num_threads(1)
    try:
        _meet(folder, rank, "-".join(map(str, versions)))
        bridge, model = light_model(VARIANT, LAYOUT, rank, weights(versions[0]))
        clients = [RemoteEngine(_address(folder, engine)) for engine in range(engines)] if rank == 0 else None
        mode, transport = (case.mode, case.transport) if case else ("staged", "shared_memory")
        if mode == "streaming":  # which leaves nothing in the store
            with closing(WeightSync(bridge, model, clients, transport=transport, store=name, bucket_bytes=1 << 11)) as staged:
                _undisturbed(staged, versions[0])
        sync = WeightSync(
            bridge, model, clients, mode=mode, transport=transport, store=name, url=str(folder / "files"), bucket_bytes=1 << 11,
            timeout=WAIT_SECONDS if case else 20.0, retries=0, delta=case is not None and case.delta,
        )  # fmt: skip
        with closing(sync):
            for version in versions:
                set_weights(bridge, model, rank, weights(version))
                (folder / f"at-{version}-{rank}").touch()
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
    (folder / f"said-{rank}.partial").write_text(result)
    (folder / f"said-{rank}.partial").rename(folder / f"said-{rank}")


def _struck_sync(sync: WeightSync, verdict: Path) -> None:
    try:
        sync.sync(2)
    finally:
        verdict.write_text(str(time.monotonic()))


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
                (folder / "struck").write_text(str(time.monotonic()))
                if case.fault == "drop":
                    outlet.place(worker, index, part).fill_(0xEE)  # where the bytes would be, other ones are
                    return
                if case.fault == "stall":
                    time.sleep(STALL_WAITS * WAIT_SECONDS)
                if case.fault == "corrupt":
                    outlet.place(worker, index, part)[: 1 + part.nbytes // 2].bitwise_xor_(0x55)
            send(outlet, worker, index, part)

        kind.send = send


def _strike(case: Case, ranks: list[int], engine: int, folder: Path) -> None:
    """SIGKILL at a moment of the second sync, which takes about half a second; a little late also, to meet the commit."""
    victims = {"kill rank 0": ranks[0], "kill rank 1": ranks[1], "kill the engine": engine}
    if not case.kills:
        return
    _wait_for(lambda: (folder / "at-2-0").exists() or all(_has_ended(pid) for pid in ranks), f"the second sync of {case}", 60.0)
    time.sleep(case.moment * 0.7)
    (folder / "struck").write_text(str(time.monotonic()))
    os.kill(victims[case.fault], signal.SIGKILL)
    _wait_for(lambda: _has_ended(victims[case.fault]), "the end of a killed process")


def _said(folder: Path, rank: int) -> str:
    path = folder / f"said-{rank}"
    text = path.read_text() if path.exists() else "killed"
    path.unlink(missing_ok=True)
    return text


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
    waits: dict[str, list[float]] = {}
    started, failures = time.monotonic(), 0
    for case in cases(count, seed):
        try:
            outcome = run(case)
        except Exception as error:
            failures += 1
            print(f"FAILED {case}: {type(error).__name__}: {error}", flush=True)
            continue
        tally.update((case.fault, f"{case.mode}: {served}") for served in outcome.served)
        waits.setdefault(case.fault, []).append(outcome.waits)
    for (fault, found), times in sorted(tally.items()):
        print(f"{times:4d}  {fault:16s} -> {found}")
    print(f"from the strike to the last verdict, in waits of {WAIT_SECONDS} s: median, nine of ten, longest")
    for fault, found in sorted(waits.items()):
        middle, most, longest = (sorted(found)[min(len(found) - 1, int(share * len(found)))] for share in (0.5, 0.9, 1.0))
        print(f"      {fault:16s} {middle:6.2f} {most:6.2f} {longest:6.2f}")
    print(f"{count} runs, {failures} failed, {time.monotonic() - started:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
