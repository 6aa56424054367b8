"""Rotary embeddings with other frequencies than Megatron's, or with several sets at once. They have the interface of Megatron's
`RotaryEmbedding`, which handles context parallelism and packed sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def with_frequencies(rotary: nn.Module, inv_freq: Sequence[float]) -> nn.Module:
    """A copy of `rotary` with the inverse frequencies `[rotary_dim / 2]`, fp32.

    Raises:
        ValueError: their number is not the number of rotated pairs of channels.
    """
    if len(rotary.inv_freq) != len(inv_freq):
        raise ValueError(f"{len(inv_freq)} rotary frequencies are given, the Megatron model has {len(rotary.inv_freq)}")
    other = copy.copy(rotary)
    other.inv_freq = torch.tensor(inv_freq, dtype=torch.float32, device=rotary.inv_freq.device)
    return other


class RotaryByLength(nn.Module):
    """LongRoPE: uses the second of two embeddings for sequences longer than `original_length`, padding included, as
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
        """Makes `attention` use only the `kind`-th embedding, in recomputation too."""

        def chosen(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            embeddings = options["rotary_pos_emb"]
            return arguments, {**options, "rotary_pos_emb": embeddings[:, :, kind : kind + 1]}

        attention.register_forward_pre_hook(chosen, with_kwargs=True)
