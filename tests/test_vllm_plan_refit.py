"""Real vLLM with two tensor-parallel workers, fed by real Megatron ranks over a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_deepseek import checkpoint as deepseek_checkpoint
from test_refit_end_to_end import ENGINE, greedy
from test_shard_sync import LargestAllocation
from tiny import tiny_checkpoint

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.refit import WeightSync
from mbridge_rl.sync.vllm.process import EngineProcess

pytestmark = pytest.mark.slow

BUCKET = 1 << 15


def refit(rank: int, start: Path, trained: Path, layout: ParallelLayout, engine_args: dict[str, Any]) -> dict[str, Any]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model(layout)
    answers = "enable_expert_parallel" not in engine_args  # vLLM's expert kernel for CPUs crashes on experts of other workers
    engine = EngineProcess(start, **ENGINE, tensor_parallel_size=2, **engine_args).start() if rank == 0 else None
    if engine is not None:
        engine.wait_ready()
    found: dict[str, Any] = {"answers": [], "largest": 0, "reports": []}
    ways = [("staged", "shared_memory"), ("streaming", "process_group"), ("streaming", "shared_memory")]
    for version, (mode, transport) in enumerate(ways, start=1):
        bridge.load_weights(model, trained if version % 2 else start)
        sync = WeightSync(bridge, model, engine, mode=mode, transport=transport, bucket_bytes=BUCKET, verify=version > 1)
        with LargestAllocation() as largest:
            report = sync.sync(version)
        if version == 1:  # with digests, their constants would be the largest
            found["largest"] = largest.nbytes
            found["kept"] = [worker.payload_bytes for worker in sync.route.workers]
        found["reports"].append(report)
        if engine is not None and answers:
            found["answers"].append(greedy(engine))
        if version == 3:
            bridge.load_weights(model, start)
            sync.pull()
            saved = {name: tensor.clone() for name, tensor in bridge.export_weights(model)}
            bridge.load_weights(model, trained)
            assert all(torch.equal(saved[name], tensor) for name, tensor in bridge.export_weights(model))
        sync.close()
    if engine is not None:
        engine.close()
    if engine is not None and answers:
        with EngineProcess(trained, **ENGINE, tensor_parallel_size=2, **engine_args).start() as fresh:
            fresh.wait_ready()
            found["fresh"] = greedy(fresh)
    return found


NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # as in config.json of the released checkpoints: vLLM reads it
MLA = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}  # vLLM's rotary kernel for CPUs is wrong


@pytest.mark.parametrize(
    ("variant", "layout", "engine_args"),
    [
        pytest.param("qwen3", ParallelLayout(tp=2, pp=2), {}, id="qwen3-tp2xpp2"),
        pytest.param("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), {}, id="qwen3-moe-tp2xep2"),
        pytest.param("qwen3-moe", ParallelLayout(ep=2, dp=2), {"enable_expert_parallel": True}, id="qwen3-moe-ep2-to-ep2"),
        pytest.param("deepseek", ParallelLayout(tp=2, ep=2, etp=1), MLA, id="deepseek-tp2xep2"),
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
    found = ranks[0]
    if found["answers"]:
        assert found["answers"][0] == found["answers"][2] == found["fresh"]  # the same bits: tokens and log-probabilities
        assert found["answers"][1] != found["fresh"]
    for report in found["reports"]:
        assert report.engine["bytes_per_worker"] == found["kept"]  # not a byte besides what it keeps
        assert report.engine["digest"] == report.digest
    assert found["reports"][2].engine["proven_live"] == report.tensors
    largest_tensor = 515 * 256 * 4
    for rank in ranks:
        assert rank["largest"] <= max(4 * BUCKET, 1 << 17) < largest_tensor // 2
