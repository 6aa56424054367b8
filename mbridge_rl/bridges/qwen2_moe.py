"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 attention; experts, and a shared expert with a gate, in every `decoder_sparse_step`-th layer
except `mlp_only_layers`."""

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.bridges.blocks.experts import ExpertNames, gated_experts, shared_experts
from mbridge_rl.bridges.qwen3_moe import layers_with_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec

_NAMES = ExpertNames(shared="shared_expert")


def qwen2_moe(hf: ConfigReader) -> ModelSpec:
    sparse, dense = layers_with_experts(hf)
    routing = Routing(normalized=hf.norm_topk_prob)
    return decoder(
        hf,
        attention(hf, qkv_bias=hf.qkv_bias),
        gated_mlp(hf).only_in(dense),
        gated_experts(hf, sparse, routing, experts=hf.num_experts, ffn=hf.moe_intermediate_size),
        shared_experts(hf, sparse, hf.shared_expert_intermediate_size, names=_NAMES, gate="shared_expert_gate"),
    )
