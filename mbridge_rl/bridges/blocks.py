"""What decoder families share, block by block. A block is both halves of a bridge at once: the Megatron config fields it sets
and the tensors it maps. A family is a composition of blocks.

Sizes: `hidden` (h), `ffn` (f), `vocab`, query heads x head_dim (q), KV heads x head_dim (kv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from mbridge_rl.bridges.rope import rope
from mbridge_rl.core.errors import UnsupportedModelError
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
    """Config fields, rules and extras that belong together. `rotates` marks an attention whose `config` says all about its
    rotary positions (latent attention); elsewhere they are the model's."""

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


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0) ** 2` (arXiv 2109.08668)."""
    return functional.relu(x).square()


# Transformers' activation names as the function inside of Megatron's (gated or plain) MLP.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
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
        "layernorm_epsilon": getattr(hf, "rms_norm_eps", None) or hf.norm_eps,
        "activation_func": activation(hf),
        "bias_activation_fusion": activation(hf) is functional.silu,  # of the others Megatron has no fused form, or another one
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "init_method_std": hf.initializer_range,
    }
    for block in blocks:
        config.update(block.config)
    positions, rotary = _positions(hf, blocks, config)
    return ModelSpec(
        architecture=hf.architectures[0],
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


def _positions(hf: Any, blocks: Sequence[Block], config: dict[str, Any]) -> tuple[dict[str, Any], tuple[Extra, ...]]:
    """Arguments of Megatron's `GPTModel`, and extras. A factor that all attention scores have goes into the softmax, where it
    costs nothing."""
    if any(block.rotates for block in blocks):
        return {"position_embedding_type": "rope"}, ()
    rotary, dim = rope(hf), config["kv_channels"]
    positions = {"position_embedding_type": "rope", "rotary_base": rotary.theta, "rotary_percent": rotary.percent}
    if rotary.score_factor == 1.0:
        return positions, rotary.extras
    if rotary.percent == 1.0 and "no_rope_freq" not in config:
        config["softmax_scale"] = config.get("softmax_scale", dim**-0.5) * rotary.score_factor
        return positions, rotary.extras
    return positions, (*rotary.extras, RotaryScale(rotary.score_factor, int(dim * rotary.percent)))


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


def attention(
    hf: Any,
    *,
    qkv_bias: bool | None = None,
    output_bias: bool | None = None,
    qk_norm: bool = False,
    fused: str | None = None,
    norm: str | None = "input_layernorm",
) -> Block:
    """Grouped-query attention, its norm fused into QKV as Transformer Engine lays it out.

    Args:
        qkv_bias, output_bias: `None` means what `attention_bias` says of all four projections.
        fused: the HF tensor that stacks queries, keys and values; `None` where they are three.
        norm: HF's norm before it, `None` for none.
    """
    biased = bool(getattr(hf, "attention_bias", False))
    qkv_bias, output_bias = biased if qkv_bias is None else qkv_bias, biased if output_bias is None else output_bias
    h, heads, kv_heads, dim = hf.hidden_size, hf.num_attention_heads, kv_heads_of(hf), head_dim(hf)
    ours, theirs = f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    sizes = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    rules = _input_norm(f"{ours}.linear_qkv", norm, h)
    rules.append(grouped_parallel(f"{ours}.linear_qkv.weight", _parts(theirs, "weight", sizes, fused, (h,)), kv_heads, (h,)))
    if qkv_bias:
        rules.append(grouped_parallel(f"{ours}.linear_qkv.bias", _parts(theirs, "bias", sizes, fused), kv_heads))
    if qk_norm:
        rules += [
            replicated(f"{ours}.q_layernorm.weight", f"{theirs}.q_norm.weight", (dim,)),
            replicated(f"{ours}.k_layernorm.weight", f"{theirs}.k_norm.weight", (dim,)),
        ]
    rules.append(row_parallel(f"{ours}.linear_proj.weight", f"{theirs}.o_proj.weight", (h, heads * dim)))
    if output_bias:
        rules.append(replicated(f"{ours}.linear_proj.bias", f"{theirs}.o_proj.bias", (h,)))
    config = {
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": dim,
        "add_qkv_bias": qkv_bias,
        "qk_layernorm": qk_norm,
        "attention_dropout": 0.0,  # whatever the config says: the policy that is trained must be the one that sampled
        **sliding_windows(hf),
    }
    extras = (LinearBiases(("linear_proj",)),) if output_bias else ()
    return Block(config, tuple(rules), extras=(*extras, *_no_norm(norm)))


def projection_norms(hf: Any) -> Block:
    """Queries and keys normalised over all heads together, beside `attention`."""
    dim, ours, theirs = head_dim(hf), f"{MEGATRON_LAYER}.self_attention", f"{HF_LAYER}.self_attn"
    rules = (
        replicated(f"{ours}.q_layernorm.weight", f"{theirs}.q_norm.weight", (hf.num_attention_heads * dim,)),
        replicated(f"{ours}.k_layernorm.weight", f"{theirs}.k_norm.weight", (kv_heads_of(hf) * dim,)),
    )
    return Block({"qk_layernorm": True}, rules, extras=(ProjectionNorm(hf.rms_norm_eps),))


def sliding_windows(hf: Any) -> dict[str, Any]:
    """Megatron's fields for attention that sees the last `sliding_window` tokens only: in all layers, or in those that
    `layer_types` names.

    Raises:
        UnsupportedModelError: layers of a kind that is neither that nor full attention.
    """
    layer_types = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    if "chunked_attention" in layer_types:
        raise UnsupportedModelError(f"{hf.architectures[0]}: chunked attention (in layer_types) is not supported")
    windowed = [int(kind == "sliding_attention") for kind in layer_types]
    window = getattr(hf, "sliding_window", None)
    if window is None or not any(windowed):
        return {}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": windowed}


def gated_mlp(
    hf: Any, *, bias: bool | None = None, fused: str | None = None, norm: str | None = "post_attention_layernorm"
) -> Block:
    """`down(silu(gate(x)) * up(x))`, its norm fused into the first linear.

    Args:
        bias: `None` means what `mlp_bias` says.
        fused: the HF tensor that stacks gate and up; `None` where they are two.
        norm: HF's norm before it, `None` for none.
    """
    f = hf.intermediate_size
    return _mlp(hf, {"gate_proj": f, "up_proj": f}, bias, fused, norm)


def plain_mlp(hf: Any, *, bias: bool | None = None, norm: str | None = "post_attention_layernorm") -> Block:
    """`down(act(up(x)))`, its norm fused into the first linear; arguments as `gated_mlp`'s."""
    block = _mlp(hf, {"up_proj": hf.intermediate_size}, bias, None, norm)
    return replace(block, config={**block.config, "gated_linear_unit": False})


def _mlp(hf: Any, sizes: dict[str, int], bias: bool | None, fused: str | None, norm: str | None) -> Block:
    bias = bool(getattr(hf, "mlp_bias", False)) if bias is None else bias
    h, f = hf.hidden_size, hf.intermediate_size
    ours, theirs = f"{MEGATRON_LAYER}.mlp", f"{HF_LAYER}.mlp"
    rules = _input_norm(f"{ours}.linear_fc1", norm, h)
    rules.append(column_parallel(f"{ours}.linear_fc1.weight", _parts(theirs, "weight", sizes, fused, (h,)), (h,)))
    if bias:
        rules.append(column_parallel(f"{ours}.linear_fc1.bias", _parts(theirs, "bias", sizes, fused)))
    rules.append(row_parallel(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", (h, f)))
    if bias:
        rules.append(replicated(f"{ours}.linear_fc2.bias", f"{theirs}.down_proj.bias", (h,)))
    extras = (LinearBiases(("linear_fc1", "linear_fc2")),) if bias else ()
    return Block({"ffn_hidden_size": f}, tuple(rules), extras=(*extras, *_no_norm(norm)))


def output_norms(hf: Any, attention: str = "post_attention_layernorm", mlp: str = "post_feedforward_layernorm") -> Block:
    """Norms of what attention and MLP add to the residual stream, by HF's names."""
    names = {"post_self_attn_layernorm": attention, "post_mlp_layernorm": mlp}
    rules = [
        replicated(f"{MEGATRON_LAYER}.{ours}.weight", f"{HF_LAYER}.{theirs}.weight", (hf.hidden_size,))
        for ours, theirs in names.items()
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
