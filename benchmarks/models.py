"""The two checkpoints of the benchmarks, with random weights: what matters is names, shapes and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.layout import ParallelLayout


@dataclass(frozen=True)
class Workload:
    """A model and how it is spread over four ranks."""

    name: str
    architecture: str
    config: dict[str, Any]
    layout: ParallelLayout


COMMON = {"tie_word_embeddings": False, "head_dim": 64, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1}
DENSE = Workload(
    "dense",
    "Qwen3",
    {
        **COMMON,
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    ParallelLayout(tp=2, pp=2),
)
MOE = Workload(
    "moe",
    "Qwen3Moe",
    {
        **COMMON,
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts": 64,
        "num_experts_per_tok": 4,
    },
    ParallelLayout(ep=2, pp=2, dp=2),
)
WORKLOADS = {workload.name: workload for workload in (DENSE, MOE)}


def checkpoint(workload: Workload, folder: Path) -> Path:
    """The bf16 checkpoint of `workload` below `folder`, made by Transformers if it is not there yet."""
    import transformers

    directory = folder / workload.name
    if (directory / "model.safetensors").exists():
        return directory
    config = getattr(transformers, f"{workload.architecture}Config")(**workload.config)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = getattr(transformers, f"{workload.architecture}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="50GB")
    return directory
