"""GLM-4.7-Flash: DeepSeek's latent attention, sigmoid-routed experts beside shared ones in the layers that `mlp_layer_types`
calls sparse."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import sigmoid_experts
from mbridge_rl.bridges.blocks.latent_attention import latent_attention
from mbridge_rl.bridges.blocks.prediction import with_prediction
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import ModelSpec


def glm4_moe_lite(hf: ConfigReader) -> ModelSpec:
    kinds = hf.mlp_layer_types
    if len(kinds) != hf.num_hidden_layers or set(kinds) - {"dense", "sparse"}:
        raise CheckpointError(
            f"{hf.architecture}: mlp_layer_types={kinds}; expected dense or sparse for each of {hf.num_hidden_layers} layers"
        )
    dense, sparse = (tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in ("dense", "sparse"))
    attention, experts = latent_attention(hf), sigmoid_experts(hf, sparse)
    return with_prediction(hf, decoder(hf, attention, gated_mlp(hf).only_in(dense), *experts), (attention, *experts))
