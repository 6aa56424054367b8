"""Nemotron 4 and Minitron: layer norms whose weight is stored less one, squared ReLU without a gate, half-rotated heads."""

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
    """The bias beside a norm's weight."""
    if "norm" not in weight.megatron_name:
        return []
    [part] = weight.parts
    ours, theirs = (name.removesuffix("weight") + "bias" for name in (weight.megatron_name, part.hf_name))
    return [replace(weight, megatron_name=ours, parts=(replace(part, hf_name=theirs),))]
