"""Transformer Engine's `DotProductAttention` in pure torch, with dense scores and without kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.megatron.cpu.module import TransformerEngineModule


class DotProductAttention(TransformerEngineModule):
    """Grouped-query attention with sinks, sliding windows, unequal key and value widths (MLA), packing and context parallelism.

    Under context parallelism keys and values are gathered over the group (TE's `all_gather` form; the result is the same
    as its ring's). Softmax is in fp32. `softmax_offset [heads]` is the sink of softmax_type "learnable" (a parameter) or
    "off-by-one" (zeros): one more logit that takes part in the softmax and whose probability is dropped. `softcap`, which TE
    lacks, bends scores to `cap * tanh(scores / cap)`.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        window_size: tuple[int, int] | None = None,
        softcap: float | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        cp_group: torch.distributed.ProcessGroup | None = None,
        cp_comm_type: str = "p2p",
        **_: Any,
    ) -> None:
        super().__init__(get_rng_state_tracker=get_rng_state_tracker)
        key_channels = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        self.softmax_scale = softmax_scale or key_channels**-0.5
        self.attention_dropout, self.window_size, self.softcap = attention_dropout, window_size, softcap
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        self.softmax_offset: Tensor | None = None
        if softmax_type != "vanilla":
            offset = torch.zeros(num_attention_heads // tp_size)
            self.softmax_offset = Parameter(offset) if softmax_type == "learnable" else offset
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

    def set_context_parallel_group(self, cp_group: torch.distributed.ProcessGroup | None, *_: Any) -> None:
        self.cp_group = cp_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        attn_mask_type: str = "causal",
        core_attention_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[seq, batch, heads, dim]`, or `[tokens, heads, dim]` with qkv_format "thd".
            key, value: the same with `kv_heads` and, for the value, its own last dimension.
            attention_mask: True where a key is hidden from a query, broadcast to `[batch, heads, q, k]`; read for the mask
                types "arbitrary" and "padding*" only, as in TE.
            cu_seqlens_q, cu_seqlens_q_padded: `[sequences + 1]` offsets of packed sequences; the padded ones, if given, are the
                actual positions of the tokens.

        Returns:
            `[seq, batch, heads * value_dim]`, or `[tokens, heads * value_dim]`.
        """
        packed = qkv_format == "thd"
        if packed:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            offsets = (cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded).tolist()  # type: ignore[union-attr]
        else:
            offsets = None
        query_positions, key_positions, key, value = self._positions(query, key, value, offsets)
        query_positions, key_positions = query_positions.to(query.device), key_positions.to(query.device)
        forbidden = self._forbidden(query_positions, key_positions, attn_mask_type)
        if packed:
            forbidden = forbidden | _different_sequence(query_positions, key_positions, offsets)
        elif attention_mask is not None and ("padding" in attn_mask_type or attn_mask_type == "arbitrary"):
            forbidden = forbidden | attention_mask
        output = self._attend(query, key, value, forbidden, core_attention_bias)
        return output.squeeze(1) if packed else output

    def _positions(
        self, query: Tensor, key: Tensor, value: Tensor, offsets: Sequence[int] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The global token positions of queries and of keys, and the full keys and values."""
        size = self.cp_group.size() if self.cp_group is not None else 1
        if size == 1:
            return torch.arange(len(query)), torch.arange(len(key)), key, value
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        bounds = offsets if offsets is not None else [0, len(query) * size]
        positions = [context_parallel_positions(bounds, rank, size) for rank in range(size)]
        key = gather_from_sequence_parallel_region(key.contiguous(), group=self.cp_group)
        value = gather_from_sequence_parallel_region(value.contiguous(), group=self.cp_group)
        return positions[self.cp_group.rank()], torch.cat(positions), key, value  # type: ignore[union-attr]

    def _forbidden(self, query_positions: Tensor, key_positions: Tensor, attn_mask_type: str) -> Tensor:
        """`[q, k]`, True where the mask type or the window hides a key from a query."""
        distance = query_positions[:, None] - key_positions
        causal = "causal" in attn_mask_type
        if attn_mask_type.endswith("bottom_right"):
            distance = distance + len(key_positions) - len(query_positions)
        forbidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
        left, right = self.window_size or (-1, -1)
        if left >= 0:
            forbidden = forbidden | (distance > left)
        if right >= 0 and not causal:
            forbidden = forbidden | (distance < -right)
        return forbidden

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor, bias: Tensor | None) -> Tensor:
        """Attends with the hidden keys masked out; returns `[q, batch, heads * value_dim]`."""
        copies = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key).float() * self.softmax_scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(forbidden, torch.finfo(torch.float32).min)
        if self.softmax_offset is not None:
            sink = self.softmax_offset.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        probabilities = scores.softmax(dim=-1)[..., : len(key)].to(value.dtype)
        if self.attention_dropout and self.training:
            with self._fork_rng():
                probabilities = F.dropout(probabilities, self.attention_dropout)
        return torch.einsum("bhqk,kbhd->qbhd", probabilities, value).flatten(2)


class CoreAttention(DotProductAttention):
    """Megatron's core attention of self-attention layer `layer_number`, with soft-capped scores, on any device: Transformer
    Engine's kernels know no such cap. Memory grows with the square of the sequence."""

    def __init__(self, config: Any, layer_number: int, softcap: float, cp_group: torch.distributed.ProcessGroup | None) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.transformer.utils import is_layer_window_attention

        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        super().__init__(
            config.num_attention_heads,
            config.kv_channels,
            config.attention_dropout,
            config.softmax_scale,
            window_size=config.window_size if windowed else None,
            softcap=softcap,
            tp_size=config.tensor_model_parallel_size,
            get_rng_state_tracker=tensor_parallel.get_cuda_rng_tracker,
            cp_group=cp_group,
        )
        self.config = config

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Takes the arguments that Megatron's attention passes, and returns the output of `DotProductAttention`."""
        packed = {} if packed_seq_params is None else vars(packed_seq_params)
        names = ("qkv_format", "cu_seqlens_q", "cu_seqlens_q_padded")
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type.name,
            core_attention_bias=attention_bias,
            **{name: packed[name] for name in names if name in packed},
        )

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Returns nothing: the module has no parameters."""
        return {}


def _different_sequence(query_positions: Tensor, key_positions: Tensor, offsets: Sequence[int] | None) -> Tensor:
    """`[q, k]`, True where query and key belong to different packed sequences."""
    ends = torch.tensor(list(offsets or [0])[1:], device=query_positions.device)
    return torch.bucketize(query_positions, ends, right=True)[:, None] != torch.bucketize(key_positions, ends, right=True)


def _forgive_missing_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    """Allows, as TE does, that a checkpoint lacks the extra state of attention, which is empty."""
    for name in [name for name in incompatible.missing_keys if "core_attention._extra_state" in name]:
        incompatible.missing_keys.remove(name)
