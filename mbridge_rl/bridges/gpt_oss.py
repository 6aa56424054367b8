"""GPT-OSS: attention with sinks and, in every other layer, windows; biases everywhere; experts stacked in one tensor per layer,
transposed, with interleaved gate and up and a clamped SwiGLU (`(up + 1) * gate * sigmoid(alpha * gate)`)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block, attention, decoder
from mbridge_rl.bridges.blocks.experts import ROUTER, expert_config
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import EXPERT, Axis, HFPart, Rule, column_parallel, replicated


def gpt_oss(hf: ConfigReader) -> ModelSpec:
    hf.require("attention_bias", True)
    if hf.num_experts_per_tok == 1:
        raise hf.refuse(
            "num_experts_per_tok", "1, where the softmax over the chosen expert's logit says nothing; give 2 or more"
        )
    return decoder(hf, attention(hf), _sinks(hf), _experts(hf))


def _sinks(hf: ConfigReader) -> Block:
    megatron_prefix, hf_prefix = f"{MEGATRON_LAYER}.self_attention.core_attention.softmax_offset", f"{HF_LAYER}.self_attn.sinks"
    return Block({"softmax_type": "learnable"}, (column_parallel(megatron_prefix, {hf_prefix: hf.num_attention_heads}),))


def _experts(hf: ConfigReader) -> Block:
    h, f, experts = hf.hidden_size, hf.intermediate_size, hf.num_local_experts
    megatron_prefix, hf_prefix = f"{MEGATRON_LAYER}.mlp.experts", f"{HF_LAYER}.mlp.experts"
    expert = Axis(experts, index=EXPERT)
    rows, columns = Axis(f, along=0), Axis(f, along=1)
    gate_and_up = (Axis(2, start=0), Axis(2, start=1))
    gate_up = tuple(
        HFPart(f"{hf_prefix}.gate_up_proj", (expert, Axis(h, along=1), rows, half), (experts, h, 2 * f)) for half in gate_and_up
    )
    gate_up_bias = tuple(
        HFPart(f"{hf_prefix}.gate_up_proj_bias", (expert, rows, half), (experts, 2 * f)) for half in gate_and_up
    )
    down = HFPart(f"{hf_prefix}.down_proj", (expert, columns, Axis(h, along=0)))
    down_bias = HFPart(f"{hf_prefix}.down_proj_bias", (expert, Axis(h, along=0)))
    rules = (
        replicated(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", f"{HF_LAYER}.post_attention_layernorm.weight", (h,)),
        replicated(f"{ROUTER}.weight", f"{HF_LAYER}.mlp.router.weight", (experts, h)),
        replicated(f"{ROUTER}.bias", f"{HF_LAYER}.mlp.router.bias", (experts,)),
        Rule(f"{megatron_prefix}.linear_fc1.weight{{expert}}", gate_up, (0, h), axis="etp"),
        Rule(f"{megatron_prefix}.linear_fc1.bias{{expert}}", gate_up_bias, (0,), axis="etp"),
        Rule(f"{megatron_prefix}.linear_fc2.weight{{expert}}", (down,), (h, 0), dim=1, axis="etp"),
        Rule(f"{megatron_prefix}.linear_fc2.bias{{expert}}", (down_bias,), (0,)),
    )
    config = {
        **expert_config(hf, tuple(range(hf.num_hidden_layers)), experts=experts, ffn=f),
        "add_bias_linear": True,
        "activation_func": partial(quick_gelu, alpha=hf.swiglu_alpha),
        "bias_activation_fusion": False,
        "activation_func_clamp_value": hf.swiglu_limit,
        "glu_linear_offset": 1.0,
    }
    return Block(config, rules, num_experts=experts)


def quick_gelu(x: Tensor, alpha: float) -> Tensor:
    """`x * sigmoid(alpha * x)` (arXiv 1606.08415)."""
    return x * (alpha * x).sigmoid()
