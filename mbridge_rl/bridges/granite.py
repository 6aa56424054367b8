"""Granite 3: Llama with multipliers on embeddings, attention scores, residual branches and logits."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp
from mbridge_rl.core.extras import EmbeddingScale, LogitScale, ResidualScale
from mbridge_rl.core.model import ModelSpec


def granite(hf: ConfigReader) -> ModelSpec:
    extras = (
        EmbeddingScale(hf.embedding_multiplier),
        ResidualScale(hf.residual_multiplier),
        LogitScale(1 / hf.logits_scaling),
    )
    scores = Block({"softmax_scale": hf.attention_multiplier})
    return decoder(hf, attention(hf), scores, gated_mlp(hf), extras=extras)
