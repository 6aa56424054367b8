"""Packed sequences, and the division of sequences over context-parallel ranks. Two of these changes raise no error."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout


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


def require_context_parallel_delta_nets(fields: Mapping[str, Any], layout: ParallelLayout) -> None:
    """Checks that gated delta nets can divide sequences over the layout's context-parallel ranks, as they do since 0.18: each
    rank then computes some heads of full sequences.

    Args:
        fields: the config fields of the model's spec.

    Raises:
        LayoutError: they cannot, in this release or with these numbers of heads.
    """
    from megatron.core.ssm import gated_delta_net

    if not hasattr(gated_delta_net, "get_parameter_local_cp"):
        raise LayoutError(
            f"cp={layout.cp}: gated delta nets have context parallelism since Megatron-core 0.18, and an older one is "
            "installed; use cp=1"
        )
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if fields[name] % (layout.tp * layout.cp):
            raise LayoutError(
                f"{name}={fields[name]} of gated delta nets does not divide by tp*cp={layout.tp}*{layout.cp}; "
                "choose a smaller cp"
            )
