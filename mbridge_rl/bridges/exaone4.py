"""EXAONE 4: norms after attention and MLP instead of before, normalised queries and keys; in the 32B model full-attention
layers have no positions, and the others have a sliding window."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp, output_norms
from mbridge_rl.core.model import ModelSpec


def exaone4(hf: ConfigReader) -> ModelSpec:
    unrotated = [int(hf.sliding_window is not None and kind == "full_attention") for kind in hf.layer_types]
    positions = Block({"no_rope_freq": unrotated} if any(unrotated) else {})
    blocks = (attention(hf, qk_norm=True, norm=None), positions, gated_mlp(hf, norm=None), output_norms(hf))
    return decoder(hf, *blocks)
