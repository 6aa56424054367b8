"""Differences between the layer specs of attention and MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any


def submodules_of(layer_part: Any) -> Any:
    """The submodules in the spec of a layer's attention or MLP, which may be changed in place. Since 0.18 the specs of MLPs and
    experts are `functools.partial`s; before, and for attention, they are `ModuleSpec`s."""
    return layer_part.keywords.get("submodules") if isinstance(layer_part, partial) else layer_part.submodules


def keep_query_projection(layer_specs: Sequence[Any], config: Any) -> None:
    """Makes latent attention without a low-rank query use the query projection of its spec. Changes Megatron's specs in place.

    Since 0.19 Megatron puts a norm into that projection wherever `qk_layernorm` asks for one of keys and values (DeepSeek-V2-
    Lite, Moonlight), whatever the spec says; before, the spec decided.
    """
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    if not hasattr(MLASelfAttention, "_resolve_qk_norm_config") or getattr(config, "q_lora_rank", 0) is not None:
        return
    for layer_spec in layer_specs:
        attention = layer_spec.submodules.self_attention
        if attention.module is MLASelfAttention:
            attention.module = _with_plain_queries()


@cache
def _with_plain_queries() -> type:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    class PlainQueries(MLASelfAttention):
        def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
            return {**super()._resolve_qk_norm_config(submodules), "linear_q_proj": submodules.linear_q_proj}

    return PlainQueries
