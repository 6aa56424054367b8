"""What is opened is what was meant: fills of slots, labels, late updates, late commits, and engines whose workers disagree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from standin import StandInEngine
from store_trainer import SIZES, Trainer, expected, meanwhile

from mbridge_rl.core.errors import ArenaError, DigestMismatch, EngineUnusable, PeerFailed, StoreError, SyncError
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.sync.payload.messages import CommitReport, UpdateRequest
from mbridge_rl.sync.payload.wires import StoreWire
from mbridge_rl.sync.pull import published
from mbridge_rl.sync.store.image import LABEL_BYTES, Label, new_fill
from mbridge_rl.sync.store.slots import Head
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.transports.shared_memory import Ring


def commit(store: WeightStore, version: int) -> Head:
    """A version whose bytes all are its number."""
    slot = store.begin(SIZES)
    for arena in slot.open():
        arena.view(0, (arena.nbytes,), torch.uint8).fill_(version)
    store.describe("feed", {"plan": version})
    store.commit(slot, version, "feed", None)
    head = store.head()
    assert head is not None
    return head


def image_path(folder: Path, head: Head, worker: int) -> Path:
    (path,) = folder.glob(f"*-{head.token}.{worker}.image")
    return path


def relabel(path: Path, label: Label) -> None:
    """What a writer does that does not heed the readers' locks."""
    descriptor = os.open(path, os.O_RDWR)
    label.write(descriptor)
    os.close(descriptor)


