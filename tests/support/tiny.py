"""Tiny random checkpoints of every family, with sizes that do not divide nicely."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

DENSE = {
    "vocab_size": 515,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}

# Everything that a family can vary, spread over its variants.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-tied": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 24, **EXPERTS}),
    "qwen3-moe-tied": (
        "Qwen3Moe",
        {"head_dim": 24, **EXPERTS, "mlp_only_layers": [], "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
}
# For single questions.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"head_dim": 24, "num_local_experts": 6, "intermediate_size": 32}),
}
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3-moe")


def logit_scale(hidden_size: int, *, tied: bool = False) -> float:
    """How large logits of these models get: four deviations of products of a normed state with random rows of the head."""
    return 4 * (0.5 if tied else 0.1) * math.sqrt(hidden_size)


def tiny_config(variant: str, **changes: Any) -> Any:
    """A Transformers config with its architecture named."""
    import transformers

    name, fields = (VARIANTS | OTHERS)[variant]
    config = getattr(transformers, f"{name}Config")(**{**DENSE, **fields, **changes})
    config.architectures = [f"{name}ForCausalLM"]
    return config


def tiny_model(variant: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A Transformers model in fp32 whose norms, biases and weights are all random."""
    import transformers

    config = tiny_config(variant, **changes)
    model = getattr(transformers, config.architectures[0])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if "embed" in name else 0.1))
    return model


def tiny_checkpoint(directory: Path, variant: str, seed: int = 0, **changes: Any) -> tuple[Path, nn.Module]:
    """Saves a tiny model by Transformers and returns where, and the model."""
    model = tiny_model(variant, seed, **changes)
    model.save_pretrained(directory)
    return directory, model


def hf_state(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, read by safetensors alone."""
    return {name: tensor for file in sorted(Path(directory).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Checks that both states have the same names, and tensors of the same dtype and bits under each."""
    assert state.keys() == expected.keys()
    different = [
        name for name in expected if state[name].dtype != expected[name].dtype or not torch.equal(state[name], expected[name])
    ]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:8]}"


@cache
def saved_model(variant: str, scratch: Path) -> Path:
    """Directory of the variant's checkpoint under `scratch`, written once."""
    tiny_model(variant).save_pretrained(scratch / variant)
    return scratch / variant
