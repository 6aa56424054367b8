"""Tiny DeepSeek-V3 and Kimi-K2 models: their configs and random checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from tiny import DENSE
from torch import nn

TINY = {
    **DENSE,
    "max_position_embeddings": 40960,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 24,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}


# Every field moves the logits of these models by far more than the tolerance; with fewer dimensions or positions YaRN's ramp
# would round to the same for many values.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 1024,
}


VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"rope_parameters": YARN},
    "kimi": {
        "rope_parameters": {**YARN, "beta_fast": 1, "mscale": 1.0},
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "full-rank-queries": {"q_lora_rank": None},
    "yarn-without-mscale": {"rope_parameters": {name: YARN[name] for name in YARN if "mscale" not in name}},
}


def config(variant: str, **changes: Any) -> Any:
    from transformers import DeepseekV3Config

    made = DeepseekV3Config(**{**TINY, **VARIANTS[variant], **changes})
    made.architectures = ["DeepseekV3ForCausalLM"]
    return made


def checkpoint(directory: Path, variant: str, seed: int = 1, **changes: Any) -> nn.Module:
    """Random in every tensor, expert biases included, which decide the routing."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(config(variant, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "inv_freq" not in name:
                tensor.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if "embed" in name else 0.1))
    model.save_pretrained(directory)
    return model
