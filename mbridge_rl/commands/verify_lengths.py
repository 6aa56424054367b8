"""The lengths of the sequences whose logits `mbridge-rl verify` compares. Some features of a config act only after a number of
positions (windows, other rotary frequencies, scales of positions, the next chunk of a recurrence), so that shorter sequences
would not test them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SHORT = 64
_BEYOND = 32  # number of positions that are compared after the last switch
_COUNTED_IN_POSITIONS = re.compile(r"window|chunk")
_COUNTED_IN_LAYERS = re.compile(r"layer|pattern")
_MOST_COMPARED = 256  # positions of one sequence whose logits are compared


@dataclass(frozen=True, order=True)
class Switch:
    """A change of the computation after `positions` tokens.

    Attributes:
        name: the field of the config that determines the number of positions.
    """

    positions: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}={self.positions}"


@dataclass(frozen=True)
class Lengths:
    """The lengths to compare.

    Attributes:
        covered: the switches within the longest sequence.
        left_out: the switches after its end.
    """

    lengths: tuple[int, ...]
    covered: tuple[Switch, ...]
    left_out: tuple[Switch, ...]


def lengths_for(hf_config: Any, most: int) -> Lengths:
    """The length of a short sequence, which ends before all switches if that is possible, and of one that goes beyond all
    switches within `most` positions."""
    all_switches = switches(hf_config)
    covered = tuple(switch for switch in all_switches if switch.positions + _BEYOND <= most)
    left_out = tuple(switch for switch in all_switches if switch not in covered)
    usual = min(SHORT, most)
    before = min((switch.positions for switch in covered), default=usual)
    past = max((switch.positions + _BEYOND for switch in covered), default=usual)
    return Lengths(tuple(sorted({min(before, usual), max(past, usual)})), covered, left_out)


def switches(hf_config: Any) -> tuple[Switch, ...]:
    """All switches of a config, except those after the model's own greatest length."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    reach = getattr(text, "max_position_embeddings", None) or math.inf
    all_switches = {*_windows(text), *_rotary_switches(text)}
    return tuple(sorted(switch for switch in all_switches if switch.positions < reach or "dynamic" in switch.name))


def longest(hf_config: Any, available: int) -> int:
    """The longest sequence that Transformers' eager attention computes in a quarter of `available` bytes: three fp32 matrices
    of positions for every head, and twice the logits."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    heads, vocabulary = getattr(text, "num_attention_heads", 1), getattr(text, "vocab_size", 1)
    quadratic, linear = 12 * heads, 8 * vocabulary
    budget = available / 4
    return max(SHORT, int((math.sqrt(linear**2 + 4 * quadratic * budget) - linear) / (2 * quadratic)))


def compared_positions(length: int) -> list[int]:
    """The positions of a sequence whose logits are compared: all, or half of them evenly spaced and half at the end."""
    if length <= _MOST_COMPARED:
        return list(range(length))
    half = _MOST_COMPARED // 2
    evenly = (place * (length - half) // half for place in range(half))
    return [*evenly, *range(length - half, length)]


def _windows(text: Any) -> Iterator[Switch]:
    for name, value in text.to_dict().items():
        counted = _COUNTED_IN_POSITIONS.search(name) and not _COUNTED_IN_LAYERS.search(name)
        if counted and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield Switch(value, name)


def _rotary_switches(text: Any) -> Iterator[Switch]:
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", "default")
        original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        if kind == "dynamic":
            yield Switch(original or text.max_position_embeddings, "max_position_embeddings (dynamic)")
        elif original and (kind == "longrope" or rope.get("llama_4_scaling_beta")):
            yield Switch(original, "original_max_position_embeddings")
