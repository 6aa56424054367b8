"""What some models compute that Megatron's config has no field for, as data.

A family lists its extras in `ModelSpec.extras`; `megatron/extras.py` adds each to the modules that Megatron built, by one
function per kind. Parameters that an extra brings along are named here and mapped by rules like any other.
"""

from __future__ import annotations

from dataclasses import dataclass


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


Extra = EmbeddingScale | LogitScale | LogitSoftcap | PlainNorm
