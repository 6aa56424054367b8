"""GLM-4.7-Flash: DeepSeek's latent attention, sigmoid-routed experts beside shared ones in the layers that `mlp_layer_types`
calls sparse."""

from typing import Any

from mbridge_rl.bridges.blocks import decoder, gated_mlp
from mbridge_rl.bridges.experts import sigmoid_experts
from mbridge_rl.bridges.latent_attention import latent_attention
from mbridge_rl.bridges.prediction import with_prediction
from mbridge_rl.core.model import ModelSpec


def glm4_moe_lite(hf: Any) -> ModelSpec:
    dense, sparse = (tuple(i for i, kind in enumerate(hf.mlp_layer_types) if kind == wanted) for wanted in ("dense", "sparse"))
    attention, experts = latent_attention(hf), sigmoid_experts(hf, sparse)
    return with_prediction(hf, decoder(hf, attention, gated_mlp(hf).only_in(dense), *experts), (attention, *experts))
