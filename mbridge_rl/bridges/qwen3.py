"""Qwen3: queries and keys are normalised per head, head_dim is free, no biases."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def qwen3(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf, qk_norm=True), gated_mlp(hf))
