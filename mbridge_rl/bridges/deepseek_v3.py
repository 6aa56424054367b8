"""DeepSeek-V3, R1, Moonlight, Kimi-K2: latent attention, a few dense layers, then sigmoid-routed experts beside shared ones."""

from __future__ import annotations

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import dense_then_sparse, sigmoid_experts
from mbridge_rl.bridges.blocks.latent_attention import latent_attention
from mbridge_rl.bridges.blocks.prediction import with_prediction
from mbridge_rl.core.model import ModelSpec


def deepseek_v3(hf: ConfigReader) -> ModelSpec:
    hf.require("moe_layer_freq", 1)
    dense, sparse = dense_then_sparse(hf)
    attention, experts = latent_attention(hf), sigmoid_experts(hf, sparse)
    return with_prediction(hf, decoder(hf, attention, gated_mlp(hf).only_in(dense), *experts), (attention, *experts))
