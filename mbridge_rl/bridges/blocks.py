"""What decoder families share, block by block. A block is both halves of a bridge at once: the Megatron config fields it sets
and the tensors it maps. A family is a composition of blocks.

Sizes: `hidden` (h), `ffn` (f), `vocab`, query heads x head_dim (q), KV heads x head_dim (kv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from mbridge_rl.bridges.rope import rope_inv_freq
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.extras import Extra
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import (
    Rule,
    column_parallel,
    grouped_parallel,
    renamed,
    replicated,
    row_parallel,
    vocabulary_parallel,
)

MEGATRON_LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Block:
    """Config fields and rules that belong together. `rotates` marks an attention whose `config` says all about its rotary
    positions (latent attention); elsewhere they are the model's."""

    config: Mapping[str, Any]
    rules: tuple[Rule, ...]
    num_experts: int | None = field(default=None)
    rotates: bool = False
    extras: tuple[Extra, ...] = ()

    def only_in(self, layers: tuple[int, ...]) -> Block:
        """The same block, present in `layers` only."""
        return replace(self, rules=tuple(replace(rule, layers=layers) for rule in self.rules))

    def renamed(self, prefixes: Mapping[str, str]) -> Block:
        """The same block for a checkpoint with other names (`core.rules.renamed`)."""
        return replace(self, rules=renamed(self.rules, prefixes))


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0) ** 2` (arXiv 2109.08668)."""
    return functional.relu(x).square()


# Transformers' activation names as the function inside of Megatron's (gated or plain) MLP.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu2": squared_relu,
}


def decoder(hf: Any, *blocks: Block, extras: tuple[Extra, ...] = ()) -> ModelSpec:
    """A decoder-only model with rotary positions: embeddings, `blocks` in every layer, final norm, output layer."""
    h, tied = hf.hidden_size, bool(hf.tie_word_embeddings)
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
        "layernorm_epsilon": hf.rms_norm_eps,
        "activation_func": activation(hf),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "init_method_std": hf.initializer_range,
    }
    for block in blocks:
        config.update(block.config)
    return ModelSpec(
        architecture=hf.architectures[0],
        num_layers=hf.num_hidden_layers,
        vocab_size=hf.vocab_size,
        tied_embeddings=tied,
        transformer_config=config,
        gpt_model={
            "max_sequence_length": hf.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": hf.rope_parameters["rope_theta"],
            "rotary_percent": hf.rope_parameters.get("partial_rotary_factor", 1.0),
        },
        rules=rules,
        num_experts=next((block.num_experts for block in blocks if block.num_experts), None),
        rope_inv_freq=None if any(block.rotates for block in blocks) else rope_inv_freq(hf),
        extras=(*extras, *(extra for block in blocks for extra in block.extras)),
        ignored_hf_names=("lm_head.weight",) if tied else (),
    )


def activation(hf: Any) -> Callable[[Tensor], Tensor]:
    """The function that `hidden_act` names.

    Raises:
        UnsupportedModelError: none that Megatron's MLPs are known to compute as Transformers does.
    """
    names = (getattr(hf, field, None) for field in ("hidden_activation", "hidden_act", "mlp_hidden_act"))
    name = next(name for name in names if name)
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def attention(hf: Any, *, qkv_bias: bool = False, qk_norm: bool = False) -> Block:
    """Grouped-query attention with its norm fused into QKV, as Transformer Engine lays it out."""
    require(hf, "attention_bias", False)
    require(hf, "use_sliding_window", False)
    h, heads, kv_heads, dim = hf.hidden_size, hf.num_attention_heads, kv_heads_of(hf), head_dim(hf)
    ours, theirs = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    rules = [
        replicated(f"{ours}.linear_qkv.layer_norm_weight", f"{HF_LAYER}.input_layernorm.weight", (h,)),
        grouped_parallel(
            f"{ours}.linear_qkv.weight", {f"{theirs}.{name}.weight": size for name, size in sizes.items()}, kv_heads, (h,)
        ),
    ]
    if qkv_bias:
        biases = {f"{theirs}.{name}.bias": size for name, size in sizes.items()}
        rules.append(grouped_parallel(f"{ours}.linear_qkv.bias", biases, kv_heads))
    if qk_norm:
        rules += [
            replicated(f"{ours}.q_layernorm.weight", f"{theirs}.q_norm.weight", (dim,)),
            replicated(f"{ours}.k_layernorm.weight", f"{theirs}.k_norm.weight", (dim,)),
        ]
    rules.append(row_parallel(f"{ours}.linear_proj.weight", f"{theirs}.o_proj.weight", (h, heads * dim)))
    config = {
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": dim,
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": qk_norm,
        "attention_dropout": hf.attention_dropout,
    }
    return Block(config, tuple(rules))


def gated_mlp(hf: Any) -> Block:
    """`down(silu(gate(x)) * up(x))`, its norm fused into the first linear."""
    require(hf, "mlp_bias", False)
    h, f = hf.hidden_size, hf.intermediate_size
    ours, theirs = f"{MEGATRON_LAYER}.mlp", f"{HF_LAYER}.mlp"
    gate_up = {f"{theirs}.gate_proj.weight": f, f"{theirs}.up_proj.weight": f}
    rules = (
        replicated(f"{ours}.linear_fc1.layer_norm_weight", f"{HF_LAYER}.post_attention_layernorm.weight", (h,)),
        column_parallel(f"{ours}.linear_fc1.weight", gate_up, (h,)),
        row_parallel(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", (h, f)),
    )
    return Block({"ffn_hidden_size": f}, rules)


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def kv_heads_of(hf: Any) -> int:
    return getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads


def require(hf: Any, name: str, expected: Any) -> None:
    """Raises UnsupportedModelError where the config says something else than what the bridge can express."""
    found = getattr(hf, name, expected)
    if found != expected:
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: {name}={found!r} is not supported by its bridge, which needs {name}={expected!r}"
        )
