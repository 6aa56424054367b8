"""How engines share a process with other engines and with process groups, for `tests/vllm/test_vllm_refit.py`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refit_engines import (
    PROMPTS,
    engine_of,
    fresh_completions,
    greedy,
    metadata_of,
    weights_of,
    without_versions,
)

from mbridge_rl.core.errors import EngineMismatch, SyncError
from mbridge_rl.sync.payload.messages import Announcement
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.worker import calls as worker_calls


def process_groups_outlive_an_engine(directory: Path) -> None:
    """A trainer's groups beside an engine that is closed, and beside one that just becomes garbage."""
    engine_of(directory, "qwen3")
    world, group = torch.distributed.group.WORLD, torch.distributed.new_group([0])
    with InProcessEngine(directory / "qwen3" / "A", max_model_len=64) as engine:
        expected = without_versions(greedy(engine))
    assert torch.distributed.group.WORLD is world
    dropped = InProcessEngine(directory / "qwen3" / "A", max_model_len=64)
    assert without_versions(greedy(dropped)) == expected
    del dropped
    gc.unfreeze()
    gc.collect()
    assert torch.distributed.group.WORLD is world
    total = torch.ones(3)
    torch.distributed.all_reduce(total, group=group)
    assert total.tolist() == [1.0, 1.0, 1.0]


def a_failed_step_leaves_no_requests(directory: Path) -> None:
    engine = engine_of(directory, "qwen3")
    model, expected = engine.receiver.model, without_versions(greedy(engine))

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("boom")

    model.forward = fail
    with pytest.raises(ValueError, match="boom"):
        greedy(engine)
    del model.forward
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert without_versions(greedy(engine)) == expected


def other_engines_are_left_alone(directory: Path) -> None:
    """An engine without our backend, beside ours in this process, keeps vLLM's packed weights and its answers."""
    from vllm import LLM, SamplingParams

    engine = engine_of(directory, "qwen3_moe")
    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_CI_ENV="1"):
        stock = LLM(
            str(directory / "qwen3_moe" / "A"),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
            disable_log_stats=True,
        )
    stock.llm_engine.engine_core._finalizer.detach()  # vLLM's own shutdown destroys the process groups of all engines here
    model = stock.llm_engine.model_executor.driver_worker.worker.model_runner.model
    assert model.model.layers[0].self_attn.qkv_proj.weight.numel() == 0  # oneDNN holds it
    experts = model.model.layers[0].mlp.experts
    kernels = [
        module.quant_method.moe_kernel
        for module in experts.modules()
        if hasattr(getattr(module, "quant_method", None), "moe_kernel")
    ]
    assert kernels
    assert all("_mbridge_packed" not in kernel.fused_experts.__dict__ for kernel in kernels)
    ours = engine.receiver.model.model.layers[0].self_attn.qkv_proj.weight
    assert tuple(ours.shape) == (320, 192)
    outputs = stock.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    fresh = fresh_completions(directory, "qwen3_moe", "A")
    assert [list(output.outputs[0].token_ids) for output in outputs] == [completion.tokens for completion in fresh]


def unmodified_vllm_loads_the_backend(directory: Path) -> None:
    """By the installed entry point alone, nothing of mbridge_rl being imported by the user."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_CI_ENV="1"):
        llm = LLM(
            str(directory / "llama_tied" / "A"),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
            weight_transfer_config=WeightTransferConfig(backend="mbridge"),
        )
    worker = llm.llm_engine.model_executor.driver_worker.worker
    assert type(worker.weight_transfer_engine).__name__ == "PlannedSyncEngine"
    announcement = Announcement.of(metadata_of(weights_of(directory, "llama_tied", "A")))
    (description,) = worker_calls.in_workers(llm, worker_calls.describe, announcement)
    assert set(description.landings) == {tensor.hf_name for tensor in announcement.tensors}
    with pytest.raises(EngineMismatch, match="fingerprint"):
        worker_calls.in_workers(llm, worker_calls.describe, replace(announcement, fingerprint="feed"))
    with pytest.raises(SyncError, match=r"takes weights by planned syncs \(mbridge_rl.WeightSync\)"):
        llm.init_weight_transfer_engine({"init_info": {}})


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
