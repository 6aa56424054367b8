"""OLMoE: queries and keys are normalised over their whole projection; softmax-routed experts in every layer."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, projection_norms
from mbridge_rl.bridges.blocks.experts import gated_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def olmoe(hf: ConfigReader) -> ModelSpec:
    hf.require("clip_qkv", None)
    layers = tuple(range(hf.num_hidden_layers))
    routing = Routing(normalized=hf.norm_topk_prob)
    experts = gated_experts(hf, layers, routing, experts=hf.num_experts, ffn=hf.intermediate_size)
    return decoder(hf, attention(hf), projection_norms(hf), experts)
