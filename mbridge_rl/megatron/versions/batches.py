"""Packed sequences and the division of a batch over context-parallel ranks: two changes that raise no error."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def packed_sequences(offsets: Sequence[int], device: torch.device) -> Any:
    """Megatron's `PackedSeqParams` of one row of sequences.

    Since 0.17 Mamba layers keep the sequences apart only if `total_tokens` is given; without it a layer carries its state from
    one sequence into the next, and nothing warns of it. Padding counts as the end of its sequence: causal attention keeps it
    out of the tokens before it.

    Args:
        offsets: where the sequences begin and the last one ends, in the row of all context-parallel ranks together.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor(offsets, dtype=torch.int32, device=device)
    longest = int(ends.diff().max())
    known = {field.name for field in dataclasses.fields(PackedSeqParams)}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **({"total_tokens": offsets[-1]} if "total_tokens" in known else {}),
    )


def batch_of_context_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This context-parallel rank's part of a batch of rows `[batch, seq]`, by Megatron's own function.

    Without a group it takes the context-parallel one up to 0.17 and the world since 0.18, so that data-parallel replicas would
    silently get different parts of a row. Since 0.18 it also has to be told that its groups do not change by batch.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    options: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        options["is_hybrid_cp"] = False
    return get_batch_on_this_cp_rank(batch, **options)
