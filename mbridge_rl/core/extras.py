"""Computations of some models for which Megatron's config has no field, as data.

A family or its blocks list extras in `ModelSpec.extras`. `megatron/extras.py` adds each to the modules that Megatron built, by
one function per kind; those of `LayerExtra` change the specs from which layers are built (`megatron/layer_specs.py`). The
parameters of an extra are named here, and rules map them like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EmbeddingScale:
    """Token embeddings are multiplied by `factor`, which is rounded to the model's dtype first, as Transformers does."""

    factor: float


@dataclass(frozen=True, slots=True)
class LogitScale:
    """Logits are multiplied by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class LogitSoftcap:
    """Logits become `cap * tanh(logits / cap)` (Gemma 2, arXiv 2408.00118)."""

    cap: float


@dataclass(frozen=True, slots=True)
class PlainNorm:
    """A norm with a plain weight in a model whose other norms have zero-centred weights.

    Attributes:
        module: its name inside of a layer, such as `self_attention.out_norm`.
    """

    module: str


@dataclass(frozen=True, slots=True)
class ResidualScale:
    """The outputs of attention and MLP, biases included, are multiplied by `factor` before they are added to the residual
    stream."""

    factor: float


@dataclass(frozen=True, slots=True)
class OutputNorms:
    """The outputs of attention and MLP, biases included, are normalised before they are added to the residual stream: by
    `decoder.layers.{layer}.post_self_attn_layernorm` and `...post_mlp_layernorm`, with a `weight [hidden]` each."""


@dataclass(frozen=True, slots=True)
class AttentionSoftcap:
    """Attention scores become `cap * tanh(scores / cap)` before the softmax (Gemma 2, arXiv 2408.00118)."""

    cap: float


@dataclass(frozen=True, slots=True)
class RotaryFrequencies:
    """Inverse frequencies `[rotary_dim / 2]` that replace Megatron's own."""

    inv_freq: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RotaryFrequenciesByLength:
    """LongRoPE (arXiv 2402.13753): `long` replaces `short` where a batch's sequences are longer than `original_length`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int


@dataclass(frozen=True, slots=True)
class RotaryFrequenciesByLayer:
    """Layer `i` of the model rotates with `inv_freqs[kinds[i]]`."""

    inv_freqs: tuple[tuple[float, ...], ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RotaryScale:
    """The first `channels` of rotated queries are multiplied by `factor`, in layers that rotate. Transformers scales cosine and
    sine, and so both queries and keys, by the square root."""

    factor: float
    channels: int


@dataclass(frozen=True, slots=True)
class QueryScaleByPosition:
    """Rotated queries are multiplied by `1 + beta * log(1 + floor(position / original_length))` (Llama 4, Ministral 3)."""

    beta: float
    original_length: int


@dataclass(frozen=True, slots=True)
class LinearBiases:
    """Linears of every layer that have biases although the config's `add_bias_linear` is off; some of `linear_proj`,
    `linear_fc1` and `linear_fc2`."""

    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoInputNorms:
    """Attention and MLP take the residual stream without a norm before them."""


@dataclass(frozen=True, slots=True)
class MambaBesideAttention:
    """A Mamba mixer beside the attention of every layer: both take the layer's normalised input, and their outputs are added.

    Its parameters are in `self_attention.mamba`, with the names of Megatron's mixer; the norm is `input_layernorm.weight`
    instead of the one in `linear_qkv`.

    Attributes:
        normalized: whether the mixer has a norm after its gate.
        attention_factor, mamba_factor: factors of the two outputs.
        projected: `(rows, factor)` for each part of the mixer's input projection (gate, input, B, C, time step).
    """

    normalized: bool
    attention_factor: float
    mamba_factor: float
    projected: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class MlpScale:
    """The MLP's output is multiplied by `factor` before it is added to the residual stream."""

    factor: float


@dataclass(frozen=True, slots=True)
class Routing:
    """How routers score, choose and weight experts, in place of Megatron's function.

    Experts are chosen by their score plus, where the router has one, a bias that affects only the choice (arXiv 2408.15664);
    their weights follow from the score alone.

    Attributes:
        score: the function that computes the scores of all experts, in fp32.
        normalized: whether the weights of the chosen experts are divided by their sum (by `minimum` where that is larger).
        scaling_factor: a factor by which the weights are multiplied at the end.
        groups, chosen_groups: only experts of the best `chosen_groups` of `groups` equal groups can be chosen.
        group_experts: the number of best scores whose sum ranks a group (1: DeepSeek-V2, 2: DeepSeek-V3).
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scaling_factor: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_experts: int = 2
    minimum: float = 1e-20


@dataclass(frozen=True, slots=True)
class ProjectionNorm:
    """Queries and keys are RMS-normalised over all heads together instead of head by head.

    The parameters, unsharded on every tensor-parallel rank, are `self_attention.q_layernorm.weight` `[query heads * head_dim]`
    and `self_attention.k_layernorm.weight` `[kv heads * head_dim]`.
    """

    eps: float


@dataclass(frozen=True, slots=True)
class LatentNormEpsilon:
    """The norms inside of latent attention add `epsilon` to the mean square, instead of the model's `layernorm_epsilon`."""

    epsilon: float
    models: float

    def __str__(self) -> str:
        return f"epsilon of latent attention's norms: {self.epsilon:g} in Transformers, {self.models:g} (rms_norm_eps) in vLLM"


@dataclass(frozen=True, slots=True)
class TimeStepMinimum:
    """Mamba mixers' time steps, after the softplus, are at least `minimum`."""

    minimum: float

    def __str__(self) -> str:
        return f"Mamba's time steps: at least {self.minimum:g} (time_step_min) in Transformers, any in vLLM"


@dataclass(frozen=True, slots=True)
class TextOnly:
    """A forward pass refuses pixels, and tokens that are placeholders for pixels.

    Attributes:
        placeholders: ids of those tokens.
    """

    placeholders: tuple[int, ...]


# Extras that Transformers computes and vLLM does not: `ModelSpec.as_in_vllm` removes them.
NotInVllm = LatentNormEpsilon | TimeStepMinimum
LayerExtra = LinearBiases | NoInputNorms | MambaBesideAttention
Extra = (
    EmbeddingScale
    | LogitScale
    | LogitSoftcap
    | PlainNorm
    | ResidualScale
    | OutputNorms
    | AttentionSoftcap
    | RotaryFrequencies
    | RotaryFrequenciesByLength
    | RotaryFrequenciesByLayer
    | RotaryScale
    | QueryScaleByPosition
    | MlpScale
    | Routing
    | ProjectionNorm
    | TextOnly
    | NotInVllm
    | LayerExtra
)
