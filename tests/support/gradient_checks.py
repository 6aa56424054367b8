"""Gradients of Transformers' models, under the names that checkpoints have."""

from __future__ import annotations

from torch import Tensor


def experts_apart(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers stacks the experts in memory; checkpoints have them one by one."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    apart = {}
    for hf_name, gradient in gradients.items():
        prefix, _, last = hf_name.rpartition(".")
        if not prefix.endswith(".experts"):
            apart[hf_name] = gradient
            continue
        for expert, stacked in enumerate(gradient):
            for name, part in zip(names[last], stacked.chunk(len(names[last])), strict=True):
                apart[f"{prefix}.{expert}.{name}.weight"] = part
    return apart
