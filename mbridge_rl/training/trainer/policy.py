"""The policy's forward pass on one micro-batch, in two parts: Megatron's layers up to the last hidden states, and statistics of
tokens from those, in chunks, so that logits never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.megatron.extras import logit_changes
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.trainer.logprobs import projected_token_statistics, token_statistics


def last_hidden_states(chunk: nn.Module, micro: Batch, offsets: tuple[int, ...] | None) -> Tensor:
    """What `chunk` passes on: to the next stage or, on the last one, to `statistics_of`.

    Args:
        chunk: wrapped or not.
        micro: this rank's part of a micro-batch.
        offsets: of packed sequences; `None` where each row is a sequence.
    """
    core = unwrap(chunk)[0]
    packed = {} if offsets is None else {"packed_seq_params": _packed(offsets, micro.tokens.device)}
    if not core.post_process or not _head_can_be_chunked(core):
        return chunk(micro.tokens, micro.position_ids, None, **packed)
    core.post_process = False  # the layers' own final norm stays: only the projection to the vocabulary is left out
    try:
        return chunk(micro.tokens, micro.position_ids, None, **packed)
    finally:
        core.post_process = True


def statistics_of(
    chunk: nn.Module,
    output: Tensor,
    micro: Batch,
    *,
    group: dist.ProcessGroup,
    temperature: float,
    max_elements: int,
) -> TokenStatistics:
    """What the policy says of the micro-batch's targets, `[rows, seq / cp]`, from what `last_hidden_states` returned.

    Zero where no token counts: prompts and padding are not projected to the vocabulary, which is what costs most.

    Args:
        chunk: with the output layer.
        group: the tensor-parallel group.
        temperature, max_elements: see `logprobs.projected_token_statistics`.
    """
    core = unwrap(chunk)[0]
    options: dict[str, Any] = {"group": group, "temperature": temperature, "max_elements": max_elements}
    vocab_size, targets, counted = core.model_spec.vocab_size, micro.need("targets"), micro.mask
    if not _head_can_be_chunked(core):
        of_all = token_statistics(output, targets, vocab_size, **options)
        return TokenStatistics(*(values.masked_fill(~counted, 0) for values in of_all))
    tied = core.share_embeddings_and_output_weights
    weight = core.shared_embedding_or_output_weight() if tied else core.output_layer.weight
    hidden = _whole(core, output.to(weight.dtype), group)
    changes = logit_changes(core.model_spec.extras)
    change = _one_after_the_other(changes) if changes else None
    found = projected_token_statistics(hidden[counted], weight, targets[counted], vocab_size, change=change, **options)
    return TokenStatistics(*(values.new_zeros(counted.shape).masked_scatter(counted, values) for values in found))


def turn_off_dropout(chunks: Sequence[nn.Module]) -> None:
    """Of the base model, for good."""
    for chunk in chunks:
        for owner in (chunk.config, *chunk.modules()):
            for name in ("attention_dropout", "hidden_dropout"):
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)


def refuse_recurrent_layers(chunks: Sequence[nn.Module]) -> None:
    """
    Raises:
        ValueError: a layer can not keep packed sequences apart.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if type(module).__module__.startswith("megatron.core.ssm"):
                raise ValueError(
                    f"{name} ({type(module).__name__}) would carry its state from one packed sequence into the next: "
                    f"train this model with packing=False"
                )


def _head_can_be_chunked(core: nn.Module) -> bool:
    """Whether the output layer is a plain projection and the spec's changes of logits. With anything else on it (adapters, a
    user's hooks) Megatron's own forward pass makes this rank's logits of a micro-batch, and reducing them is chunked."""
    layer = core.output_layer
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
    return hooks == len(logit_changes(core.model_spec.extras)) and not getattr(layer, "adapter_parameter_names", ())


def _whole(core: nn.Module, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[batch, seq / cp, hidden]` on every tensor-parallel rank, of `[seq / cp (/ tp), batch, hidden]`; backwards, the sum of
    what the ranks say of it."""
    from megatron.core.tensor_parallel import mappings

    if core.config.sequence_parallel:
        whole = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        return whole.transpose(0, 1)
    # In this order: Megatron sums a gradient in place, and leaves one unsummed that is not contiguous.
    return mappings.copy_to_tensor_model_parallel_region(hidden.transpose(0, 1).contiguous(), group=group)


def _one_after_the_other(changes: list[Any]) -> Any:
    def change(logits: Tensor) -> Tensor:
        for each in changes:
            logits = each(logits)
        return logits

    return change


def _packed(offsets: tuple[int, ...], device: torch.device) -> Any:
    """Padding between sequences is part of them: causal attention keeps it out of what comes before."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor(offsets, dtype=torch.int32, device=device)
    longest = int(ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
