"""Syncs that are hit at random: processes killed, buckets dropped or corrupted, wires stalled.

    python tests/support/chaos.py 200 [seed]      # 200 runs, some minutes; prints what happened to them

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import leftovers
import torch
from chaos_trainer import (
    ENGINE,
    FAULTS,
    STALL_WAITS,
    UNDISTURBED_TIMEOUT,
    VARIANT,
    WAIT_SECONDS,
    WAYS,
    Case,
    address,
    train,
    weights,
    write,
)
from children import fork
from standin import RemoteEngine, serve, served
from starving import starved_together

from mbridge_rl.core.errors import EngineUnusable
from mbridge_rl.sync.store.weight_store import WeightStore

BOUND_WAITS = 4.0  # from the strike to every survivor's verdict: its own wait, and those for whoever waits for it


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
        self._starved: dict[int, float] = {}  # at the beginning of the sync that is struck

    def play(self) -> Outcome:
        case = self.case
        self._engines += [self._serving(engine) for engine in range(case.engines)]
        ranks = self._trainers(case, [1, 2])
        self._strike(ranks)
        _wait_for(lambda: all(map(_has_ended, ranks)), f"trainer ranks of {case}")
        outcomes = [_outcome(self.folder, rank) for rank in range(2)]
        for rank, text in enumerate(outcomes):
            assert text in ("2", "killed") or "Traceback" not in text, (case, text)
            assert text != "killed" or case.fault == f"kill rank {rank}", f"{case}: rank {rank} died"
        assert (self.folder / "at-2-0").exists(), f"{case} never came to version 2: {outcomes}"
        killed = [case.struck] if case.fault == "kill the engine" else []
        verdicts = [self._verdict_of(engine) for engine in range(case.engines) if engine not in killed]
        waits = self._waits(ranks)
        verdicts += map(self._starts_again, killed)
        bound = BOUND_WAITS + (STALL_WAITS if case.fault == "stall" else 0.0)
        assert waits < bound, f"{case}: {outcomes}, {verdicts} after {waits:.1f} times the time-out of a wait"
        self._reap()
        next_ranks = self._trainers(None, [3])
        _wait_for(lambda: all(map(_has_ended, next_ranks)), f"the next trainer of {case}")
        assert [_outcome(self.folder, rank) for rank in range(2)] == ["3", "3"], case
        for engine in range(case.engines):
            assert RemoteEngine(address(self.folder, engine), UNDISTURBED_TIMEOUT).generate() == (3, self._digests[3]), case
        return Outcome(verdicts, outcomes, waits)

    def end(self) -> None:
        """Shuts the engines down and waits until all processes have ended by themselves. The trainers are done by now."""
        for engine in range(self.case.engines):
            threads = RemoteEngine(address(self.folder, engine), UNDISTURBED_TIMEOUT).shut_down()
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
            fork(lambda rank=rank: train(rank, self.folder, self.name, case, versions, engines), self._register)
            for rank in range(2)
        ]

    def _strike(self, ranks: Sequence[int]) -> None:
        """SIGKILL at a moment of the second sync, which takes about half a second; a little late also, to meet the commit."""
        case, folder = self.case, self.folder
        _wait_for(lambda: (folder / "at-2-0").exists() or all(map(_has_ended, ranks)), f"the second sync of {case}")
        self._starved = starved_together([os.getpid(), *ranks, *self._engines])
        if not case.kills:
            return
        victims = {"kill rank 0": ranks[0], "kill rank 1": ranks[1], "kill the engine": self._engines[case.struck]}
        time.sleep(case.moment * 0.7)
        write(folder / "struck", str(time.monotonic()))
        os.kill(victims[case.fault], signal.SIGKILL)
        _wait_for(lambda: _has_ended(victims[case.fault]), "the end of a killed process")

    def _waits(self, ranks: Sequence[int]) -> float:
        """From the strike (one that never came would have been the last thing) until now, when the engines have said what they
        serve, and the ranks what came of the sync, in waits. Time in which they had no processor is the machine's."""
        now = starved_together([os.getpid(), *self._engines])
        verdicts = [time.monotonic()]
        for rank, pid in enumerate(ranks):
            if (path := self.folder / f"verdict-{rank}").exists():
                moment, now[pid] = map(float, path.read_text().split())
                verdicts.append(moment)
        struck = self.folder / "struck"
        moment = float(struck.read_text()) if struck.exists() else time.monotonic()
        late = sum(max(0.0, seconds - self._starved[pid]) for pid, seconds in now.items())
        return max(0.0, max(verdicts) - moment - late) / WAIT_SECONDS

    def _starts_again(self, engine: int) -> str:
        """Starts an engine again that was killed, and lets it catch up."""
        store = WeightStore(self.name + self.case.store(engine))
        head = store.head()
        assert head is not None, f"{self.case}: the store is empty"
        self._engines[engine] = self._serving(engine)
        client = RemoteEngine(address(self.folder, engine), UNDISTURBED_TIMEOUT)
        if self.case.copied:
            store.copy_to(WeightStore("copy", self.folder, durable=True))
            client.catch_up("copy", str(self.folder))
        else:
            client.catch_up(store.name, "/dev/shm")
        assert client.generate() == (head.version, self._digests[head.version]), self.case
        return f"caught up to {head.version}"

    def _verdict_of(self, engine: int) -> str:
        """What an engine that was not killed serves now, in words."""
        case, deadline = self.case, time.monotonic() + UNDISTURBED_TIMEOUT
        assert not _has_ended(self._engines[engine]), f"engine {engine} died of {case}"
        client = RemoteEngine(address(self.folder, engine), UNDISTURBED_TIMEOUT)
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


def _outcome(folder: Path, rank: int) -> str:
    """What rank `rank` wrote about its end: the last version, "done", or its error; "killed" if it wrote nothing."""
    path = folder / f"outcome-{rank}"
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


def _wait_for(done: Callable[[], bool], what: str, seconds: float = UNDISTURBED_TIMEOUT) -> None:
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
    for (fault, verdict), times in sorted(tally.items()):
        print(f"{times:4d}  {fault:16s} -> {verdict}")
    print(f"from the strike to the last verdict, in waits of {WAIT_SECONDS} s: median, nine of ten, longest")
    for fault, durations in sorted(waits.items()):
        middle, most, longest = (
            sorted(durations)[min(len(durations) - 1, int(share * len(durations)))] for share in (0.5, 0.9, 1.0)
        )
        print(f"      {fault:16s} {middle:6.2f} {most:6.2f} {longest:6.2f}")
    print(f"{count} runs, {failures} failed, {time.monotonic() - started:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
