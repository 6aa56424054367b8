"""Adds `core.extras.ProjectionNorm`: queries and keys are normalised over all heads, which tensor parallelism distributes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.core.extras import ProjectionNorm


def normalize_projections(model: nn.Module, extra: ProjectionNorm) -> None:
    """Replaces Megatron's norms over one head (`qk_layernorm` of its config) by norms over all heads."""
    from megatron.core.transformer.attention import SelfAttention

    for module in model.modules():
        if isinstance(module, SelfAttention):
            config = module.config
            group = module.pg_collection.tp
            module.q_layernorm = _AllHeadsNorm(config.num_attention_heads, config, extra.eps, group)
            module.k_layernorm = _AllHeadsNorm(config.num_query_groups, config, extra.eps, group)


class _AllHeadsNorm(nn.Module):
    """RMS norm of `[seq, batch, heads / ranks, head_dim]` over the last two dimensions of all tensor-parallel ranks together.

    `weight` `[heads * head_dim]` is replicated on every rank: Megatron sums the gradients of a weight called `q_layernorm` or
    `k_layernorm` over those ranks. If there are more ranks than heads, each rank has one head, and several have the same.
    """

    def __init__(self, heads: int, config: Any, eps: float, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps, self.group = heads, config.kv_channels, eps, group
        self.weight = nn.Parameter(torch.ones(heads * config.kv_channels, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        local, group = x.float(), self.group
        squares = local.square().mean((-2, -1), keepdim=True) / group.size()
        # Every rank's output depends on the sum over all ranks: values are summed forwards, and gradients backwards.
        squares = mappings.reduce_from_tensor_model_parallel_region(squares, group=group)
        squares = mappings.copy_to_tensor_model_parallel_region(squares, group=group)
        first = group.rank() * self.heads // group.size()
        weight = self.weight.view(self.heads, self.head_dim)[first : first + x.shape[-2]]
        return (local * torch.rsqrt(squares + self.eps) * weight.float()).to(x.dtype)
