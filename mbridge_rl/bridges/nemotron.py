"""Nemotron 4 and Minitron: layer norms whose weight is stored minus one, squared ReLU without a gate, half-rotated heads."""

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, plain_mlp
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule


def nemotron(hf: ConfigReader) -> ModelSpec:
    norms = Block({"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True})
    spec = decoder(hf, norms, attention(hf), plain_mlp(hf), partial_rotation=True)
    return replace(spec, rules=tuple(rule for weight in spec.rules for rule in (weight, *_norm_bias(weight))))


def _norm_bias(weight: Rule) -> list[Rule]:
    """The rule of the bias of a norm, from the rule of its weight; empty for other rules."""
    if "norm" not in weight.megatron_name:
        return []
    [part] = weight.parts
    megatron_name, hf_name = (name.removesuffix("weight") + "bias" for name in (weight.megatron_name, part.hf_name))
    return [replace(weight, megatron_name=megatron_name, parts=(replace(part, hf_name=hf_name),))]
