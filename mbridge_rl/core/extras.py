"""What some models compute that Megatron's config has no field for, as data.

A family lists its extras in `ModelSpec.extras`, or its blocks bring them. `megatron/extras.py` adds each to the modules that
Megatron built, by one function per kind; those of `LayerExtra` change what is built (`megatron/layer_specs.py`). Parameters
that an extra brings along are named here and mapped by rules like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EmbeddingScale:
    """Token embeddings times `factor`, rounded to the model's dtype first, as Transformers does."""

    factor: float


@dataclass(frozen=True, slots=True)
class LogitScale:
    """Logits times `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class LogitSoftcap:
    """`cap * tanh(logits / cap)` (Gemma 2, arXiv 2408.00118)."""

    cap: float


@dataclass(frozen=True, slots=True)
class PlainNorm:
    """A norm whose weight is plain in a model whose other norms' are zero-centred.

    Attributes:
        module: its name inside of a layer, such as `self_attention.out_norm`.
    """

    module: str


@dataclass(frozen=True, slots=True)
class ResidualScale:
    """What attention and MLP add to the residual stream, biases included, times `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class OutputNorms:
    """What attention and MLP add to the residual stream, biases included, is normalised first: with
    `decoder.layers.{layer}.post_self_attn_layernorm` and `...post_mlp_layernorm`, `weight [hidden]` each."""


@dataclass(frozen=True, slots=True)
class AttentionSoftcap:
    """`cap * tanh(scores / cap)` before the softmax of attention (Gemma 2, arXiv 2408.00118)."""

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
    """Rotated queries times `factor`: their first `channels`, in layers that rotate. Transformers scales cosine and sine, of
    queries and keys alike, by the square root."""

    factor: float
    channels: int


@dataclass(frozen=True, slots=True)
class QueryScaleByPosition:
    """Rotated queries times `1 + beta * log(1 + floor(position / original_length))` (Llama 4, Ministral 3)."""

    beta: float
    original_length: int


@dataclass(frozen=True, slots=True)
class LinearBiases:
    """Linears of every layer that have biases though the config's `add_bias_linear` is off: `linear_proj`, `linear_fc1`,
    `linear_fc2`."""

    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoInputNorms:
    """Attention and MLP take the residual stream as it is."""


@dataclass(frozen=True, slots=True)
class MambaBesideAttention:
    """A Mamba mixer beside the attention of every layer: both see the layer's normalised input, their outputs are added.

    Its parameters are `self_attention.mamba`'s, named as those of Megatron's mixer; the norm is `input_layernorm.weight`
    instead of `linear_qkv`'s own.

    Attributes:
        normalized: the mixer has a norm behind its gate.
        attention_factor, mamba_factor: of the outputs.
        projected: `(rows, factor)` of the mixer's input projection, part by part (gate, input, B, C, time step).
    """

    normalized: bool
    attention_factor: float
    mamba_factor: float
    projected: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class MlpScale:
    """What the MLP adds to the residual stream times `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Routing:
    """How routers score, choose and weigh experts, in place of Megatron's function.

    Experts are chosen by score plus, where the router has one, a bias that only choosing sees (arXiv 2408.15664); they are
    weighed by score alone.

    Attributes:
        score: of all experts, in fp32.
        normalized: the weights of the chosen are divided by their sum (by `minimum` where that is larger).
        scaling_factor: the weights are multiplied by it at last.
        groups, chosen_groups: only experts of the best `chosen_groups` of `groups` equal groups can be chosen.
        group_experts: a group is ranked by the sum of its so many best (1: DeepSeek-V2, 2: DeepSeek-V3).
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
    """Queries and keys RMS-normalised over all heads together instead of head by head.

    Its parameters, whole on every tensor-parallel rank, are `self_attention.q_layernorm.weight` `[query heads * head_dim]` and
    `self_attention.k_layernorm.weight` `[kv heads * head_dim]`.
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
    """A forward pass refuses pixels and tokens that stand for them.

    Attributes:
        placeholders: ids of those tokens.
    """

    placeholders: tuple[int, ...]


# What Transformers computes and vLLM does not: `ModelSpec.as_in_vllm` is without them.
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
