"""Blocks that decoder families share. A block contains both halves of a bridge: the Megatron config fields that it sets and the
tensors that it maps. A family is a composition of blocks.

Sizes: `hidden` (h), `ffn` (f), `vocab`, query heads x head_dim (q), KV heads x head_dim (kv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.rope import rope
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import Extra, LinearBiases, NoInputNorms, OutputNorms, ProjectionNorm, RotaryScale
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import (
    Parts,
    Rule,
    column_parallel,
    grouped_parallel,
    renamed,
    replicated,
    row_parallel,
    stacked,
    vocabulary_parallel,
)

MEGATRON_LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Block:
    """Config fields, rules and extras that belong together. `rotates` marks an attention whose `config` fully describes its
    rotary positions (latent attention); otherwise they are described by the model."""

    config: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    num_experts: int | None = None
    rotates: bool = False
    extras: tuple[Extra, ...] = ()

    def only_in(self, layers: tuple[int, ...]) -> Block:
        """The same block, present in `layers` only."""
        return replace(self, rules=tuple(replace(rule, layers=layers) for rule in self.rules))

    def renamed(self, prefixes: Mapping[str, str]) -> Block:
        """The same block for a checkpoint with other names (`core.rules.renamed`)."""
        return replace(self, rules=renamed(self.rules, prefixes))


# Linear attention has its own blocks, which read in which layers it is.
_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention"}


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0) ** 2` (arXiv 2109.08668)."""
    return functional.relu(x).square()


# The functions in Megatron's (gated or plain) MLP, by Transformers' names of activations.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": squared_relu,
}


def decoder(hf: ConfigReader, *blocks: Block, extras: tuple[Extra, ...] = (), partial_rotation: bool = False) -> ModelSpec:
    """A decoder-only model with rotary positions: embeddings, `blocks` in every layer, final norm, output layer.

    Args:
        partial_rotation: whether the family rotates only the share of each head that `partial_rotary_factor` gives.
    """
    h, tied = hf.hidden_size, hf.tie_word_embeddings
    embedding = "model.embed_tokens.weight"
    output = embedding if tied else "lm_head.weight"
    vocab = (hf.vocab_size, h)
    rules = (
        vocabulary_parallel("embedding.word_embeddings.weight", embedding, vocab, placement="first_stage"),
        *(rule for block in blocks for rule in block.rules),
        replicated("decoder.final_layernorm.weight", "model.norm.weight", (h,), placement="last_stage"),
        vocabulary_parallel("output_layer.weight", output, vocab, placement="last_stage_copy" if tied else "last_stage"),
    )
    config: dict[str, Any] = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": h,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps if hf.declares("rms_norm_eps") else hf.norm_eps,
        "activation_func": activation(hf),
        "bias_activation_fusion": activation(hf) is functional.silu,  # Megatron fuses the others not, or differently
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "init_method_std": hf.initializer_range,
    }
    for block in blocks:
        config.update(block.config)
    positions, rotary = _positions(hf, blocks, config, partial_rotation)
    return ModelSpec(
        architecture=hf.architecture,
        num_layers=hf.num_hidden_layers,
        vocab_size=hf.vocab_size,
        tied_embeddings=tied,
        transformer_config=config,
        gpt_model={"max_sequence_length": hf.max_position_embeddings, **positions},
        rules=rules,
        num_experts=next((block.num_experts for block in blocks if block.num_experts), None),
        extras=(*(extra for block in blocks for extra in block.extras), *rotary, *extras),
        aliases={"lm_head.weight": embedding} if tied else {},
    )


def _positions(
    hf: ConfigReader, blocks: Sequence[Block], config: dict[str, Any], partial: bool
) -> tuple[dict[str, Any], tuple[Extra, ...]]:
    """The arguments of Megatron's `GPTModel`, and extras. A factor that applies to all attention scores becomes part of the
    softmax's scale, where it costs nothing."""
    if any(block.rotates for block in blocks):
        return {"position_embedding_type": "rope"}, ()
    dim = config["kv_channels"]
    rotary = rope(hf, dim, partial=partial)
    positions = {"position_embedding_type": "rope", "rotary_base": rotary.theta, "rotary_percent": rotary.percent}
    if rotary.score_factor == 1.0:
        return positions, rotary.extras
    if rotary.percent == 1.0 and "no_rope_freq" not in config:
        config["softmax_scale"] = config.get("softmax_scale", dim**-0.5) * rotary.score_factor
        return positions, rotary.extras
    return positions, (*rotary.extras, RotaryScale(rotary.score_factor, int(dim * rotary.percent)))


