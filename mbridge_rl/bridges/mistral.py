"""Mistral 7B and Ministral 8B: Llama with sliding windows in all layers or in some."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def mistral(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf), gated_mlp(hf))
