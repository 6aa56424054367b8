"""The policy's forward pass on one micro-batch, in two parts: Megatron's layers up to the last hidden states, and the
statistics of tokens, computed from those in chunks, so that the full logits never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.megatron.extras import logit_changes
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.versions.batches import packed_sequences
from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.trainer.logprobs import projected_token_statistics, token_statistics


def last_hidden_states(chunk: nn.Module, micro: Batch, offsets: tuple[int, ...] | None) -> Tensor:
    """The output of `chunk`: the input of the next stage or, on the last stage, of `statistics_of`.

    Args:
        chunk: a chunk, wrapped or not.
        micro: this rank's part of a micro-batch.
        offsets: where packed sequences begin and end; `None` where each row is a sequence.
    """
    core = unwrap(chunk)[0]
    packed = {} if offsets is None else {"packed_seq_params": packed_sequences(offsets, micro.tokens.device)}
    if not core.post_process or not _head_can_be_chunked(core):
        return chunk(micro.tokens, micro.position_ids, None, **packed)
    core.post_process = False  # leaves out the projection to the vocabulary only; the final norm belongs to the layers
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
    """The policy's statistics of the micro-batch's targets, `[rows, seq / cp]`, from the output of `last_hidden_states`.

    They are zero outside of the mask: prompts and padding are not projected to the vocabulary, which is the most expensive
    part.

    Args:
        chunk: the chunk with the output layer.
        output: the output of `last_hidden_states`.
        micro: this rank's part of the micro-batch.
        group: the tensor-parallel group.
        temperature, max_elements: see `logprobs.projected_token_statistics`.
    """
    core = unwrap(chunk)[0]
    options: dict[str, Any] = {"group": group, "temperature": temperature, "max_elements": max_elements}
    vocab_size, targets, mask = core.model_spec.vocab_size, micro.need("targets"), micro.mask
    if not _head_can_be_chunked(core):
        statistics = token_statistics(output, targets, vocab_size, **options)
        return TokenStatistics(*(values.masked_fill(~mask, 0) for values in statistics))
    tied = core.share_embeddings_and_output_weights
    weight = core.shared_embedding_or_output_weight() if tied else core.output_layer.weight
    hidden = _full_hidden_states(core, output.to(weight.dtype), group)
    changes = logit_changes(core.model_spec.extras)
    change = _composed(changes) if changes else None
    statistics = projected_token_statistics(hidden[mask], weight, targets[mask], vocab_size, change=change, **options)
    return TokenStatistics(*(values.new_zeros(mask.shape).masked_scatter(mask, values) for values in statistics))


def turn_off_dropout(chunks: Sequence[nn.Module]) -> None:
    """Turns the base model's dropout off permanently."""
    for chunk in chunks:
        for owner in (chunk.config, *chunk.modules()):
            for name in ("attention_dropout", "hidden_dropout"):
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)


def refuse_recurrent_layers(chunks: Sequence[nn.Module]) -> None:
    """
    Raises:
        ValueError: a layer cannot keep packed sequences apart.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if type(module).__module__.startswith("megatron.core.ssm"):
                raise ValueError(
                    f"{name} ({type(module).__name__}) would carry its state from one packed sequence into the next: "
                    f"train this model with packing=False"
                )


def _head_can_be_chunked(core: nn.Module) -> bool:
    """Whether the output layer consists of a plain projection and the spec's changes of logits. With anything else on it
    (adapters, a user's hooks) Megatron's own forward pass computes this rank's logits of a micro-batch, and only their
    reduction is chunked."""
    layer = core.output_layer
    hooks = len(layer._forward_hooks) + len(layer._forward_pre_hooks)
    return hooks == len(logit_changes(core.model_spec.extras)) and not getattr(layer, "adapter_parameter_names", ())


def _full_hidden_states(core: nn.Module, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[batch, seq / cp, hidden]` on every tensor-parallel rank, from `[seq / cp (/ tp), batch, hidden]`; the backward pass
    sums the ranks' gradients."""
    from megatron.core.tensor_parallel import mappings

    if core.config.sequence_parallel:
        gathered = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        return gathered.transpose(0, 1)
    # The order matters: Megatron sums a gradient in place, and does not sum one that is not contiguous.
    return mappings.copy_to_tensor_model_parallel_region(hidden.transpose(0, 1).contiguous(), group=group)


def _composed(changes: list[Any]) -> Any:
    """The function that applies all changes of logits, in order."""

    def apply_all(logits: Tensor) -> Tensor:
        for change in changes:
            logits = change(logits)
        return logits

    return apply_all
