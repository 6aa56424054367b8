"""A reference for Llama-Nemotron, of which Transformers has no class: Llama's own layers, each of its own sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mbridge_rl.hf.nemotron_nas import NemotronNasConfig


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = NemotronNasConfig

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([_layer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


def _layer(config: NemotronNasConfig, index: int) -> nn.Module:
    block, of_layer = config.block_configs[index], copy.copy(config)
    if not block.attention.no_op:
        of_layer.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
    if not block.ffn.no_op:
        size = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
        of_layer.intermediate_size = size + -size % 256
    layer = LlamaDecoderLayer(of_layer, index)
    if block.attention.no_op:
        layer.input_layernorm, layer.self_attn = nn.Identity(), _NoAttention()
    if block.ffn.no_op:
        layer.post_attention_layernorm, layer.mlp = nn.Identity(), _Nothing()
    return layer


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _Nothing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
