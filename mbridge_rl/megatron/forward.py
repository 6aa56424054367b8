"""A forward pass through Megatron's own schedule, on any layout, that returns the full logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.model import unwrap


def forward_logits(model: Sequence[nn.Module], tokens: Tensor, layout: ParallelLayout | None = None) -> Tensor | None:
    """Logits of every position, for tests and verification; training never gathers them.

    All ranks call it together. Tensor, pipeline and context parallel ranks pass the same tokens, data parallel ranks may pass
    their own (of the same shape where experts are parallel).

    Args:
        model: the chunks that `build_model` returned, wrapped or not.
        tokens: `[batch, seq]` int64, of any length: if the layout needs a longer one, rows are padded on the right, where a
            causal model's earlier positions cannot see it.
        layout: `None` means the layout for which the model was built.

    Returns:
        `[batch, seq, vocab]` fp32 without the padded vocabulary, on every rank of the last pipeline stage; `None` elsewhere.
    """
    with megatron_runtime(), torch.no_grad(), _evaluating(model):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        core = unwrap(model)
        layout = layout or core[0].parallel_layout
        padded = _pad(tokens, layout)
        micro_batches = layout.pp if layout.vpp > 1 else 1  # interleaving needs as many as there are stages
        parts = padded.chunk(micro_batches)
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step(layout),
            data_iterator=[iter(parts) for _ in model] if layout.vpp > 1 else iter(parts),
            model=list(model) if layout.vpp > 1 else model[0],
            num_microbatches=micro_batches,
            seq_length=padded.shape[1],
            micro_batch_size=len(parts[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not core[-1].post_process:
            return None
        logits = torch.cat([_gather(output, layout) for output in outputs])
        return logits[: tokens.shape[0], : tokens.shape[1], : core[-1].model_spec.vocab_size].contiguous()


@contextlib.contextmanager
def _evaluating(model: Sequence[nn.Module]) -> Iterator[None]:
    """Turns dropout off inside of the block, and restores every module's mode afterwards."""
    training = [(module, module.training) for chunk in model for module in chunk.modules()]
    try:
        for chunk in model:
            chunk.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _pad(tokens: Tensor, layout: ParallelLayout) -> Tensor:
    """Pads with zeros on the right to a length and a number of rows that the layout can divide."""
    sequence = math.lcm(layout.cp * layout.tp, 2 * layout.cp if layout.cp > 1 else 1)
    rows = layout.pp if layout.vpp > 1 else 1
    return F.pad(tokens, (0, -tokens.shape[1] % sequence, 0, -tokens.shape[0] % rows))


def _forward_step(layout: ParallelLayout) -> Callable[[Iterator[Tensor], nn.Module], tuple[Tensor, Callable[..., Any]]]:
    def step(data: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        tokens = next(data)
        positions = torch.arange(tokens.shape[1])
        if layout.cp > 1:
            positions = context_parallel_positions([0, tokens.shape[1]], _context_rank(), layout.cp)
        position_ids = positions.to(tokens.device).expand(len(tokens), -1)
        logits = chunk(tokens[:, positions], position_ids, None)
        return logits, lambda output, non_loss_data: output

    return step


def _context_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_rank()


def _gather(logits: Tensor, layout: ParallelLayout) -> Tensor:
    """Gathers `[batch, seq / cp, padded_vocab / tp]` of every rank to `[batch, seq, padded_vocab]` fp32."""
    from megatron.core import parallel_state

    full_vocab = torch.cat(_all_gather(logits.float(), parallel_state.get_tensor_model_parallel_group()), dim=-1)
    if layout.cp == 1:
        return full_vocab
    parts = torch.cat(_all_gather(full_vocab, parallel_state.get_context_parallel_group()), dim=1)
    length = parts.shape[1]
    positions = torch.cat([context_parallel_positions([0, length], rank, layout.cp) for rank in range(layout.cp)])
    return parts[:, positions.argsort()]


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
