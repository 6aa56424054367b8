"""`core.extras.ProjectionNorm`: queries and keys normalised over all heads, which tensor parallelism deals to ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.extras import ProjectionNorm


def normalize_projections(model: nn.Module, extra: ProjectionNorm) -> None:
    """Puts norms of the whole width where Megatron built norms of one head (`qk_layernorm` of its config)."""
    from megatron.core.transformer.attention import SelfAttention

    for module in model.modules():
        if isinstance(module, SelfAttention):
            config = module.config
            module.q_layernorm = _WholeWidthNorm(config.num_attention_heads, config, extra.eps)
            module.k_layernorm = _WholeWidthNorm(config.num_query_groups, config, extra.eps)


class _WholeWidthNorm(nn.Module):
    """RMS norm of `[seq, batch, heads / ranks, head_dim]` over the last two dimensions of all tensor-parallel ranks together.

    `weight` `[heads * head_dim]` is whole on every rank: of a weight called `q_layernorm` or `k_layernorm` Megatron sums the
    gradients over those ranks. Ranks that outnumber the heads each hold one, several of them the same.
    """

    def __init__(self, heads: int, config: Any, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.eps = heads, config.kv_channels, eps
        self.weight = nn.Parameter(torch.ones(heads * config.kv_channels, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import mappings

        group = parallel_state.get_tensor_model_parallel_group()
        local = x.float()
        squares = local.square().mean((-2, -1), keepdim=True) / group.size()
        # The sum of all ranks, of which every rank's loss depends: summed forwards, and gradients summed backwards.
        squares = mappings.reduce_from_tensor_model_parallel_region(squares, group=group)
        squares = mappings.copy_to_tensor_model_parallel_region(squares, group=group)
        first = group.rank() * self.heads // group.size()
        weight = self.weight.view(self.heads, self.head_dim)[first : first + x.shape[-2]]
        return (local * torch.rsqrt(squares + self.eps) * weight.float()).to(x.dtype)
