"""Falcon-H1: attention and a Mamba-2 mixer side by side in every layer, and a fixed factor at nearly every projection (muP)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block, attention, decoder, gated_mlp, head_dim
from mbridge_rl.bridges.blocks.mamba import MambaSizes, mamba
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import EmbeddingScale, LogitScale, MambaBesideAttention, MlpScale
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import column_parallel

_NAMES = {
    "model.norm.": "model.final_layernorm.",
    f"{HF_LAYER}.mlp.": f"{HF_LAYER}.feed_forward.",
    f"{HF_LAYER}.post_attention_layernorm.": f"{HF_LAYER}.pre_ff_layernorm.",
}


def falcon_h1(hf: ConfigReader) -> ModelSpec:
    for name, count in {"mlp_multipliers": 2, "ssm_multipliers": 5}.items():
        if len(hf.get(name)) != count:
            raise CheckpointError(f"{hf.architecture}: {name}={hf.get(name)}; expected {count} numbers")
    gate_factor, output_factor = hf.mlp_multipliers
    gate = Block({"activation_func": ScaledSilu(gate_factor), "bias_activation_fusion": False})
    extras = (EmbeddingScale(hf.embedding_multiplier), LogitScale(hf.lm_head_multiplier), MlpScale(output_factor))
    return decoder(hf, *_mixers(hf), gated_mlp(hf), gate, extras=extras).renamed(_NAMES)


@dataclass(frozen=True)
class ScaledSilu:
    """`silu(factor * x)`."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.silu(x * self.factor)


def _mixers(hf: ConfigReader) -> tuple[Block, Block]:
    sizes = _sizes(hf)
    megatron_prefix, hf_prefix, inner = f"{MEGATRON_LAYER}.self_attention.mamba", f"{HF_LAYER}.mamba", sizes.convolved["x"]
    mixer = mamba(hf.hidden_size, sizes, megatron_prefix, hf_prefix)
    hf.ignore("mamba_norm_before_gate", "mamba_d_ssm", "mamba_expand", "mamba_chunk_size")
    if hf.mamba_rms_norm:
        # These values are fixed in Megatron's mixer.
        hf.require("mamba_norm_before_gate", False)
        hf.require("rms_norm_eps", 1e-5)
        norm = column_parallel(f"{megatron_prefix}.norm.weight", {f"{hf_prefix}.norm.weight": inner})
        mixer = replace(mixer, rules=(*mixer.rules, norm))
    factors = [hf.ssm_in_multiplier * factor for factor in hf.ssm_multipliers]
    beside = MambaBesideAttention(
        normalized=hf.mamba_rms_norm,
        attention_factor=hf.attention_in_multiplier * hf.attention_out_multiplier,
        mamba_factor=hf.ssm_out_multiplier,
        projected=tuple(zip(sizes.projected.values(), factors, strict=True)),
    )
    return _attention(hf), replace(mixer, extras=(beside,))


def _attention(hf: ConfigReader) -> Block:
    """Attention in which the factors of queries, keys and values are moved to the scores and to the output, which are linear in
    them."""
    norm = f"{MEGATRON_LAYER}.input_layernorm.weight"
    block = attention(hf)
    rules = tuple(
        replace(rule, megatron_name=norm) if rule.megatron_name.endswith(".layer_norm_weight") else rule for rule in block.rules
    )
    hf.require("attention_bias", False)  # a bias would not be multiplied by the factors
    scale = head_dim(hf) ** -0.5 * hf.attention_in_multiplier**2 * hf.key_multiplier
    return replace(block, rules=rules, config={**block.config, "softmax_scale": scale})


def _sizes(hf: ConfigReader) -> MambaSizes:
    for name, expected in {"mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False, "hidden_act": "silu"}.items():
        hf.require(name, expected)
    hf.require("projectors_bias", False)
    hf.require("time_step_limit", (0.0, float("inf")))
    return MambaSizes(hf.mamba_n_heads, hf.mamba_d_head, hf.mamba_n_groups, hf.mamba_d_state, hf.mamba_d_conv)
