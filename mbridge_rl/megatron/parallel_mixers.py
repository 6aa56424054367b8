"""Attention with a Mamba mixer beside it, made of Megatron's own two modules; and changes of a mixer's input projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.extras import MambaBesideAttention


@cache
def attention_beside_mamba(extra: MambaBesideAttention) -> type[nn.Module]:
    """A module that replaces Megatron's `SelfAttention`, without the input norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.transformer.attention import SelfAttention

    class AttentionBesideMamba(SelfAttention):
        def __init__(self, config: Any, *args: Any, **options: Any) -> None:
            super().__init__(config, *args, **options)
            self.mamba = MambaMixer(
                config,
                MambaMixerSubmodules(in_proj=TEColumnParallelLinear, out_proj=TERowParallelLinear),
                d_model=config.hidden_size,
                rmsnorm=extra.normalized,
                layer_number=self.layer_number,
                pg_collection=self.pg_collection,
            )
            _scale_projection(self.mamba, extra, self.pg_collection.tp.size())

        def forward(
            self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            attention_output, bias = super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **options)
            mamba_output, _ = self.mamba(hidden_states, packed_seq_params=packed_seq_params)
            return attention_output * extra.attention_factor + mamba_output * extra.mamba_factor, bias

    return AttentionBesideMamba


def _scale_projection(mixer: nn.Module, extra: MambaBesideAttention, ranks: int) -> None:
    """Multiplies the parts of the mixer's input projection by their factors. Every rank has an equal share of each part's
    rows."""
    factors = torch.cat([torch.full((rows // ranks,), factor) for rows, factor in extra.projected])
    _change_projection(mixer, lambda projected: projected * factors.to(projected))


def bound_time_steps(mixer: nn.Module, minimum: float) -> None:
    """Bounds time steps, `softplus(projected + dt_bias)`, by `minimum` from below. Softplus is increasing, so that its argument
    can be bounded before the kernels. A bounded step has no gradient, as with a clamp."""
    bound = math.log(math.expm1(minimum))

    def bounded(projected: Tensor) -> Tensor:
        bias = mixer.dt_bias.float()
        other_parts, steps = projected.split([projected.shape[-1] - len(bias), len(bias)], dim=-1)
        return torch.cat([other_parts, torch.maximum(steps.float(), bound - bias).to(steps.dtype)], dim=-1)

    _change_projection(mixer, bounded)


def _change_projection(mixer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Applies `change` to the output of the mixer's input projection, after adapters have added theirs."""
    original = mixer.cp.pre_conv_ssm

    def changed(projected: Tensor, packed_seq_params: Any) -> Tensor:
        return original(change(projected), packed_seq_params)

    mixer.cp.pre_conv_ssm = changed
