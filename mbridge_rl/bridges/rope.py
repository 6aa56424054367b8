"""Rotary frequencies: Transformers computes them, so that every scaling that it knows is its own formula, not our copy."""

from __future__ import annotations

from typing import Any

from mbridge_rl.core.errors import UnsupportedModelError

_STATIC_TYPES = ("linear", "llama3")


def rope_inv_freq(hf: Any) -> tuple[float, ...] | None:
    """Inverse frequencies `[rotary_dim / 2]` that differ from the plain `theta^(-2i/d)`, or `None` where they don't.

    Raises:
        UnsupportedModelError: a rope type whose frequencies change with the sequence, or that scales attention too.
    """
    rope_type = hf.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        return None
    if rope_type not in _STATIC_TYPES:
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: rope type {rope_type!r} is not supported; supported: default, {', '.join(_STATIC_TYPES)}"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](hf, device="cpu")
    if attention_factor != 1.0:
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: rope attention factor {attention_factor} is not supported (only 1.0)"
        )
    return tuple(inv_freq.tolist())
