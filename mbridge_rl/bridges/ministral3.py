"""Ministral 3, text: Mistral with YaRN and queries scaled by their position."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader, rope_value
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.extras import QueryScaleByPosition
from mbridge_rl.core.model import ModelSpec


def ministral3(hf: ConfigReader) -> ModelSpec:
    rope = hf.rope_parameters
    original = rope_value(hf, rope, "original_max_position_embeddings", ...)
    scale = QueryScaleByPosition(rope_value(hf, rope, "llama_4_scaling_beta", ...), original)
    return decoder(hf, attention(hf), gated_mlp(hf), extras=(scale,))
