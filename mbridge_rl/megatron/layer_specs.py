"""Extras that change Megatron's layer specs: which linears have biases, and which norms exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mbridge_rl.core.extras import Extra, LinearBiases, MambaBesideAttention, NoInputNorms
from mbridge_rl.megatron.versions.layer_specs import submodules_of


def change_layer_specs(layer_specs: Sequence[Any], extras: Sequence[Extra]) -> None:
    """Changes Megatron's specs of the layers of one chunk, in place; skips extras of other kinds."""
    distinct = list({id(layer_spec): layer_spec.submodules for layer_spec in layer_specs}.values())
    for kind, change in _CHANGE.items():
        for extra in extras:
            if isinstance(extra, kind):
                for layer in distinct:
                    change(layer, extra)


def _add_biases(layer: Any, extra: LinearBiases) -> None:
    for module in (submodules_of(layer.self_attention), submodules_of(layer.mlp)):
        for linear in extra.linears:
            if hasattr(module, linear):
                setattr(module, linear, _with_bias(getattr(module, linear)))


def _drop_input_norms(layer: Any, _: NoInputNorms) -> None:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    for part, linear in ((layer.self_attention, "linear_qkv"), (layer.mlp, "linear_fc1")):
        module = submodules_of(part)
        if hasattr(module, linear):
            setattr(module, linear, TEColumnParallelLinear)


def _put_mamba_beside(layer: Any, extra: MambaBesideAttention) -> None:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    from mbridge_rl.megatron.parallel_mixers import attention_beside_mamba

    layer.input_layernorm = TENorm
    layer.self_attention.module = attention_beside_mamba(extra)
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear


@cache
def _with_bias(linear: type) -> type:
    """The same module class, but always with a bias."""

    class WithBias(linear):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "bias": True})

    return WithBias


# The order matters: the first two replace linears, to which the last may then add biases.
_CHANGE: dict[type, Callable[[Any, Any], None]] = {
    NoInputNorms: _drop_input_norms,
    MambaBesideAttention: _put_mamba_beside,
    LinearBiases: _add_biases,
}
