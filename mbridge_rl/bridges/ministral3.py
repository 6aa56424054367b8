"""Ministral 3, text: Mistral with YaRN and queries scaled by their position."""

from typing import Any

from mbridge_rl.bridges.blocks import attention, decoder, gated_mlp
from mbridge_rl.core.extras import QueryScaleByPosition
from mbridge_rl.core.model import ModelSpec


def ministral3(hf: Any) -> ModelSpec:
    rope = hf.rope_parameters
    scale = QueryScaleByPosition(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return decoder(hf, attention(hf), gated_mlp(hf), extras=(scale,))