def activation(hf: ConfigReader) -> Callable[[Tensor], Tensor]:
    """The activation function that the config names.

    Raises:
        UnsupportedModelError: it is no function that Megatron's MLPs are known to compute like Transformers.
    """
    field = next(field for field in ("hidden_act", "hidden_activation", "mlp_hidden_act") if hf.declares(field))
    name = hf.get(field)
    if name not in _ACTIVATIONS:
        raise hf.refuse(field, f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def attention(
    hf: ConfigReader,
    *,
    qkv_bias: bool | None = None,
    output_bias: bool | None = None,
    qk_norm: bool = False,
    fused: str | None = None,
    norm: str | None = "input_layernorm",
) -> Block:
    """Grouped-query attention, its norm fused into QKV as Transformer Engine lays it out.

    Args:
        qkv_bias, output_bias: `None` takes the value of `attention_bias`, or no bias if the family's configs have no such
            field.
        fused: the HF tensor that stacks queries, keys and values; `None` if they are three tensors.
        norm: HF's norm before the attention, `None` for none.
    """
    biased = hf.get("attention_bias", False)
    qkv_bias, output_bias = biased if qkv_bias is None else qkv_bias, biased if output_bias is None else output_bias
    h, heads, kv_heads, dim = hf.hidden_size, hf.num_attention_heads, kv_heads_of(hf), head_dim(hf)
    megatron_prefix, hf_prefix = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    rules = _input_norm(f"{megatron_prefix}.linear_qkv", norm, h)
    weights = _parts(hf_prefix, "weight", sizes, fused, (h,))
    rules.append(grouped_parallel(f"{megatron_prefix}.linear_qkv.weight", weights, kv_heads, (h,)))
    if qkv_bias:
        rules.append(grouped_parallel(f"{megatron_prefix}.linear_qkv.bias", _parts(hf_prefix, "bias", sizes, fused), kv_heads))
    if qk_norm:
        rules += [
            replicated(f"{megatron_prefix}.q_layernorm.weight", f"{hf_prefix}.q_norm.weight", (dim,)),
            replicated(f"{megatron_prefix}.k_layernorm.weight", f"{hf_prefix}.k_norm.weight", (dim,)),
        ]
    rules.append(row_parallel(f"{megatron_prefix}.linear_proj.weight", f"{hf_prefix}.o_proj.weight", (h, heads * dim)))
    if output_bias:
        rules.append(replicated(f"{megatron_prefix}.linear_proj.bias", f"{hf_prefix}.o_proj.bias", (h,)))
    config = {
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": dim,
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": qk_norm,
        "attention_dropout": 0.0,  # for every config, since the trained policy must be the one that sampled
        **sliding_windows(hf),
    }
    extras = (LinearBiases(("linear_proj",)),) if output_bias else ()
    return Block(config, tuple(rules), extras=(*extras, *_no_norm(norm)))


def projection_norms(hf: ConfigReader) -> Block:
    """Norms of queries and keys over all heads together, to be combined with `attention`."""
    dim, megatron_prefix, hf_prefix = head_dim(hf), f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    rules = (
        replicated(f"{megatron_prefix}.q_layernorm.weight", f"{hf_prefix}.q_norm.weight", (hf.num_attention_heads * dim,)),
        replicated(f"{megatron_prefix}.k_layernorm.weight", f"{hf_prefix}.k_norm.weight", (kv_heads_of(hf) * dim,)),
    )
    return Block({"qk_layernorm": True}, rules, extras=(ProjectionNorm(hf.rms_norm_eps),))


def sliding_windows(hf: ConfigReader) -> dict[str, Any]:
    """Megatron's fields for attention to only the last `sliding_window` tokens: in all layers, or in those that `layer_types`
    names. A family whose configs lack `sliding_window` has no windows, and one whose configs lack `layer_types` has them in all
    layers. Other fields about windows have no effect beside these two, since Transformers' classes have copied their values
    into them.

    Raises:
        UnsupportedModelError: a layer has another kind of attention.
    """
    hf.ignore("use_sliding_window", "max_window_layers", "sliding_window_pattern")
    layer_types, window = hf.get("layer_types"), hf.get("sliding_window")
    if layer_types and len(layer_types) != hf.num_hidden_layers:
        raise CheckpointError(
            f"{hf.architecture}: layer_types has {len(layer_types)} entries; expected num_hidden_layers={hf.num_hidden_layers}"
        )
    if unknown := set(layer_types or ()) - _LAYER_TYPES:
        raise hf.refuse("layer_types", f"{sorted(unknown)[0]} is not supported; supported: {', '.join(sorted(_LAYER_TYPES))}")
    windowed = [int(kind == "sliding_attention") for kind in layer_types or ["sliding_attention"] * hf.num_hidden_layers]
    if not any(windowed):
        return {}
    if not window:
        if layer_types or window == 0:
            raise hf.refuse("sliding_window", f"{window}, though layers have windows; give their size")
        return {}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": windowed}


def gated_mlp(
    hf: ConfigReader, *, bias: bool | None = None, fused: str | None = None, norm: str | None = "post_attention_layernorm"
) -> Block:
    """`down(silu(gate(x)) * up(x))`, its norm fused into the first linear.

    Args:
        bias: `None` takes the value of `mlp_bias`, or no bias if the family's configs have no such field.
        fused: the HF tensor that stacks gate and up; `None` if they are two tensors.
        norm: HF's norm before the MLP, `None` for none.
    """
    f = hf.intermediate_size
    return _mlp(hf, {"gate_proj": f, "up_proj": f}, bias, fused, norm)


def plain_mlp(hf: ConfigReader, *, bias: bool | None = None, norm: str | None = "post_attention_layernorm") -> Block:
    """`down(act(up(x)))`, its norm fused into the first linear; takes the arguments of `gated_mlp`."""
    block = _mlp(hf, {"up_proj": hf.intermediate_size}, bias, None, norm)
    return replace(block, config={**block.config, "gated_linear_unit": False})


def _mlp(hf: ConfigReader, sizes: dict[str, int], bias: bool | None, fused: str | None, norm: str | None) -> Block:
    bias = hf.get("mlp_bias", False) if bias is None else bias
    h, f = hf.hidden_size, hf.intermediate_size
    megatron_prefix, hf_prefix = f"{MEGATRON_LAYER}.mlp", f"{HF_LAYER}.mlp"
    rules = _input_norm(f"{megatron_prefix}.linear_fc1", norm, h)
    rules.append(column_parallel(f"{megatron_prefix}.linear_fc1.weight", _parts(hf_prefix, "weight", sizes, fused, (h,)), (h,)))
    if bias:
        rules.append(column_parallel(f"{megatron_prefix}.linear_fc1.bias", _parts(hf_prefix, "bias", sizes, fused)))
    rules.append(row_parallel(f"{megatron_prefix}.linear_fc2.weight", f"{hf_prefix}.down_proj.weight", (h, f)))
    if bias:
        rules.append(replicated(f"{megatron_prefix}.linear_fc2.bias", f"{hf_prefix}.down_proj.bias", (h,)))
    extras = (LinearBiases(("linear_fc1", "linear_fc2")),) if bias else ()
    return Block({"ffn_hidden_size": f}, tuple(rules), extras=(*extras, *_no_norm(norm)))


def output_norms(
    hf: ConfigReader, attention: str = "post_attention_layernorm", mlp: str = "post_feedforward_layernorm"
) -> Block:
    """Norms of the outputs of attention and MLP, with HF's names."""
    names = {"post_self_attn_layernorm": attention, "post_mlp_layernorm": mlp}
    rules = [
        replicated(f"{MEGATRON_LAYER}.{megatron_norm}.weight", f"{HF_LAYER}.{hf_norm}.weight", (hf.hidden_size,))
        for megatron_norm, hf_norm in names.items()
    ]
    return Block(rules=tuple(rules), extras=(OutputNorms(),))


def _parts(module: str, kind: str, sizes: dict[str, int], fused: str | None, inner: Sequence[int] = ()) -> Parts:
    if fused:
        return stacked(f"{module}.{fused}.{kind}", list(sizes.values()), inner)
    return {f"{module}.{name}.{kind}": size for name, size in sizes.items()}


def _input_norm(linear: str, norm: str | None, hidden: int) -> list[Rule]:
    return [replicated(f"{linear}.layer_norm_weight", f"{HF_LAYER}.{norm}.weight", (hidden,))] if norm else []


def _no_norm(norm: str | None) -> tuple[Extra, ...]:
    return () if norm else (NoInputNorms(),)


def head_dim(hf: ConfigReader) -> int:
    """The size of a head. Every model of Transformers reads `head_dim`, even if its config class does not declare it."""
    dim = hf.undeclared("head_dim")
    if dim is None and hf.hidden_size % hf.num_attention_heads:
        raise CheckpointError(
            f"{hf.architecture}: hidden_size={hf.hidden_size} does not divide by num_attention_heads={hf.num_attention_heads}; "
            "expected a multiple, or a head_dim"
        )
    return dim or hf.hidden_size // hf.num_attention_heads


def kv_heads_of(hf: ConfigReader) -> int:
    heads = hf.num_key_value_heads or hf.num_attention_heads
    if hf.num_attention_heads % heads:
        raise CheckpointError(
            f"{hf.architecture}: num_key_value_heads={heads}; expected a divisor of "
            f"num_attention_heads={hf.num_attention_heads}"
        )
    return heads
