"""Gemma 1, 2 and 3 (text): embeddings scaled by the square root of their size, norms whose weight is stored minus one, GELU
gates.

Gemma 2 and 3 also normalise the outputs of attention and MLP, and mix windowed layers with full ones. Gemma 2 caps attention
scores and logits; Gemma 3 normalises queries and keys and rotates its windowed layers with another base.
"""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp, output_norms
from mbridge_rl.core.extras import AttentionSoftcap, EmbeddingScale, Extra, LogitSoftcap
from mbridge_rl.core.model import ModelSpec


def gemma(hf: ConfigReader) -> ModelSpec:
    return _gemma(hf, attention(hf), gated_mlp(hf))


def gemma2(hf: ConfigReader) -> ModelSpec:
    caps: list[Extra] = [AttentionSoftcap(hf.attn_logit_softcapping)] if hf.attn_logit_softcapping else []
    return _sandwich(hf, attention(hf), *caps)


def gemma3(hf: ConfigReader) -> ModelSpec:
    hf.require("attn_logit_softcapping", None)  # Transformers' config declares it, but its model ignores it
    return _sandwich(hf, attention(hf, qk_norm=True))


def _sandwich(hf: ConfigReader, attention: Block, *caps: Extra) -> ModelSpec:
    scores = Block({"softmax_scale": hf.query_pre_attn_scalar**-0.5})
    if hf.final_logit_softcapping:
        caps = (*caps, LogitSoftcap(hf.final_logit_softcapping))
    return _gemma(hf, attention, scores, gated_mlp(hf, norm="pre_feedforward_layernorm"), output_norms(hf), extras=caps)


def _gemma(hf: ConfigReader, *blocks: Block, extras: tuple[Extra, ...] = ()) -> ModelSpec:
    hf.require("use_bidirectional_attention", None, False)
    norms = Block({"layernorm_zero_centered_gamma": True})
    return decoder(hf, norms, *blocks, extras=(EmbeddingScale(hf.hidden_size**0.5), *extras))
