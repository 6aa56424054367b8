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
    ranks = run_ranks(passes, layout.world_size, directory, layout, timeout=180)
    expected = hf_state(directory)
    for rank, found in enumerate(ranks):
        assert list(found["whole"]) == list(found["again"])
        assert_same_state(found["whole"], expected)
        assert_same_state(found["again"], expected)
        assert list(found["first"]) == (list(found["whole"]) if rank == 0 else [])
        stage = layout.coordinates(rank).pp
        assert found["held"]
        for name, tensor in found["held"].items():
            assert torch.equal(tensor, expected[name])
        assert all(int(name.split(".")[2]) // 2 == stage for name in found["held"] if name.startswith("model.layers."))
        assert found["no gpu"].startswith("SyncError: vLLM's weight-transfer backend 'ipc' moves CUDA tensors")
    assert {name for found in ranks for name in found["held"]} == expected.keys()
    assert [found["live"] for found in ranks] == [0] * len(ranks)


def passes(rank: int, directory: Path, layout: ParallelLayout) -> dict[str, Any]:
    from vllm.distributed.weight_transfer.base import layerwise_groups
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from mbridge_rl.integrations.vllm_source import MegatronWeightSource, start_trainer

    bridge, model = live(layout, directory)
    found: dict[str, Any] = {}
    whole = MegatronWeightSource(bridge, model, bucket_bytes=1 << 13)
    found["whole"] = dict(NCCLTrainerWeightTransferEngine._checked_iter(whole, whole.metadata()))  # vLLM's own check
    found["again"] = {
        name: tensor for names, tensors in whole.iter_groups() for name, tensor in zip(names, tensors, strict=True)
    }
    first = MegatronWeightSource(bridge, model, ranks=(0,))
    found["first"] = dict(first)

    staged = MegatronWeightSource(bridge, model, by_stage=True, bucket_bytes=1 << 13)
    assert staged.metadata() == whole.metadata()
    held, groups = staged.held_names(), staged.groups()
    assert held is not None
    all_groups = layerwise_groups([told.name for told in staged.metadata()])
    assert groups == [group for group in all_groups if held.intersection(group)]
    batches = list(staged.iter_groups())  # vLLM's default: names must come in the order of groups
    assert [names for names, _ in batches] == groups
    pairs = [pair for names, tensors in batches for pair in zip(names, tensors, strict=True)]
    assert all((tensor is None) == (name not in held) for name, tensor in pairs)  # as vLLM's sharded_rdt demands
    found["held"] = {name: tensor for name, tensor in pairs if tensor is not None}
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.zero_()
    found["live"] = sum(int(tensor.count_nonzero()) for _, tensor in whole)  # of the pass that began after the change
    info = IPCTrainerInitInfo(rank=rank)
    found["no gpu"] = raised(lambda: start_trainer(info, client=None, source=whole))
    for source in (whole, first, staged):
        source.close()
    return found


def native_backend(directory: Path) -> None:
    importlib.import_module("gloo_backend").a_native_backend_takes_our_source(directory)
