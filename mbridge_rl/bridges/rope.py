"""Rotary positions: Transformers computes the frequencies, so that every scaling that it knows is its formula, not our copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.extras import Extra, RotaryFrequencies, RotaryFrequenciesByLayer, RotaryFrequenciesByLength

_STATIC_TYPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How a model rotates queries and keys.

    Attributes:
        theta: base of the plain frequencies `theta^(-2i/d)`.
        percent: of the head's channels that are rotated, the first ones.
        score_factor: of the products of rotated queries and rotated keys.
        extras: frequencies other than the plain ones.
    """

    theta: float
    percent: float = 1.0
    score_factor: float = 1.0
    extras: tuple[Extra, ...] = field(default=())


def rope(hf: Any) -> Rope:
    """The rotary positions of every layer.

    Raises:
        UnsupportedModelError: a rope type that no bridge can express.
    """
    parameters = hf.rope_parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return _by_layer(hf, parameters)
    theta, percent = parameters["rope_theta"], parameters.get("partial_rotary_factor") or 1.0
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return Rope(theta, percent)
    if rope_type == "longrope":
        original = parameters["original_max_position_embeddings"]
        short, factor = _scaled(hf, rope_type, seq_len=original)
        long, _ = _scaled(hf, rope_type, seq_len=original + 1)
        extra: Extra = RotaryFrequenciesByLength(short, long, original)
    else:
        inv_freq, factor = _scaled(hf, rope_type)
        extra = RotaryFrequencies(inv_freq)
    return Rope(theta, percent, factor**2, (extra,))


def _by_layer(hf: Any, parameters: Mapping[str, Any]) -> Rope:
    """One set of parameters for each of the kinds that `layer_types` names."""
    kinds = sorted(set(hf.layer_types))
    inv_freqs = []
    for kind in kinds:
        rope_type, factor = parameters[kind].get("rope_type", "default"), 1.0
        if rope_type == "default":
            inv_freq = _plain(hf, parameters[kind]["rope_theta"])
        else:
            inv_freq, factor = _scaled(hf, rope_type, layer_type=kind)
        if factor != 1.0 or parameters[kind].get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(
                f"{hf.architectures[0]}: an attention factor or a partial rotation in only some layers is not supported; "
                f"found {dict(parameters[kind])} for {kind}"
            )
        inv_freqs.append(inv_freq)
    by_layer = RotaryFrequenciesByLayer(tuple(inv_freqs), tuple(kinds.index(kind) for kind in hf.layer_types))
    return Rope(parameters[kinds[0]]["rope_theta"], extras=(by_layer,))


def _plain(hf: Any, theta: float) -> tuple[float, ...]:
    import torch

    dim = hf.head_dim
    return tuple((1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).tolist())


def _scaled(hf: Any, rope_type: str, **options: Any) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies `[rotary_dim / 2]`, and what cosine and sine are multiplied with."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in (*_STATIC_TYPES, "longrope"):
        raise UnsupportedModelError(
            f"{hf.architectures[0]}: rope type {rope_type!r} is not supported; supported: default, longrope, "
            f"{', '.join(_STATIC_TYPES)}"
        )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](hf, device="cpu", **options)
    return tuple(inv_freq.tolist()), factor
