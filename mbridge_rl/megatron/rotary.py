"""Rotary embeddings with other frequencies than Megatron's, or with several at once. They take and return what Megatron's
`RotaryEmbedding` does, so context parallelism and packed sequences are its own business."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def with_frequencies(rotary: nn.Module, inv_freq: Sequence[float]) -> nn.Module:
    """A copy with inverse frequencies `[rotary_dim / 2]`, fp32.

    Raises:
        ValueError: there are more or fewer than the head has pairs of channels to rotate.
    """
    if len(rotary.inv_freq) != len(inv_freq):
        raise ValueError(f"{len(inv_freq)} rotary frequencies are given, the Megatron model has {len(rotary.inv_freq)}")
    other = copy.copy(rotary)
    other.inv_freq = torch.tensor(inv_freq, dtype=torch.float32, device=rotary.inv_freq.device)
    return other


class RotaryByLength(nn.Module):
    """LongRoPE: the second of two embeddings where sequences are longer than `original_length`, padding included, as
    Transformers does."""

    def __init__(self, variants: Sequence[nn.Module], original_length: int) -> None:
        super().__init__()
        self.variants, self.original_length = list(variants), original_length

    def get_rotary_seq_len(self, *arguments: Any, **options: Any) -> int:
        return self.variants[0].get_rotary_seq_len(*arguments, **options)

    def forward(self, max_seq_len: int, **options: Any) -> Tensor:
        return self.variants[int(max_seq_len > self.original_length)](max_seq_len, **options)


class RotaryByLayer(nn.Module):
    """All embeddings side by side, `[seq, 1, variants, rotary_dim]`; each layer's attention picks its own."""

    def __init__(self, variants: Sequence[nn.Module]) -> None:
        super().__init__()
        self.variants = list(variants)

    def get_rotary_seq_len(self, *arguments: Any, **options: Any) -> int:
        return self.variants[0].get_rotary_seq_len(*arguments, **options)

    def forward(self, max_seq_len: int, **options: Any) -> Tensor:
        return torch.cat([variant(max_seq_len, **options) for variant in self.variants], dim=2)

    @staticmethod
    def choose(attention: nn.Module, kind: int) -> None:
        """Makes `attention` see the `kind`-th embedding alone, in recomputation too."""

        def chosen(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            embeddings = options["rotary_pos_emb"]
            return arguments, {**options, "rotary_pos_emb": embeddings[:, :, kind : kind + 1]}

        attention.register_forward_pre_hook(chosen, with_kwargs=True)
