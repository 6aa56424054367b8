"""Llama 2 and 3.x: grouped-query attention without biases, gated MLP; tied in the small 3.2 models."""

from typing import Any

from mbridge_rl.bridges.blocks import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def llama(hf: Any) -> ModelSpec:
    return decoder(hf, attention(hf), gated_mlp(hf))
