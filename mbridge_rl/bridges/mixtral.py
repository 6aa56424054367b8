"""Mixtral: Mistral's attention, softmax-routed experts in every layer."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder
from mbridge_rl.bridges.blocks.experts import MIXTRAL_NAMES, gated_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def mixtral(hf: ConfigReader) -> ModelSpec:
    layers = tuple(range(hf.num_hidden_layers))
    experts = gated_experts(hf, layers, Routing(), experts=hf.num_local_experts, ffn=hf.intermediate_size, names=MIXTRAL_NAMES)
    return decoder(hf, attention(hf), experts)
