"""Gemma 1, 2 and 3 (text): embeddings scaled by the root of their size, norms whose weight is stored less one, GELU gates.

Gemma 2 and 3 normalise what attention and MLP add to the residual stream too, and mix windowed layers with full ones. Gemma 2
caps attention scores and logits; Gemma 3 normalises queries and keys and rotates its windowed layers with a base of their own.
"""

from typing import Any

from mbridge_rl.bridges.blocks import Block, attention, decoder, gated_mlp, output_norms
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.extras import AttentionSoftcap, EmbeddingScale, Extra, LogitSoftcap
from mbridge_rl.core.model import ModelSpec


def gemma(hf: Any) -> ModelSpec:
    return _gemma(hf, attention(hf), gated_mlp(hf))


def gemma2(hf: Any) -> ModelSpec:
    return _sandwich(hf, attention(hf))


def gemma3(hf: Any) -> ModelSpec:
    return _sandwich(hf, attention(hf, qk_norm=True))


def _sandwich(hf: Any, attention: Block) -> ModelSpec:
    scores = Block({"softmax_scale": hf.query_pre_attn_scalar**-0.5})
    caps: list[Extra] = []
    if hf.attn_logit_softcapping:
        caps.append(AttentionSoftcap(hf.attn_logit_softcapping))
    if hf.final_logit_softcapping:
        caps.append(LogitSoftcap(hf.final_logit_softcapping))
    return _gemma(hf, attention, scores, gated_mlp(hf, norm="pre_feedforward_layernorm"), output_norms(hf), extras=tuple(caps))


def _gemma(hf: Any, *blocks: Block, extras: tuple[Extra, ...] = ()) -> ModelSpec:
    if hf.use_bidirectional_attention:
        raise UnsupportedModelError(f"{hf.architectures[0]}: use_bidirectional_attention is not supported; attention is causal")
    norms = Block({"layernorm_zero_centered_gamma": True})
    return decoder(hf, norms, *blocks, extras=(EmbeddingScale(hf.hidden_size**0.5), *extras))
