"""ERNIE 4.5, dense: Llama whose rotation pairs neighbouring channels; one switch for all biases."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def ernie4_5(hf: ConfigReader) -> ModelSpec:
    bias, neighbours = bool(hf.use_bias), Block({"rotary_interleaved": True})
    return decoder(hf, attention(hf, qkv_bias=bias, output_bias=bias), neighbours, gated_mlp(hf, bias=bias))
