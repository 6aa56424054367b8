"""Qwen3: queries and keys are normalised per head, head_dim is free, no biases."""

from typing import Any

from mbridge_rl.bridges.blocks import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def qwen3(hf: Any) -> ModelSpec:
    return decoder(hf, attention(hf, qk_norm=True), gated_mlp(hf))
