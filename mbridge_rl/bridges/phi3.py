"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k, v in one tensor and gate, up in another; LongRoPE, partial in Phi-4 mini.

LongRoPE's long factors apply if a micro-batch has a sequence beyond the original length, as in Transformers. vLLM applies them
to all sequences if its `max_model_len` is larger; to train with such an engine, set the config's `short_factor` to its
`long_factor`.
"""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.core.model import ModelSpec


def phi3(hf: ConfigReader) -> ModelSpec:
    hf.ignore("original_max_position_embeddings")  # Transformers' class has copied it into rope_parameters
    return decoder(hf, attention(hf, fused="qkv_proj"), gated_mlp(hf, fused="gate_up_proj"), partial_rotation=True)
