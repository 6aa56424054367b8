"""Rotary positions. Transformers computes the frequencies, so that its own formula is used for every scaling, and not a copy of
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mbridge_rl.bridges.blocks.config_reader import ConfigReader, rope_value
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import Extra, RotaryFrequencies, RotaryFrequenciesByLayer, RotaryFrequenciesByLength

_STATIC_TYPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How a model rotates queries and keys.

    Attributes:
        theta: the base of the plain frequencies `theta^(-2i/d)`.
        percent: the share of the head's channels that are rotated, which are the first ones.
        score_factor: the factor of the products of rotated queries and rotated keys.
        extras: extras for other frequencies than the plain ones.
    """

    theta: float
    percent: float = 1.0
    score_factor: float = 1.0
    extras: tuple[Extra, ...] = field(default=())


def rope(hf: ConfigReader, head_dim: int, *, partial: bool = False) -> Rope:
    """The rotary positions of every layer.

    Args:
        partial: whether the family rotates only the share of the head that `partial_rotary_factor` gives.

    Raises:
        UnsupportedModelError: no bridge supports the rope type, or the family has no partial rotation.
    """
    parameters = hf.rope_parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return _by_layer(hf, parameters, head_dim)
    theta, rope_type = rope_value(hf, parameters, "rope_theta", ...), rope_value(hf, parameters, "rope_type", "default")
    percent = rope_value(hf, parameters, "partial_rotary_factor") or 1.0
    if percent != 1.0 and not partial:
        raise hf.refuse(
            "rope_parameters.partial_rotary_factor",
            f"{percent}; Transformers' model rotates whole heads whatever it says, vLLM's doesn't: leave it out or give 1.0",
        )
    if int(head_dim * percent) % 2 or percent * head_dim < 2:
        raise CheckpointError(
            f"{hf.architecture}: head_dim={head_dim} times partial_rotary_factor={percent}; expected an even number of channels"
        )
    if rope_type == "default":
        return Rope(theta, percent)
    if rope_type == "longrope":
        original = rope_value(hf, parameters, "original_max_position_embeddings", hf.max_position_embeddings)
        short, factor = _scaled(hf, rope_type, seq_len=original)
        long, _ = _scaled(hf, rope_type, seq_len=original + 1)
        extra: Extra = RotaryFrequenciesByLength(short, long, original)
    else:
        inv_freq, factor = _scaled(hf, rope_type)
        extra = RotaryFrequencies(inv_freq)
    return Rope(theta, percent, factor**2, (extra,))


def _by_layer(hf: ConfigReader, parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary positions with one set of parameters for each kind of layer in `layer_types`."""
    layer_types = hf.get("layer_types")
    kinds = sorted(set(layer_types or ()))
    if not kinds:
        raise CheckpointError(
            f"{hf.architecture}: rope_parameters={dict(parameters)!r} has objects in it; expected numbers, since the config "
            "has no layer_types that they could be of"
        )
    if missing := [kind for kind in kinds if not isinstance(parameters.get(kind), Mapping)]:
        raise CheckpointError(f"{hf.architecture}: rope_parameters has no object for {missing[0]}, which layer_types names")
    inv_freqs = [_frequencies(hf, parameters[kind], kind, head_dim) for kind in kinds]
    by_layer = RotaryFrequenciesByLayer(tuple(inv_freqs), tuple(kinds.index(kind) for kind in layer_types))
    return Rope(rope_value(hf, parameters[kinds[0]], "rope_theta", ...), extras=(by_layer,))


def _frequencies(hf: ConfigReader, parameters: Mapping[str, Any], kind: str, head_dim: int) -> tuple[float, ...]:
    """The inverse frequencies of the layers of one kind."""
    theta, rope_type, factor = rope_value(hf, parameters, "rope_theta", ...), parameters.get("rope_type", "default"), 1.0
    if rope_type == "default":
        inv_freq = _plain(theta, head_dim)
    else:
        inv_freq, factor = _scaled(hf, rope_type, layer_type=kind)
    if factor != 1.0 or (rope_value(hf, parameters, "partial_rotary_factor") or 1.0) != 1.0:
        raise hf.refuse(
            f"rope_parameters.{kind}",
            f"an attention_factor or a partial_rotary_factor in only some layers is not supported; found {dict(parameters)}",
        )
    return inv_freq


def _plain(theta: float, dim: int) -> tuple[float, ...]:
    import torch

    return tuple((1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).tolist())


def _scaled(hf: ConfigReader, rope_type: str, **options: Any) -> tuple[tuple[float, ...], float]:
    """The inverse frequencies `[rotary_dim / 2]`, and the factor of cosine and sine."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in (*_STATIC_TYPES, "longrope"):
        raise hf.refuse(
            "rope_parameters.rope_type",
            f"rope type {rope_type!r} is not supported; supported: default, longrope, {', '.join(_STATIC_TYPES)}",
        )
    try:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](hf.config, device="cpu", **options)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # Transformers' function may raise any of these
        raise CheckpointError(
            f"{hf.architecture}: Transformers cannot compute rope type {rope_type!r} from "
            f"rope_parameters={hf.rope_parameters!r}: {error!r}"
        ) from error
    return tuple(inv_freq.tolist()), factor
