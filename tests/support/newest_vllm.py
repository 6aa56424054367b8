"""What `tests/vllm/test_newest_vllm.py` runs: the Python files of the newest vLLM come first on the path, without kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import vllm
from live import live
from ranks import run_ranks
from tiny import assert_same_state, hf_state
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightSource, WeightTransferEngine

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.integrations.vllm_source import MegatronWeightSource
from mbridge_rl.sync.vllm.extension import engine_args
from mbridge_rl.sync.vllm.versions import refused_while_paused
from mbridge_rl.sync.vllm.worker.backend import PlannedSyncEngine


def passes(rank: int, directory: Path, layout: ParallelLayout) -> dict[str, Any]:
    bridge, model = live(layout, directory)
    results: dict[str, Any] = {}
    for name, options in {"all": {}, "by stage": {"by_stage": True}, "first rank": {"ranks": (0,)}}.items():
        source = MegatronWeightSource(bridge, model, bucket_bytes=1 << 13, **options)  # type: ignore[arg-type]
        assert source.implements_iter_full()
        assert not source.implements_iter_local()
        assert [meta.name for meta in source.metadata] == [meta.name for meta in source.metadata()]
        tensors = list(source.iter_full())
        assert [hf_name for hf_name, _ in tensors] == source.owned_names(rank)  # vLLM: exactly those, in this order
        owners = {meta.name: meta.owners for meta in source.metadata}
        results[name] = {"tensors": dict(tensors), "owners": owners}
        source.close()
    return results


def main(directory: Path) -> None:
    assert issubclass(MegatronWeightSource, WeightSource)
    assert issubclass(PlannedSyncEngine, WeightTransferEngine)
    assert not PlannedSyncEngine.__abstractmethods__
    assert engine_args()["weight_transfer_config"] == WeightTransferConfig(backend="mbridge")
    assert [error.__name__ for error in refused_while_paused()] == ["RetryableRequestError"]
    layout, expected = ParallelLayout(pp=2), hf_state(directory)
    ranks = run_ranks(passes, layout.world_size, directory, layout, timeout=240)
    for results in ranks:
        assert_same_state(results["all"]["tensors"], expected)
        assert set(results["all"]["owners"].values()) == {None}
        assert results["by stage"]["owners"] == ranks[0]["by stage"]["owners"]  # identical on every rank
        for hf_name, tensor in results["by stage"]["tensors"].items():
            assert torch.equal(tensor, expected[hf_name])
    assert {hf_name for results in ranks for hf_name in results["by stage"]["tensors"]} == expected.keys()
    assert_same_state(ranks[0]["first rank"]["tensors"], expected)
    assert ranks[1]["first rank"]["tensors"] == {}
    sys.stdout.write(f"fits vLLM at {Path(vllm.__file__).parent}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