def test_a_slot_that_comes_round_again_is_another_fill(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    first, _, third = (commit(store, version) for version in (1, 2, 3))
    assert first.token == third.token
    assert first.fill != third.fill
    with pytest.raises(StoreError, match=f"moved on to version 3, fill {third.fill}, and fill {first.fill} was asked for"):
        WeightStore("policy", tmp_path).read(1, first.fill)


def test_a_version_of_another_training_is_another_fill(tmp_path: Path) -> None:
    fills = set()
    for _ in range(3):
        store = WeightStore("policy", tmp_path)
        fills.add(commit(store, 3).fill)
        store.close()
    assert len(fills) == 3


def test_an_image_of_another_fill_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In spite of its name: its bytes are not those that the head means."""
    monkeypatch.setattr("mbridge_rl.sync.store.weight_store._READ_SECONDS", 0.2)
    store = WeightStore("policy", tmp_path)
    head = commit(store, 1)
    relabel(image_path(tmp_path, head, 1), Label(new_fill(), 1, SIZES[1]))
    with store.read(0) as reading:
        assert reading.head == head
    with pytest.raises(StoreError, match=f"the head asks for Label\\(fill='{head.fill}', worker=1"):
        store.read(1, head.fill)
    relabel(image_path(tmp_path, head, 1), Label(head.fill, 0, SIZES[1]))  # the image of another worker
    with pytest.raises(StoreError, match="has the label"):
        store.read(1)


def test_a_reader_sees_that_its_image_was_filled_anew_while_it_read(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    head = commit(store, 1)
    with store.read(0) as reading:
        reading.require_same()
        other = new_fill()
        relabel(image_path(tmp_path, head, 0), Label(other, 0, SIZES[0]))
        with pytest.raises(StoreError, match=f"it has fill {other}, expected {head.fill}"):
            reading.require_same()
        relabel(image_path(tmp_path, head, 0), Label(head.fill, 0, SIZES[0]))


def test_an_older_store_is_refused_by_name(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    commit(store, 1)
    head = tmp_path / "mbridge_rl-store-policy-head.json"
    head.write_text('{"format": 1, "version": 1, "fingerprint": "feed", "token": "a", "sizes": [1], "digest": null}')
    for use in (store.head, lambda: store.read(0), lambda: store.begin(SIZES)):
        with pytest.raises(StoreError, match=r"head\.json has format 1, this mbridge_rl reads and writes format 2"):
            use()
    head.write_text('{"format": 2}')
    with pytest.raises(StoreError, match="is no head of a weight store"):
        store.head()


def test_a_store_that_is_removed_amid_a_version_does_not_get_it(tmp_path: Path) -> None:
    store = WeightStore("policy", tmp_path)
    slot = store.begin(SIZES)
    WeightStore("policy", tmp_path).remove()
    with pytest.raises(StoreError, match="was removed while version 1 was written"):
        store.commit(slot, 1, "feed", None)
    store.abort(slot)
    assert store.head() is None
    assert commit(store, 2).version == 2


def test_readers_get_the_description_that_belongs_to_what_is_live(tmp_path: Path) -> None:
    """Plans of two trainings may be equal where their configs are not."""
    first = WeightStore("policy", tmp_path)
    commit(first, 1)
    first.close()
    second = WeightStore("policy", tmp_path)
    second.describe("feed", {"plan": "of the second training"})
    assert WeightStore("policy", tmp_path).description("feed") == {"plan": 1}
    commit(second, 2)
    assert WeightStore("policy", tmp_path).description("feed") == {"plan": 2}


def test_a_slow_worker_does_not_catch_up_to_a_later_version_than_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits go by before it opens its image: the slot has the same token again."""
    trainer = Trainer(StandInEngine(), name)
    trainer.sync(1)
    late = StandInEngine()
    before = late.generate()
    meanwhile(monkeypatch, late, 1, "begin", lambda: [trainer.sync(2), trainer.sync(3)])
    with pytest.raises(StoreError, match="has moved on to version 3"):
        late.catch_up(name, "/dev/shm")
    assert late.generate() == before
    late.catch_up(name, "/dev/shm")
    assert late.generate() == expected(3)
    trainer.weights.close()


def test_workers_that_have_opened_a_fill_load_it_whatever_is_committed_then(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(StandInEngine(), name)
    trainer.sync(1)
    late = StandInEngine()
    meanwhile(monkeypatch, late, 1, "commit", lambda: [trainer.sync(version) for version in (2, 3, 4, 5)])
    late.catch_up(name, "/dev/shm")
    assert late.generate() == expected(1)
    trainer.weights.close()


def test_a_commit_that_comes_late_finds_out_and_writes_nothing(name: str) -> None:
    """Its replica was given up, and the trainer has gone on: twice, so that the slot's token is the same again."""
    given_up, other = StandInEngine(), StandInEngine()
    trainer = Trainer([given_up, other], name, lost_engines="drop")
    trainer.sync(1)
    calls: list[int] = []

    def lost(version: int, *_: Any) -> CommitReport:
        calls.append(version)
        assert given_up._open is not None
        return CommitReport(version, given_up._open.fill, 2, 0, (0, 0), None, 0, 0, {})

    given_up.commit = lost  # type: ignore[assignment]
    trainer.sync(2)  # its answer is lost on the way, and so is the call
    del given_up.commit
    trainer.weights.remove_engine(given_up)
    trainer.sync(3)
    trainer.sync(4)
    held = [worker.parameters_by_name() for worker in given_up.workers]
    before = [{name: tensor.clone() for name, tensor in parameters.items()} for parameters in held]
    with pytest.raises(StoreError, match="has moved on to version 4"):
        given_up.commit(calls[0])
    assert all(torch.equal(held[worker][name], before[worker][name]) for worker in range(2) for name in before[worker])
    with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\)"):
        given_up.generate()
    assert trainer.weights.add_engine(given_up) == 4  # met anew
    assert given_up.generate() == other.generate() == expected(4)
    trainer.weights.close()


def test_a_commit_of_an_earlier_attempt_does_not_commit_a_later_one(name: str) -> None:
    engine = StandInEngine()
    trainer = Trainer(engine, name)
    trainer.sync(1)
    receiver = engine.receivers[0]
    wire = StoreWire(name=name, directory="/dev/shm", token="a", fill="second")
    receiver.begin(UpdateRequest(2, "second", receiver.fingerprint, "staged", wire, timeout=1.0))
    with pytest.raises(SyncError, match="fill first of version 2 cannot be committed: the open update brings fill second"):
        receiver.commit(2, "first")
    receiver.abort("it ends here")
    assert engine.generate() == expected(1)
    trainer.weights.close()


def live_image(store: WeightStore, worker: int) -> torch.Tensor:
    head = store.head()
    assert head is not None
    path = image_path(Path("/dev/shm"), head, worker)
    mapped = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return mapped[LABEL_BYTES:]


def test_a_damaged_image_is_refused_before_the_first_write(name: str) -> None:
    trainer = Trainer(StandInEngine(), name)
    trainer.sync(1)
    live_image(trainer.weights.store, 1)[1000] ^= 1
    late = StandInEngine()
    before = late.generate()
    with pytest.raises(DigestMismatch, match="arrived with other bytes for worker 1"):
        late.catch_up(name, "/dev/shm")
    assert late.generate() == before
    with pytest.raises(DigestMismatch, match="arrived with other bytes for worker 1"):
        trainer.weights.add_engine(late)
    trainer.weights.close()


def test_an_image_that_is_well_but_of_other_weights_is_refused_before_the_first_write(name: str) -> None:
    """Its digests are right, its label is right, and its bytes are another version's."""
    trainer = Trainer(StandInEngine(), name)
    trainer.sync(1)
    old = [live_image(trainer.weights.store, worker).clone() for worker in range(2)]
    trainer.sync(2)
    for worker in range(2):
        live_image(trainer.weights.store, worker).copy_(old[worker])
    late = StandInEngine()
    before = late.generate()
    with pytest.raises(DigestMismatch, match="the image of worker 0 has the digests of other weights than version 2"):
        late.catch_up(name, "/dev/shm")
    assert late.generate() == before
    trainer.weights.close()


def test_a_ring_counts_nothing_that_was_counted_for_another_update() -> None:
    sizes = 1, 1, 64
    first, second = Ring.new_update(), Ring.new_update()
    assert first != second
    with Arena.create(Ring.nbytes(*sizes)) as arena:
        rank, late = Ring(arena, *sizes, own_counter=0, update=first), Ring(arena, *sizes, own_counter=1, update=first)
        rank.count(3)
        late.count(3)
        assert (rank.emptied(), late.filled(0)) == (3, 3)
        rank.turn_to(second)
        worker = Ring(arena, *sizes, own_counter=1, update=second)
        assert (rank.emptied(), worker.filled(0)) == (0, 0)
        late.count(9)
        assert rank.emptied() == 0
        rank.count(1)
        assert (worker.filled(0), late.filled(0)) == (1, 0)
        rank.leave()
        with pytest.raises(PeerFailed, match="did not send bucket 1"):
            worker.require_filling(0, 1)
        for ring in (rank, late, worker):
            ring.close()


def test_what_a_worker_publishes_late_reaches_nobody() -> None:
    """The memory that it is to be written to is of that one call: it is never a slot that serves."""
    engine = StandInEngine()
    trainer = Trainer(engine, f"pull.{os.getpid()}")
    trainer.sync(1)
    paths: list[str] = []
    with published(trainer.weights.route.workers, lambda given: paths.extend(given), RankGroup()):
        engine.publish(paths)
    with pytest.raises(ArenaError, match="no arena at"):
        engine.publish(paths)
    trainer.weights.close()
    trainer.weights.store.remove()
