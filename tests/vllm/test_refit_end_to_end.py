"""Megatron ranks -> shared memory -> a live vLLM engine in another process, proven and compared with what should be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_answers import ENGINE, greedy, greedy_of_transformers
from ranks import run_ranks
from tiny import DENSE, logit_scale, tiny_checkpoint
from tolerance import assert_near, forward

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.payload.route import Part
from mbridge_rl.sync.transports.shared_memory import SlotOutlet
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.weight_sync import SyncReport, WeightSync

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 256, "head_dim": 32}  # heads of 32: the smallest that vLLM computes on a CPU

ROUNDING = forward(DENSE["num_hidden_layers"], SIZES["hidden_size"])


def refit(rank: int, start: Path, trained: Path, layout: ParallelLayout, fresh: bool) -> dict[str, Any]:
    """An engine started from `start` is refitted from a trainer that holds `trained`."""
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model()
    bridge.load_weights(model, trained)
    engine = EngineProcess(start, **ENGINE).start() if rank == 0 else None
    if engine is not None:
        engine.wait_ready()
    sync = WeightSync(bridge, model, engine, bucket_bytes=1 << 18)
    reports = [sync.sync(version) for version in (1, 2)]
    results: dict[str, Any] = {"reports": reports}
    if engine is not None:
        results |= {"refitted": greedy(engine), "version": engine.weight_version}
        engine.close()
    bridge.save_pretrained(model, trained / "saved")
    if rank == 0 and fresh:
        with EngineProcess(trained / "saved", **ENGINE).start() as engine:
            engine.wait_ready()
            results["fresh"] = greedy(engine)
    sync.close()
    return results


@pytest.mark.parametrize(
    ("variant", "layout", "fresh"),
    [
        pytest.param("qwen3", ParallelLayout(tp=2), True, id="qwen3-tp2"),
        pytest.param(
            "qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), True, id="qwen3-moe-tp2xep2xetp1", marks=pytest.mark.nightly
        ),
        pytest.param("qwen2-tied", ParallelLayout(pp=2, stage_layers=(1, 3)), False, id="qwen2-tied-pp2-uneven"),
        pytest.param("llama3-tied", ParallelLayout(tp=2, dp=2), False, id="llama3-tied-tp2xdp2"),
    ],
)
def test_refitted_engine_equals_a_fresh_one_and_transformers(
    variant: str, layout: ParallelLayout, fresh: bool, tmp_path: Path
) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", variant, seed=0, **SIZES)
    trained, reference = tiny_checkpoint(tmp_path / "trained", variant, seed=1, **SIZES)
    ranks = run_ranks(refit, layout.world_size, start, trained, layout, fresh, timeout=180)
    results = ranks[0]
    for report in results["reports"]:
        assert isinstance(report, SyncReport)
        assert report.verified
        assert report.engine["digest"] == report.digest
        assert report.engine["proven_live"] == report.tensors
        assert report.nbytes <= report.engine["bytes"] <= 1.05 * report.nbytes  # alignment and digests are counted as well
        assert report.buckets > 4
    assert {rank["reports"][1].digest for rank in ranks} == {results["reports"][0].digest}
    assert results["version"] == 2
    if fresh:
        assert results["refitted"] == results["fresh"]  # the same bits: tokens and log-probabilities
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(
        results["refitted"], greedy_of_transformers(reference, 8), strict=True
    ):
        assert tokens == wanted
        scale = logit_scale(SIZES["hidden_size"], tied=variant.endswith("tied"))
        assert_near(logprobs, wanted_logprobs, ROUNDING, scale=scale, what="log-probabilities")


def fail_in_many_ways(rank: int, start: Path, other: Path, trained: Path) -> dict[str, Any]:
    initialize_parallel(ParallelLayout(tp=2))
    engine = EngineProcess(start, **ENGINE).start() if rank == 0 else None
    if engine is not None:
        engine.wait_ready()
    before = greedy(engine) if engine else None

    stranger = AutoBridge.from_pretrained(other)
    with pytest.raises(SyncError) as mismatch:
        WeightSync(stranger, stranger.build_model(), engine)

    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model()
    bridge.load_weights(model, trained)
    with pytest.raises(SyncError) as no_engine:
        WeightSync(bridge, model, None)
    untouched = greedy(engine) == before if engine else True

    sync = WeightSync(bridge, model, engine, bucket_bytes=1 << 18)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotOutlet, "send", tear_a_bit)
        with pytest.raises(DigestMismatch) as torn_sync:
            sync.sync(7)
    served_on = greedy(engine) == before if engine else True
    sync.sync(8)
    after = (engine.weight_version, greedy(engine)) if engine else None
    if engine is not None:
        engine.close()
    sync.close()
    return {
        "mismatch": (type(mismatch.value).__name__, str(mismatch.value)),
        "no_engine": str(no_engine.value),
        "torn": str(torn_sync.value),
        "untouched": untouched,
        "served_on": served_on,
        "after": after,
    }


def tear_a_bit(outlet: SlotOutlet, worker: int, index: int, part: Part) -> None:
    """A wire that flips a bit of the third bucket."""
    if index == 2:
        outlet.place(worker, index, part)[5:6].bitwise_xor_(1)


def test_failures_reach_every_rank_and_leave_no_mixture(tmp_path: Path) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", "qwen3", seed=0, **SIZES)
    other, _ = tiny_checkpoint(tmp_path / "other", "qwen3", seed=0, **SIZES, intermediate_size=144)
    trained, reference = tiny_checkpoint(tmp_path / "trained", "qwen3", seed=1, **SIZES)
    first, second = run_ranks(fail_in_many_ways, 2, start, other, trained, timeout=180)
    assert first["mismatch"][0] == EngineMismatch.__name__
    assert "intermediate_size: the trainer has 144, the engine 136" in first["mismatch"][1]
    assert "rank 0 has no engine client" in first["no_engine"]
    assert "rank 0 failed: EngineMismatch" in second["mismatch"][1]
    assert "rank 0 failed: SyncError: rank 0 has no engine client" in second["no_engine"]
    assert first["untouched"]
    assert "arrived with other bytes for worker 0" in first["torn"]
    assert "arrived with other bytes for worker 0" in second["torn"]
    assert first["served_on"]
    version, answers = first["after"]
    assert version == 8
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in greedy_of_transformers(reference, 8)]
