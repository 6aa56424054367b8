"""Planned syncs between light ends: every mode and transport, replicas, catching up, pulling back, and bad input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import LargestAllocation
from fused_engine import EngineLayout
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights, served, set_weights
from sync_cases import WAYS

from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, EngineUnusable, NonFiniteWeights, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.pull import restore_from_store
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet
from mbridge_rl.sync.weight_sync import WeightSync


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(Path("/dev/shm").glob("mbridge_rl-*"))
    yield
    mine = [path for path in set(Path("/dev/shm").glob("mbridge_rl-*")) - before if f"{os.getpid()}" in path.name]
    assert not mine


def every_way(rank: int, variant: str, layout: ParallelLayout, engine_layout: EngineLayout, replicas: int, url: str) -> Any:
    states = [random_weights(variant, seed) for seed in range(len(WAYS) + 1)]
    bridge, model = light_model(variant, layout, rank, states[0])
    engines = [StandInEngine(variant, engine_layout) for _ in range(replicas)] if rank == 0 else None
    results = []
    for version, (mode, transport) in enumerate(WAYS, start=1):
        set_weights(bridge, model, rank, states[version])
        sync = WeightSync(bridge, model, engines, mode=mode, transport=transport, url=url, bucket_bytes=1 << 13, timeout=20.0)
        for again in (False, True):  # the second sync reuses everything that the first one prepared
            if again:
                set_weights(bridge, model, rank, states[version - 1])
            with LargestAllocation() as largest:
                report = sync.sync(2 * version + again)
            assert report.attempts == 1
            if engines is not None:
                expected = 2 * version + again, served(states[version - again], variant, engine_layout)
                assert [engine.generate() for engine in engines] == [expected] * replicas, (mode, transport)
                assert {engine_report["digest"] for engine_report in report.engines} == {report.digest}
                images = [
                    worker.nbytes for worker in sync.route.workers
                ]  # the bytes that each worker needs, aligned, and digests
                assert [engine_report["bytes_per_worker"] for engine_report in report.engines] == [images] * replicas, (
                    mode,
                    transport,
                )
        bytes_of_workers = [worker.payload_bytes for worker in sync.route.workers]
        results.append((largest.nbytes, report.nbytes, bytes_of_workers))
        sync.close()
    for engine in engines or ():
        engine.close()
    return results


@pytest.mark.parametrize(
    ("variant", "layout", "engine_layout", "replicas"),
    [
        pytest.param("qwen3", ParallelLayout(tp=2, pp=2), EngineLayout(tp=2), 2, id="dense-tp2xpp2-to-two-tp2"),
        pytest.param("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), EngineLayout(tp=2, expert_parallel=True), 1, id="moe-ep2"),
        pytest.param("llama3-tied", ParallelLayout(pp=2), EngineLayout(tp=4, pp=2), 1, id="tied-pp2-to-tp4xpp2"),
    ],
)
def test_every_mode_and_transport_is_exact(
    variant: str, layout: ParallelLayout, engine_layout: EngineLayout, replicas: int, tmp_path: Path
) -> None:
    ranks = run_ranks(every_way, layout.world_size, variant, layout, engine_layout, replicas, str(tmp_path), timeout=240)
    sizes = [tensor.numel() * 4 for tensor in random_weights(variant, 0).values()]
    for rank in ranks[1:]:  # rank 0 has the engines in its process as well
        for largest, nbytes, bytes_of_workers in rank:
            assert sum(bytes_of_workers) == nbytes < 1.35 * sum(sizes)
            assert largest <= 1 << 18  # the constants of digests, or a few buckets, but no tensor of the model


def sync_of(rank: int, engine: StandInEngine | None, seed: int = 1, layout: ParallelLayout | None = None, **fields: Any) -> Any:
    bridge, model = light_model("qwen3", layout or ParallelLayout(tp=2), rank, random_weights("qwen3", seed))
    return WeightSync(bridge, model, engine, bucket_bytes=1 << 12, timeout=5.0, **fields), bridge, model


def torn_wires(rank: int) -> None:
    engine = StandInEngine() if rank == 0 else None
    tears = 0

    def tear(outlet: Any, worker: int, index: int, part: Any) -> None:
        nonlocal tears
        if index == 1 and part.source_rank == 1 and tears > 0:
            tears -= 1
            outlet.place(worker, index, part)[8:9].bitwise_xor_(4)
        send(outlet, worker, index, part)

    for kind, mode in ((SlotOutlet, "staged"), (RingOutlet, "streaming")):
        send, sync = kind.send, sync_of(rank, engine, mode=mode)[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "send", tear)
            tears = 1
            assert sync.sync(1).attempts == 2  # the second attempt is whole
            assert engine is None or engine.generate() == (1, served(random_weights("qwen3", 1)))
            tears = 2
            with pytest.raises(DigestMismatch, match=r"worker [01]"):
                sync.sync(2)
        if engine is not None and mode == "staged":
            assert engine.generate() == (1, served(random_weights("qwen3", 1)))
        elif engine is not None:
            with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\)"):
                engine.generate()
        sync.sync(3)
        assert engine is None or engine.generate() == (3, served(random_weights("qwen3", 1)))
        sync.close()


def test_a_torn_bucket_is_sent_again_and_never_served() -> None:
    run_ranks(torn_wires, 2)


def wrong_packing(rank: int) -> None:
    engine = StandInEngine() if rank == 0 else None
    sync = sync_of(rank, engine, retries=0)[0]
    sync.sync(1)

    def pack_one_wrong(part: Any, into: torch.Tensor, read: Any) -> None:
        pack(part, into, read)
        if rank == 1:
            into[:4] = into[4:8].clone()

    pack = packing.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack", pack_one_wrong)
        with pytest.raises(DigestMismatch, match=r"worker [01]"):
            sync.sync(2)
    assert engine is None or engine.generate() == (1, served(random_weights("qwen3", 1)))
    sync.close()


def test_the_proof_covers_the_packing() -> None:
    run_ranks(wrong_packing, 2)


def refusals(rank: int) -> None:
    """Every bad input is refused before any live weight changes."""
    engine = StandInEngine() if rank == 0 else None
    before = engine and engine.generate()
    sync, bridge, model = sync_of(rank, engine)
    parameter = next(iter(model[0].parameters()))
    original = parameter.data.clone()
    if rank == 1:
        parameter.data.view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteWeights, match="rank 1: 1 parameters hold NaN or infinity"):
        sync.sync(1)
    assert engine is None or engine.generate() == before
    passing = WeightSync(bridge, model, engine, nonfinite="pass", bucket_bytes=1 << 12)
    passing.sync(2)  # the engine proves that it holds these very bits
    passing.close()
    parameter.data.copy_(original)

    del model[0].decoder.layers[0].mlp.linear_fc1.weight
    with pytest.raises(Exception, match=r"it lacks \[decoder\.layers\.0\.mlp\.linear_fc1\.weight\]"):
        sync.sync(3)
    sync.close()
    assert engine is None or engine.version == 2

    good, bridge, model = sync_of(rank, engine)
    good.sync(4)
    expected = engine and engine.generate()
    with pytest.raises(SyncError, match="'cuda_ipc' needs parameters on a GPU; on a CPU use 'shared_memory'"):
        WeightSync(bridge, model, engine, transport="cuda_ipc")
    with pytest.raises(EngineMismatch, match=r"the trainer sends torch\.float64"):
        WeightSync(bridge, model, engine, dtype=torch.float64)
    other, others = light_model("qwen2", ParallelLayout(tp=2), rank, random_weights("qwen2", 1))
    with pytest.raises(EngineMismatch, match="architecture: the trainer has 'Qwen2ForCausalLM'"):
        WeightSync(other, others, engine)
    bridge.hf_config.vocab_size += 1
    with pytest.raises(EngineMismatch, match="vocab_size: the trainer has 132, the engine 131"):
        WeightSync(bridge, model, engine)
    bridge.hf_config.vocab_size -= 1
    latest = WeightSync(bridge, model, engine, bucket_bytes=1 << 14)
    with pytest.raises(EngineMismatch, match="the sender's plan has fingerprint"):
        good.sync(5)  # the engine was given another plan since
    latest.sync(6)
    assert engine is None or (engine.generate()[1] == expected[1] and engine.version == 6)
    with pytest.raises(SyncError, match="rank 1 brings"):
        WeightSync(bridge, model, engine, bucket_bytes=4096 + rank)
    good.close()
    latest.close()


def test_bad_input_is_refused_before_anything_changes() -> None:
    run_ranks(refusals, 2)


def untraceable(rank: int, mode: str) -> None:
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    engine = StandInEngine(untraceable=names) if rank == 0 else None
    sync = sync_of(rank, engine, mode=mode)[0]
    report = sync.sync(1)
    if engine is not None:
        assert engine.generate() == (1, served(random_weights("qwen3", 1)))
        assert report.engine["digest"] == report.digest
        assert report.engine["proven_received"] == 2
        with pytest.raises(SyncError, match="only its own loader knows"):
            engine.receivers[0].publish(torch.empty(0, dtype=torch.uint8))
    sync.close()


@pytest.mark.parametrize("mode", ["staged", "streaming"])
def test_a_tensor_that_cannot_be_traced_goes_whole_and_the_others_do_not(mode: str) -> None:
    run_ranks(untraceable, 2, mode)


def late_and_lost(rank: int, name: str) -> None:
    """An engine that starts after the trainer is gone, and trainers that start again from what is left."""
    engine = StandInEngine() if rank == 0 else None
    sync, _, _ = sync_of(rank, engine, seed=3, store=name)
    sync.sync(7)
    sync.close()
    store = sync.store
    expected = served(random_weights("qwen3", 3))
    if rank == 0:
        late = StandInEngine()
        late.catch_up(name, "/dev/shm")
        assert late.generate() == (7, expected)
    torch.distributed.barrier()
    for layout in (ParallelLayout(pp=2), ParallelLayout(dp=2), ParallelLayout(tp=2)):
        state, lost = random_weights("qwen3", 3), random_weights("qwen3", 5)
        bridge, model = light_model("qwen3", layout, rank, lost)
        _, wanted = light_model("qwen3", layout, rank, state)
        bridge.export_plan = lambda layout, spec=bridge.spec: compile_plan(spec, megatron_side(spec, layout), hf_side(spec))
        assert restore_from_store(bridge, model, store) == 7
        assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), wanted[0].parameters(), strict=True))
        set_weights(bridge, model, rank, lost)
        again = WeightSync(bridge, model, engine, bucket_bytes=1 << 12)
        again.pull()
        assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), wanted[0].parameters(), strict=True))
        again.close()
    other, others = light_model("qwen2", ParallelLayout(tp=2), rank, random_weights("qwen2", 1))
    with pytest.raises(EngineMismatch, match="is of the model"):
        restore_from_store(other, others, store)
    torch.distributed.barrier()
    if rank == 0:
        copy = WeightStore(name, "/tmp", durable=True)
        store.copy_to(copy)
        store.remove()
        late = StandInEngine()
        late.catch_up(name, "/tmp")
        assert late.generate() == (7, expected)
        copy.remove()


def test_late_engines_and_lost_trainers_catch_up_from_the_store() -> None:
    run_ranks(late_and_lost, 2, f"late.{os.getpid()}")


def one_commit_fails(rank: int) -> None:
    """Of two engines the second cannot commit, in its second worker, when the first has committed."""
    engines = [StandInEngine(), StandInEngine()] if rank == 0 else None
    for mode in ("staged", "streaming"):
        sync, bridge, model = sync_of(rank, engines, mode=mode)
        assert sync.sync(1).failed == {}
        set_weights(bridge, model, rank, random_weights("qwen3", 2))
        with pytest.MonkeyPatch.context() as patch:
            if engines is not None:
                moment = "open" if mode == "staged" else "settle"  # the first comes before anything of this worker is written
                patch.setattr(engines[1].receivers[1]._model, moment, _out_of_memory)
            report = sync.sync(2)
        assert report.failed.keys() == {1}
        assert "out of memory" in report.failed[1]
        assert [outcome.version for outcome in report.outcomes] == [2, None]
        if engines is not None:
            assert engines[0].generate() == (2, served(random_weights("qwen3", 2)))
            with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\).*out of memory"):
                engines[1].generate()
            assert len(report.engines) == 1
        assert sync.sync(3).failed == {}
        if engines is not None:
            assert [engine.generate() for engine in engines] == [(3, served(random_weights("qwen3", 2)))] * 2
            engines[0].commit = engines[1].commit = _out_of_memory
        with pytest.raises(SyncError, match="out of memory"):  # no engine has it
            sync.sync(4)
        for engine in engines or ():
            del engine.commit
        sync.sync(5)
        sync.close()


def _out_of_memory(*_: object) -> None:
    raise RuntimeError("out of memory")  # as torch does: no error of this library


def test_an_engine_that_fails_to_commit_is_named_refuses_and_comes_back() -> None:
    run_ranks(one_commit_fails, 2)
