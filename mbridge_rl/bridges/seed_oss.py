"""Seed-OSS: Llama with biases on q, k, v, and a separate config field for the bias of the output projection."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def seed_oss(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf, output_bias=hf.attention_out_bias), gated_mlp(hf))
