"""OLMo 2: norms after attention and MLP instead of before; queries and keys are normalised over their whole projection."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp, output_norms, projection_norms
from mbridge_rl.core.model import ModelSpec


def olmo2(hf: ConfigReader) -> ModelSpec:
    return decoder(hf, attention(hf, norm=None), projection_norms(hf), gated_mlp(hf, norm=None), output_norms(hf))
