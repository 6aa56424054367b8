"""What moves where, and when: one copy enters a group of replicas, and packing, moving and loading go on side by side."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights, served

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.transports import process_group
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.process_group import GroupOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet
from mbridge_rl.sync.weight_sync import WeightSync
from mbridge_rl.sync.worker.update import Update

TP2 = ParallelLayout(tp=2)
TRAINERS = WORKERS = 2
TIMEOUT = 30.0  # seconds, of a sync and of every wait in these tests


class _Counted:
    """A process group that notes what its member sends."""

    def __init__(self, group: Any, sent: list[tuple[int, int]]) -> None:
        self._group, self._sent = group, sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        self._sent.append((to, tensors[0].nbytes))
        return self._group.send(tensors, to, tag)


def sent_by_members(rank: int, mode: str) -> Any:
    """For each number of replicas, what each member of the group in this process sent, as `(to, bytes)` in order."""
    bridge, model = light_model("qwen3", TP2, rank, random_weights("qwen3", 1))
    join, results = process_group.join, []
    for replicas in (1, 2, 3):
        engines = [StandInEngine() for _ in range(replicas)] if rank == 0 else None
        sent: dict[int, list[tuple[int, int]]] = {}

        def counting(wire: Any, member: int, seconds: float, sent: dict[int, Any] = sent) -> _Counted:
            return _Counted(join(wire, member, seconds), sent.setdefault(member, []))

        sync = WeightSync(bridge, model, engines, mode=mode, transport="process_group", bucket_bytes=1 << 13, timeout=TIMEOUT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_group, "join", counting)
            sync.sync(1)
        for engine in engines or ():
            assert engine.generate() == (1, served(random_weights("qwen3", 1)))
            engine.close()
        images = [worker.nbytes for worker in sync.route.workers]
        sync.close()
        results.append((sent, images))
    return results


@pytest.mark.parametrize("mode", ["staged", "streaming"])
def test_one_copy_enters_a_group_of_replicas(mode: str) -> None:
    first, second = run_ranks(sent_by_members, TRAINERS, mode)
    alone = {0: first[0][0][0], 1: second[0][0][1]}
    for replicas, ((sent, images), (others, _)) in enumerate(zip(first, second, strict=True), start=1):
        assert {0: sent[0], 1: others[1]} == alone  # trainers send the same messages to the same members, however many listen
        of_trainers = [message for messages in alone.values() for message in messages]
        for worker in range(WORKERS):
            assert sum(nbytes for to, nbytes in of_trainers if to == TRAINERS + worker) == images[worker]
        for member in range(TRAINERS, TRAINERS + WORKERS * replicas):  # every replica passes its copy on, the last one none
            passed = sent.get(member, [])
            is_last = member >= TRAINERS + WORKERS * (replicas - 1)
            assert {to for to, _ in passed} == (set() if is_last else {member + WORKERS})
            assert sum(nbytes for _, nbytes in passed) == (0 if is_last else images[(member - TRAINERS) % WORKERS])


class Pace:
    """Makes rank 0 and the workers of its process wait for each other: the second half is packed when a worker has written its
    first bucket, and that one is written when three parts were sent. Whoever did one after the other would wait in vain."""

    def __init__(self, parts: int) -> None:
        self._parts, self._sent = parts, 0
        self._ahead, self._written = threading.Event(), threading.Event()
        self.met: list[bool] = []

    def sending(self, send: Any) -> Any:
        def paced(outlet: Any, *part: Any) -> None:
            send(outlet, *part)
            self._sent += 1
            if self._sent == 3:
                self._ahead.set()
            if self._sent == self._parts // 2:
                self.met.append(self._written.wait(TIMEOUT))

        return paced

    def writing(self, write: Any) -> Any:
        def paced(update: Update, *bucket: Any) -> None:
            self.met.append(self._ahead.wait(TIMEOUT))
            write(update, *bucket)
            self._written.set()

        return paced


def side_by_side(rank: int, url: str) -> Any:
    bridge, model = light_model("qwen3", TP2, rank, random_weights("qwen3", 1))
    engine, results = StandInEngine() if rank == 0 else None, []
    for kind, transport in [(RingOutlet, "shared_memory"), (GroupOutlet, "process_group"), (FilesOutlet, "files")]:
        options = {"mode": "streaming", "transport": transport, "url": url, "bucket_bytes": 1 << 12, "timeout": TIMEOUT}
        sync = WeightSync(bridge, model, engine, **options)
        parts = len(list(sync.route.parts_of(0)))
        assert parts > 20
        pace = Pace(parts)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(kind, "send", pace.sending(kind.send))
                patch.setattr(Update, "_write", pace.writing(Update._write))
            report = sync.sync(1)
        assert all(pace.met), transport
        results.append((transport, report.spans))
        sync.close()
    return results


def test_packing_moving_and_loading_overlap(tmp_path: Path) -> None:
    first, _ = run_ranks(side_by_side, 2, str(tmp_path), timeout=240)
    for transport, spans in first:
        by_phase = {(span.lane, span.inside, span.phase): span for span in spans}
        transfer, pack = by_phase["rank 0", "", "transfer"], by_phase["rank 0", "transfer", "pack"]
        for worker in range(WORKERS):
            receive = by_phase[f"engine 0 worker {worker}", "", "receive"]
            load = by_phase[f"engine 0 worker {worker}", "receive", "write"]
            assert transfer.start < receive.end, transport
            assert receive.start < transfer.end, transport
            assert pack.start < load.end, transport
        loads = [by_phase[f"engine 0 worker {worker}", "receive", "write"].start for worker in range(WORKERS)]
        assert min(loads) < pack.end, transport  # the first bucket was in place before the last was packed
