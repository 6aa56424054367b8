"""Published configs, shrunk: each is read, builds, gives its weights back bit for bit and computes Transformers' logits."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from published.checkpoint import NAMES, checkpoint, exported_and_logits, published_config
from published.shrink import LENGTH, VOCABULARY
from ranks import run_ranks
from tiny import assert_same_state, hf_state

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import FAMILIES
from mbridge_rl.core.errors import CheckpointError, LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout

# Other sizes of a model whose config is of the same kind: for the whole suite only.
MORE = [
    "Qwen--Qwen1.5-1.8B-Chat",
    "Qwen--Qwen2-0.5B",
    "Qwen--Qwen2.5-1.5B",
    "Qwen--Qwen2.5-32B",
    "Qwen--Qwen2.5-3B",
    "Qwen--Qwen2.5-VL-3B-Instruct",
    "Qwen--Qwen3-1.7B",
    "Qwen--Qwen3-8B",
    "Qwen--Qwen3-Coder-480B-A35B-Instruct",
    "Qwen--Qwen3-VL-2B-Instruct",
    "Qwen--Qwen3-VL-32B-Instruct",
    "Qwen--Qwen3-VL-4B-Instruct",
    "Qwen--Qwen3.5-122B-A10B",
    "Qwen--Qwen3.5-397B-A17B",
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0",
    "HuggingFaceTB--SmolLM2-135M",
    "allenai--OLMo-2-0325-32B",
    "google--gemma-2-27b-it",
    "google--gemma-3-27b-it",
    "meta-llama--Llama-2-70b-hf",
    "meta-llama--Llama-3.3-70B-Instruct",
    "mistralai--Mixtral-8x22B-v0.1",
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1",
    "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "nvidia--Nemotron-H-56B-Base-8K",
    "nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
    "microsoft--Phi-3.5-mini-instruct",
]

# Past every window and every length at which rotary positions change, and short of all.
BATCHES = [
    torch.randint(3, VOCABULARY // 2, (1, length), generator=torch.Generator().manual_seed(length))
    for length in (3 * LENGTH, LENGTH - 4)
]
# Of the logits' standard deviation. A sum of n fp32 products is off by n * 2^-24 of its size at most, here n <= 1,024, in each
# of several layers; typical is the root of it.
TOLERANCE = 1e-4

# Models whose config.json is refused, and what the message says.
REFUSED = {
    "DeepSeek-V3.2": ("DeepseekV32ForCausalLM", "deepseek_v32", "indexer"),
    "GLM-5": ("GlmMoeDsaForCausalLM", "glm_moe_dsa", "indexer"),
    "DeepSeek-V4-Pro": ("DeepseekV4ForCausalLM", "deepseek_v4", "no bridge for DeepseekV4ForCausalLM"),
    "Llama-4-Scout-17B-16E-Instruct": ("Llama4ForConditionalGeneration", "llama4", "attend within chunks"),
    "Ministral-3-3B-Instruct-2512": ("Mistral3ForConditionalGeneration", "mistral3", "directory of its text_config"),
    "gemma-4-26B-A4B": ("Gemma4ForConditionalGeneration", "gemma4", "no bridge for Gemma4ForConditionalGeneration"),
    "Kimi-K2.5": ("KimiK25ForConditionalGeneration", "kimi_k25", "no bridge for KimiK25ForConditionalGeneration"),
    "MiMo-V2-Flash": ("MiMoV2FlashForCausalLM", "mimo_v2_flash", "no bridge for MiMoV2FlashForCausalLM"),
    "MiMo-7B-Base": ("MiMoForCausalLM", "mimo", "mimo"),
    "MiniMax-M3": ("MiniMaxM3ForCausalLM", "minimax_m3", "minimax_m3"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in MORE else []) for name in NAMES])
def test_published(name: str, tmp_path: Path) -> None:
    reference = checkpoint(published_config(name), tmp_path)
    expected = hf_state(tmp_path)
    _assert_round_trips(AutoBridge.from_pretrained(tmp_path), expected)
    ((exported, logits),) = run_ranks(exported_and_logits, 1, tmp_path, BATCHES)
    assert_same_state(exported, expected)
    for tokens, computed in zip(BATCHES, logits, strict=True):
        with torch.no_grad():
            wanted = reference(tokens, use_cache=False).logits.float()
        assert wanted.std() > 0.02  # logits that differ enough for a comparison
        assert (computed - wanted).abs().max() < TOLERANCE * wanted.std()


def _assert_round_trips(bridge: AutoBridge, expected: dict[str, torch.Tensor]) -> None:
    """On virtual ranks: every layout that the model admits, of which there are some."""
    admitted = 0
    for tp, pp, ep in product((1, 2), (1, 2), (1, 2) if bridge.spec.num_experts else (1,)):
        layers = bridge.spec.num_layers
        layout = ParallelLayout(tp=tp, pp=pp, ep=ep, etp=1, dp=ep, stage_layers=(1, layers - 1) if pp == 2 else None)
        try:
            bridge.spec.validate(layout)
        except LayoutError:
            continue
        admitted += 1
        assert_same_state(bridge.unshard(bridge.shard(expected, layout), layout), expected)
    assert admitted >= 2


@pytest.mark.parametrize("name", NAMES)
def test_published_as_it_is(name: str, tmp_path: Path) -> None:
    """With what `checkpoint` leaves out: the quantization of the published weights."""
    config = published_config(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    bridge = AutoBridge.from_pretrained(tmp_path)
    assert bridge.spec.architecture == config["architectures"][0]


def test_every_family_is_there() -> None:
    """But for those of which no published config was at hand."""
    architectures = {published_config(name)["architectures"][0] for name in NAMES}
    assert set(FAMILIES) - architectures == {
        "MinistralForCausalLM",
        "NemotronH_Omni_Reasoning_V3",
        "Qwen3_5ForCausalLM",  # released with a vision tower only, as is the next
        "Qwen3_5MoeForCausalLM",
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    architecture, model_type, why = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": model_type}))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=why):
        AutoBridge.from_pretrained(tmp_path)
