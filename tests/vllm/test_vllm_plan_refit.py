"""Real vLLM with two tensor-parallel workers, fed by real Megatron ranks over a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worker_probe
from allocations import LargestAllocation
from deepseek_models import checkpoint as deepseek_checkpoint
from delta_samples import grpo
from engine_answers import ENGINE, greedy
from ranks import run_ranks
from tiny import tiny_checkpoint

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.payload.engine_side import kept_bytes
from mbridge_rl.sync.payload.messages import Introduction
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.weight_sync import SyncReport, WeightSync
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BUCKET = 1 << 15
WAYS = [("staged", "shared_memory"), ("streaming", "process_group"), ("streaming", "shared_memory")]


def refit(rank: int, start: Path, trained: Path, layout: ParallelLayout, engine_args: dict[str, Any]) -> dict[str, Any]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model(layout, dtype=getattr(torch, engine_args.get("dtype", "float32")))
    half = engine_args.get("dtype") == "bfloat16"  # bf16 tests deltas; ways and answers are compared in fp32
    # vLLM's expert kernel for CPUs crashes on experts of other workers.
    answers = not half and "enable_expert_parallel" not in engine_args
    probe = start.parent / "probe"
    environment = {worker_probe.VARIABLE: str(probe)}
    probed = {"worker_extension_cls": "worker_probe.Probe", "environment": environment, **engine_args}
    engine = EngineProcess(start, **ENGINE, tensor_parallel_size=2, **probed).start() if rank == 0 else None
    if engine is not None:
        probe.mkdir()
        engine.wait_ready()
        with pytest.raises(
            SyncError, match="has to come before commit"
        ):  # raised in both workers, and no answer is left unread
            engine.commit(9)
    results: dict[str, Any] = {"answers": [], "largest": 0, "reports": [], "in_workers": []}
    for version, (mode, transport) in enumerate(WAYS[:1] if half else WAYS, start=1):
        bridge.load_weights(model, trained if version % 2 else start)
        sync = WeightSync(bridge, model, engine, mode=mode, transport=transport, bucket_bytes=BUCKET, verify=version > 1)
        with LargestAllocation() as largest:
            report = sync.sync(version)
        if version == 1:  # a sync with digests would measure their constants
            results["largest"] = largest.nbytes
            workers = Introduction.from_json(sync.store.description(sync.route.fingerprint)).workers if rank == 0 else ()
            results["bytes_needed"] = [kept_bytes(worker) for worker in workers]
        results["reports"].append(report)
        if engine is not None:
            results["in_workers"].append(sorted(worker_probe.largest(probe).values()))
        if engine is not None and answers:
            results["answers"].append(greedy(engine))
        if version == 3:
            bridge.load_weights(model, start)
            sync.pull()
            saved = {name: tensor.clone() for name, tensor in bridge.export_weights(model)}
            bridge.load_weights(model, trained)
            assert all(torch.equal(saved[name], tensor) for name, tensor in bridge.export_weights(model))
        sync.close()
    if half:
        results["deltas"] = step_by_delta(bridge, model, engine)
    if engine is not None:
        engine.close()
    if engine is not None and answers:
        with EngineProcess(trained, **ENGINE, tensor_parallel_size=2, **engine_args).start() as fresh:
            fresh.wait_ready()
            results["fresh"] = greedy(fresh)
    return results


def step_by_delta(bridge: AutoBridge, model: Any, engine: EngineProcess | None) -> list[SyncReport]:
    """A GRPO step at a usual learning rate, and what of it travels."""
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-6, micro_batch_size=4))
    sync = WeightSync(bridge, trainer.model, engine, transport="process_group", delta=True)
    reports = [sync.sync(4)]
    tokens = torch.randint(2, 515, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_completions(tokens[:, :5].tolist(), tokens[:, 5:].tolist(), pad_token_id=0)
    trainer.step(batch, grpo)
    reports.append(sync.sync(5))
    sync.close()
    return reports


NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # as in config.json of the released checkpoints: vLLM reads it
# vLLM's rotary kernel for CPUs is wrong; its attention for processors with AMX has no fp32.
MLA = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}, "attention_backend": "CPU_MLA"}


@pytest.mark.parametrize(
    ("variant", "layout", "engine_args"),
    [
        pytest.param("qwen3", ParallelLayout(tp=2, pp=2), {}, id="qwen3-tp2xpp2"),
        pytest.param(
            "qwen3",
            ParallelLayout(tp=2, pp=2),
            {"dtype": "bfloat16"},
            id="qwen3-tp2xpp2-bf16-deltas",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "qwen3-moe", ParallelLayout(tp=2, pp=2, ep=2, etp=1), {}, id="qwen3-moe-tp2xpp2xep2", marks=pytest.mark.nightly
        ),
        pytest.param(
            "qwen3-moe",
            ParallelLayout(ep=2, dp=2),
            {"enable_expert_parallel": True},
            id="qwen3-moe-ep2-to-ep2",
            marks=pytest.mark.nightly,
        ),
        pytest.param("deepseek", ParallelLayout(tp=2, pp=2, ep=2, etp=1), MLA, id="deepseek-tp2xpp2xep2"),
    ],
)
def test_two_workers_equal_a_fresh_engine(
    variant: str, layout: ParallelLayout, engine_args: dict[str, Any], tmp_path: Path
) -> None:
    start, trained = tmp_path / "start", tmp_path / "trained"
    sizes = {"hidden_size": 256, "num_hidden_layers": 2}
    if variant == "deepseek":
        latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 64,
                  "moe_intermediate_size": 64, "intermediate_size": 128, "num_nextn_predict_layers": 0, **NOAUX}  # fmt: skip
        deepseek_checkpoint(start, "v3", seed=2, **sizes, **latent)
        deepseek_checkpoint(trained, "v3", seed=1, **sizes, **latent)
    else:
        sizes |= (
            {"head_dim": 32, "mlp_only_layers": [], "moe_intermediate_size": 64} if variant == "qwen3-moe" else {"head_dim": 32}
        )
        tiny_checkpoint(start, variant, seed=0, **sizes)
        tiny_checkpoint(trained, variant, seed=1, **sizes)
    ranks = run_ranks(refit, layout.world_size, start, trained, layout, engine_args, timeout=500)
    results = ranks[0]
    if results["answers"]:
        assert results["answers"][0] == results["answers"][2] == results["fresh"]  # the same bits: tokens and log-probabilities
        assert results["answers"][1] != results["fresh"]
    for report in results["reports"]:
        for received, needed in zip(report.engine["bytes_per_worker"], results["bytes_needed"], strict=True):
            assert needed <= received <= 1.05 * needed  # aligned, and with digests
        assert report.engine["digest"] == report.digest
    if "deltas" not in results:
        assert results["reports"][2].engine["proven_live"] == report.tensors
    else:
        full, delta = results["deltas"]
        assert (full.base, delta.base) == (None, 4)
        assert delta.share < 0.05
        assert delta.engine["digest"] == delta.digest != full.digest
    # No rank and no worker allocates a tensor as large as a full one, or as a shard of it (an embedding's has 288 x 256
    # numbers): they allocate buckets, and what digests need.
    size = 2 if "deltas" in results else 4
    bound = max(4 * BUCKET, 1 << 17)
    assert bound < 288 * 256 * size
    assert all(rank["largest"] <= bound for rank in ranks)
    assert [len(workers) for workers in results["in_workers"]] == [2] * len(results["reports"])
    assert all(nbytes <= bound for workers in results["in_workers"] for nbytes in workers), results["in_workers"]
