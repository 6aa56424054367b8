"""Llama 2 and 3.x: grouped-query attention without biases, gated MLP; tied in the small 3.2 models."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def llama(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf), gated_mlp(hf))
