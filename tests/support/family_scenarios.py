"""What `test_families.py` plays in other processes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from families.family import VOCABULARY
from tolerance import assert_near
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel

PROMPTS = [[5, 9, 33, 100, 514], [11, 22, 33, 44, 55, 66, 77, 514], [400]]


def there_and_back(rank: int, directory: Path, layout: ParallelLayout, tokens: Tensor) -> tuple[dict[str, Tensor], Any]:
    """What this rank exports, and its logits; the checkpoint is saved again beside."""
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    exported = dict(bridge.export_weights(model, bucket_bytes=1 << 17))
    bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << 19)
    return exported, forward_logits(model, tokens)


def adapted_logits(rank: int, directory: Path, targets: tuple[str, ...], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with random adapters and without; the merged checkpoint is saved."""
    from mbridge_rl.megatron.lora.attach import LoRAConfig, adapted_modules, add_lora

    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model()
    bridge.load_weights(model)
    base = forward_logits(model, tokens)
    add_lora(model, LoRAConfig(rank=3, alpha=6.0, targets=targets))
    generator = torch.Generator().manual_seed(3)
    for _, module in adapted_modules(model):
        module.lora_b.data.copy_(0.1 * torch.randn(module.lora_b.shape, generator=generator))
    bridge.save_pretrained(model, directory / "merged")
    return forward_logits(model, tokens), base


def refit_equals_fresh_engine(directory: Path, options: dict[str, Any], mtp: bool = False) -> list[Any]:
    """Refits an engine of checkpoint A to B, with Megatron and vLLM in one process, and compares it with an engine of B."""
    from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
    from mbridge_rl.sync.weight_sync import WeightSync

    _know_in_process(AutoBridge.from_pretrained(directory / "A").hf_config.architectures[0])
    limits = {"max_model_len": 64, "max_num_seqs": 8, "dtype": "float32", **options}
    dtype = getattr(torch, limits["dtype"])
    gc.freeze()  # vLLM collects garbage at every step of a start, each time through all that was imported: 3 of 5 seconds
    with InProcessEngine(directory / "A", **limits) as engine:
        initialize_parallel(ParallelLayout())
        try:
            bridge = AutoBridge.from_pretrained(directory / "B", mtp=mtp)
            model = bridge.build_model(dtype=dtype)
            bridge.load_weights(model)
            before = _greedy(engine)
            sync = WeightSync(bridge, model, engine)
            sync.sync(1)
            sync.close()
        finally:
            destroy_parallel()
        refitted = _greedy(engine)
    gc.freeze()
    with InProcessEngine(directory / "B", weight_version=1, **limits) as fresh:
        expected = _greedy(fresh)
    assert [completion.logprobs for completion in before] != [completion.logprobs for completion in refitted]
    for ours, theirs in zip(refitted, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logprobs == theirs.logprobs  # the same bits in the same kernels
    return refitted


def greedy_of_engine(directory: Path, options: dict[str, Any]) -> list[Any]:
    """What an engine of `directory` says to the prompts."""
    from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine

    _know_in_process(AutoBridge.from_pretrained(directory).hf_config.architectures[0])
    limits = {"max_model_len": 64, "max_num_seqs": 8, "dtype": "float32", **options}
    gc.freeze()
    with InProcessEngine(directory, **limits) as engine:
        return _greedy(engine)


def _know_in_process(architecture: str) -> None:
    """vLLM asks each model class what it can in a process of its own, which takes seconds; here it may be imported. An
    architecture that it does not list runs in Transformers' class."""
    from vllm import ModelRegistry

    if architecture in ModelRegistry.models:
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def _greedy(engine: Any) -> list[Any]:
    return engine.generate(PROMPTS, temperature=0.0, max_tokens=8, ignore_eos=True)


TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def assert_close_logits(logits: Any, reference: torch.nn.Module, tolerance: float) -> None:
    with torch.no_grad():
        wanted = reference(TOKENS, use_cache=False).logits.float()
    assert logits.shape == wanted.shape
    assert wanted.std() > 0.05  # logits that differ enough for a comparison
    assert_near(logits, wanted, tolerance, what="logits")
