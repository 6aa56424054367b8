"""Checkpoints, engines and a sender: what the scenarios of `refit_scenarios.py` are played with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mbridge_rl.core.digest import digest
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.vllm import worker_calls
from mbridge_rl.sync.vllm.compatibility import config_summary
from mbridge_rl.sync.vllm.engine import Completion, InProcessEngine

PROMPTS = [[5, 9, 33, 100, 514], [11, 22, 33, 44, 55, 66, 77, 514], [400]]
FAMILIES = ("qwen3", "llama_tied", "qwen2_tied", "qwen3_moe")
VOCABULARY = 515  # odd, so that vLLM pads it


def make_checkpoints(directory: Path) -> None:
    """Two random checkpoints, A and B, of each family."""
    import transformers

    dense: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=192,  # heads of 32: the smallest that vLLM computes on a CPU
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    experts = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, decoder_sparse_step=1)
    configs = {
        "qwen3": transformers.Qwen3Config(**dense, head_dim=32),
        "llama_tied": transformers.LlamaConfig(**dense | {"tie_word_embeddings": True}),
        "qwen2_tied": transformers.Qwen2Config(**dense | {"tie_word_embeddings": True}),  # its attention has biases
        "qwen3_moe": transformers.Qwen3MoeConfig(**dense, **experts, head_dim=32),
    }
    for name, config in configs.items():
        for seed, tag in enumerate("AB"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            _randomize(model, seed)
            model.save_pretrained(directory / name / tag)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that logits differ, and no parameter at its neutral initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if "embed" in name else 1.2 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise if parameter.ndim > 1 else float("norm" in name) + 0.2 * noise)


# What the interpreter keeps between scenarios: engines are started once.


@cache
def engine_of(directory: Path, family: str) -> InProcessEngine:
    return InProcessEngine(directory / family / "A", max_model_len=64, max_num_seqs=8)


@cache
def weights_of(directory: Path, family: str, tag: str) -> dict[str, Tensor]:
    return load_file(directory / family / tag / "model.safetensors")


@cache
def fresh_completions(directory: Path, family: str, tag: str) -> list[Completion]:
    with InProcessEngine(directory / family / tag, max_model_len=64, max_num_seqs=8) as engine:
        return greedy(engine)


def metadata_of(weights: dict[str, Tensor]) -> list[HFTensor]:
    return [HFTensor(hf_name, tensor.dtype, tuple(tensor.shape)) for hf_name, tensor in weights.items()]


def config_of(directory: Path, family: str) -> dict[str, Any]:
    import transformers

    return config_summary(transformers.AutoConfig.from_pretrained(directory / family / "A"))


def greedy(engine: Any) -> list[Completion]:
    return engine.generate(PROMPTS, temperature=0.0, max_tokens=12, ignore_eos=True)


def without_versions(completions: list[Completion]) -> list[tuple[list[int], list[float]]]:
    return [(completion.tokens, completion.logprobs) for completion in completions]


def prepared(directory: Path, family: str) -> InProcessEngine:
    engine = engine_of(directory, family)
    engine.prepare(metadata_of(weights_of(directory, family, "A")), config_of(directory, family))
    return engine


def parameters_of(engine: InProcessEngine) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in engine.receiver.model.named_parameters()}


def assert_serves(engine: Any, directory: Path, family: str, tag: str) -> None:
    """Greedy tokens and log-probs are exactly those of an engine started from that checkpoint."""
    assert without_versions(greedy(engine)) == without_versions(fresh_completions(directory, family, tag))


@dataclass
class TensorBatch:
    """Copies of some tensors, which a test may spoil, and the digests that they should have."""

    tensors: list[tuple[str, Tensor]]
    digests: dict[str, int]

    @property
    def names(self) -> list[str]:
        return [hf_name for hf_name, _ in self.tensors]

    def flip(self, index: int, bit: int) -> None:
        self.tensors[index][1].view(-1).view(torch.uint8)[0] ^= bit


class Sender:
    """Whole tensors from this process, batch by batch, as `InProcessEngine.refit` hands them over."""

    def __init__(self, engine: InProcessEngine, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
        self.engine = engine
        engine.prepare(metadata_of(weights), config)

    def batches(self, weights: dict[str, Tensor], size: int, seed: int = 0) -> list[TensorBatch]:
        """Of `size` tensors in random order: qkv and experts fall apart."""
        order = list(weights)
        random.Random(seed).shuffle(order)
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        return [
            TensorBatch([(name, weights[name].clone()) for name in part], {name: digest(weights[name]) for name in part})
            for part in parts
        ]

    def send(self, batch: TensorBatch, version: int) -> None:
        self.engine._in_workers(worker_calls.receive, version, batch.tensors, batch.digests)
        for _, tensor in batch.tensors:
            tensor.fill_(7.0)  # a trainer uses the memory again

    def sync(self, weights: dict[str, Tensor], version: int, size: int = 1000, seed: int = 0) -> dict[str, Any]:
        self.engine.start_weight_update()
        for batch in self.batches(weights, size, seed):
            self.send(batch, version)
        return self.engine.finish_weight_update(str(version))
