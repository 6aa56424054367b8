"""GLM-4.5, 4.5-Air, 4.6 and 4.7: attention with biases on q, k and v and half-rotary positions, a few dense layers, then
sigmoid-routed experts beside shared ones."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import dense_then_sparse, sigmoid_experts
from mbridge_rl.bridges.blocks.prediction import with_prediction
from mbridge_rl.core.model import ModelSpec


def glm4_moe(hf: ConfigReader) -> ModelSpec:
    dense, sparse = dense_then_sparse(hf)
    heads, experts = attention(hf, output_bias=False, qk_norm=hf.use_qk_norm), sigmoid_experts(hf, sparse)
    return with_prediction(
        hf, decoder(hf, heads, gated_mlp(hf).only_in(dense), *experts, partial_rotation=True), (heads, *experts)
    )
