"""What `test_weight_source.py` runs in an interpreter of its own, whose ranks inherit the import of vLLM."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from live import live, raised
from ranks import run_ranks
from tiny import assert_same_state, hf_state

from mbridge_rl.core.layout import ParallelLayout


def passes_of_all_ranks(directory: Path, layout: ParallelLayout) -> None:
    importlib.import_module("mbridge_rl.integrations.vllm_source")
    importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
    results_of_ranks = run_ranks(passes, layout.world_size, directory, layout, timeout=180)
    expected = hf_state(directory)
    for rank, results in enumerate(results_of_ranks):
        assert list(results["full"]) == list(results["again"])
        assert_same_state(results["full"], expected)
        assert_same_state(results["again"], expected)
        assert list(results["first"]) == (list(results["full"]) if rank == 0 else [])
        stage = layout.coordinates(rank).pp
        assert results["held"]
        for name, tensor in results["held"].items():
            assert torch.equal(tensor, expected[name])
        assert all(int(name.split(".")[2]) // 2 == stage for name in results["held"] if name.startswith("model.layers."))
        assert results["no gpu"].startswith("SyncError: vLLM's weight-transfer backend 'ipc' moves CUDA tensors")
    assert {name for results in results_of_ranks for name in results["held"]} == expected.keys()
    assert [results["live"] for results in results_of_ranks] == [0] * len(results_of_ranks)


def passes(rank: int, directory: Path, layout: ParallelLayout) -> dict[str, Any]:
    from vllm.distributed.weight_transfer.base import layerwise_groups
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from mbridge_rl.integrations.vllm_source import MegatronWeightSource, start_trainer

    bridge, model = live(layout, directory)
    results: dict[str, Any] = {}
    full_source = MegatronWeightSource(bridge, model, bucket_bytes=1 << 13)
    # This iterator makes vLLM's own checks.
    results["full"] = dict(NCCLTrainerWeightTransferEngine._checked_iter(full_source, full_source.metadata()))
    results["again"] = {
        name: tensor for names, tensors in full_source.iter_groups() for name, tensor in zip(names, tensors, strict=True)
    }
    first = MegatronWeightSource(bridge, model, ranks=(0,))
    results["first"] = dict(first)

    staged = MegatronWeightSource(bridge, model, by_stage=True, bucket_bytes=1 << 13)
    assert staged.metadata() == full_source.metadata()
    held, groups = staged.held_names(), staged.groups()
    assert held is not None
    all_groups = layerwise_groups([info.name for info in staged.metadata()])
    assert groups == [group for group in all_groups if held.intersection(group)]
    batches = list(staged.iter_groups())  # vLLM's default: names must come in the order of groups
    assert [names for names, _ in batches] == groups
    pairs = [pair for names, tensors in batches for pair in zip(names, tensors, strict=True)]
    assert all((tensor is None) == (name not in held) for name, tensor in pairs)  # as vLLM's sharded_rdt demands
    results["held"] = {name: tensor for name, tensor in pairs if tensor is not None}
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.zero_()
    results["live"] = sum(int(tensor.count_nonzero()) for _, tensor in full_source)  # of the pass that began after the change
    init_info = IPCTrainerInitInfo(rank=rank)
    results["no gpu"] = raised(lambda: start_trainer(init_info, client=None, source=full_source))
    for source in (full_source, first, staged):
        source.close()
    return results


def native_backend(directory: Path) -> None:
    importlib.import_module("gloo_backend").a_native_backend_takes_our_source(directory)
