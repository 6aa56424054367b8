"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def qwen2(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf, qkv_bias=True), gated_mlp(hf))
