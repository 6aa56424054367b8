"""Mapping rules: how one Megatron tensor is made of Hugging Face tensors, as data.

One primitive covers every rule in use. A Megatron tensor is a sequence of `groups` along `dim`; each group holds, one after
the other, an equal slice of each of its `parts`, and a part is a sub-grid of one HF tensor. Tensor parallelism deals equal
ranges of the fused tensor to ranks: whole groups, or parts of one where ranks outnumber groups.

    fused QKV        parts q, k, v        groups = KV heads      [q q q q k v | q q q q k v | ...]
    gated MLP        parts gate, up       groups = ranks         [gate up | gate up | ...]
    column, row      one part             groups = ranks
    replicated       one part             not dealt at all

A part names the axes of its HF tensor, each cut out of a factored shape: an axis runs along a dimension of the Megatron
tensor, or stands still at an index (one expert of a stack, the odd columns of an interleaved pair). So transposed, stacked,
interleaved and concatenated HF tensors are all the same rule with other axes.

Names are patterns: `{layer}` and `{expert}` stand for global indices on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import prod
from typing import Literal

import torch

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import Coordinates, ParallelLayout, padded_vocab_size

ShardAxis = Literal["tp", "etp"]
Placement = Literal[
    "layer", "first_stage", "last_stage", "last_stage_copy", "last_layer_stage", "prediction_stage", "prediction_stage_copy"
]


EXPERT = "expert"


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an HF tensor's factored shape, as a part uses it.

    Attributes:
        extent: its whole size.
        along: the dimension of the Megatron tensor that it runs along, `None` where it stands still. Several axes along one
            dimension are its digits, slowest first.
        start, size: the range that the part takes; `size=None` takes the rest. An axis that stands still takes `start` alone.
        index: `EXPERT` makes the instance's expert index the start.
    """

    extent: int
    along: int | None = None
    start: int = 0
    size: int | None = None
    index: Literal["expert"] | None = None

    @property
    def count(self) -> int:
        """How many indices the part takes."""
        if self.along is None:
            return 1
        return self.extent - self.start if self.size is None else self.size


@dataclass(frozen=True, slots=True)
class Part:
    """A sub-grid of one HF tensor inside a Megatron tensor.

    Attributes:
        axes: the factored shape; its row-major order is the HF tensor's.
        hf_shape: the HF tensor's own shape, where it is not the factored one.
    """

    hf_name: str
    axes: tuple[Axis, ...]
    hf_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole HF tensor."""
        return self.hf_shape or tuple(axis.extent for axis in self.axes)

    def size(self, dim: int) -> int:
        """What the part contributes along dimension `dim` of the Megatron tensor."""
        return prod(axis.count for axis in self.axes if axis.along == dim)


# What is fused: whole HF tensors by name and size along the fused dimension, or any parts.
Parts = Mapping[str, int] | Sequence[Part]


@dataclass(frozen=True, slots=True)
class Rule:
    """How `megatron_name` (a pattern) is made of `parts`.

    Attributes:
        shape: of the whole Megatron tensor, with its extent along `dim` left open (0 there): the parts' sum.
        dim: the dimension along which parts are fused and shards are cut.
        axis: which tensor-parallel axis cuts it, `None` for replicated tensors.
        groups: number of fused groups, fixed by the model (KV heads); `None` makes one group per rank of `axis`. Ranks that
            outnumber the groups share them: each takes its range of rows, wherever that cuts.
        padded: Megatron rounds the extent up to a multiple of the axis (vocabularies); the tail belongs to no HF tensor.
        placement: which pipeline stage holds it. `last_stage_copy` is the output layer of a tied model: a second copy of the
            embedding that exists only where the last stage is not also the first. `prediction_stage` is where multi-token
            prediction layers are, and `prediction_stage_copy` their copy of the embedding, likewise.
        layers: the decoder layers it exists in, `None` for all.
        repeats: its HF tensors say again what other rules say of the same Megatron tensor (a checkpoint's copies of the
            embedding): exports write them, imports leave them alone.
        dtype: of the HF tensor whatever the dtype of the others (router biases stay fp32), `None` for the checkpoint's.
    """

    megatron_name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dim: int = 0
    axis: ShardAxis | None = None
    groups: int | None = None
    padded: bool = False
    placement: Placement = "layer"
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    repeats: bool = False

    @property
    def extent(self) -> int:
        """Size of the fused tensor along `dim`, unpadded."""
        return sum(part.size(self.dim) for part in self.parts)

    def axis_size(self, layout: ParallelLayout) -> int:
        return 1 if self.axis is None else layout.tp if self.axis == "tp" else layout.expert_tp

    def axis_rank(self, at: Coordinates) -> int:
        return 0 if self.axis is None else at.tp if self.axis == "tp" else at.etp

    def local_shape(self, layout: ParallelLayout) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        extent = padded_vocab_size(self.extent, layout.tp, layout.vocab_multiple) if self.padded else self.extent
        return (*self.shape[: self.dim], extent // self.axis_size(layout), *self.shape[self.dim + 1 :])

    def validate(self, layout: ParallelLayout) -> None:
        """Raises LayoutError where the shards would not be equal."""
        ranks = self.axis_size(layout)
        if self.padded or ranks == 1:
            return
        if self.groups is not None:
            if self.groups % ranks and (ranks % self.groups or self.extent % ranks):
                raise LayoutError(
                    f"{self.megatron_name}: {self.groups} groups (KV heads) do not divide by {self.axis}={ranks}; "
                    f"choose a divisor or a multiple of {self.groups}"
                )
            return
        for part in self.parts:
            if part.size(self.dim) % ranks:
                raise LayoutError(
                    f"{self.megatron_name}: {part.hf_name} has {part.size(self.dim)} entries along dimension {self.dim}, "
                    f"which do not divide by {self.axis}={ranks}; choose a divisor"
                )


@dataclass(frozen=True, slots=True)
class Instance:
    """A rule at one layer and expert: concrete names."""

    rule: Rule
    megatron_name: str
    hf_names: tuple[str, ...]
    layer: int | None
    expert: int | None


def instantiate(rules: Sequence[Rule], num_layers: int, num_experts: int | None) -> list[Instance]:
    """Every tensor of the model, in checkpoint order: layer by layer and, inside a layer, expert by expert."""
    instances: list[Instance] = []
    for layered, block in groupby(rules, key=lambda rule: rule.placement == "layer"):
        layer_rules = list(block)
        for layer in range(num_layers) if layered else [None]:
            instances += _in_layer(layer_rules, layer, num_experts or 0)
    return instances


def _in_layer(rules: Iterable[Rule], layer: int | None, num_experts: int) -> Iterator[Instance]:
    present = [rule for rule in rules if rule.layers is None or layer in rule.layers]
    for per_expert, block in groupby(present, key=lambda rule: "{expert}" in rule.megatron_name):
        expert_rules = list(block)
        for expert in range(num_experts) if per_expert else [None]:
            for rule in expert_rules:
                yield Instance(
                    rule=rule,
                    megatron_name=rule.megatron_name.format(layer=layer, expert=expert),
                    hf_names=tuple(part.hf_name.format(layer=layer, expert=expert) for part in rule.parts),
                    layer=layer,
                    expert=expert,
                )


def replicated(
    megatron_name: str,
    hf_name: str,
    shape: Sequence[int],
    *,
    placement: Placement = "layer",
    dtype: torch.dtype | None = None,
) -> Rule:
    """The same tensor on every rank: norms, routers."""
    return Rule(megatron_name, (whole(hf_name, shape),), (0, *shape[1:]), placement=placement, dtype=dtype)


def column_parallel(megatron_name: str, parts: Parts, inner: Sequence[int] = (), *, axis: ShardAxis = "tp") -> Rule:
    """Output features dealt to ranks. `parts` maps HF names to output sizes; each part is cut separately, so
    `{gate: ffn, up: ffn}` is the gated MLP `[gate | up]` of every rank. `inner` is `(input size,)`, or `()` for biases."""
    return Rule(megatron_name, _parts(parts, inner), (0, *inner), axis=axis)


def row_parallel(megatron_name: str, hf_name: str, shape: Sequence[int], *, axis: ShardAxis = "tp") -> Rule:
    """Input features dealt to ranks: `[output, input / ranks]`."""
    return Rule(megatron_name, (whole(hf_name, shape),), (shape[0], 0), dim=1, axis=axis)


def grouped_parallel(megatron_name: str, parts: Parts, groups: int, inner: Sequence[int] = ()) -> Rule:
    """Fused tensors whose groups the model fixes: QKV by KV head."""
    return Rule(megatron_name, _parts(parts, inner), (0, *inner), axis="tp", groups=groups)


def vocabulary_parallel(megatron_name: str, hf_name: str, shape: Sequence[int], *, placement: Placement) -> Rule:
    """`[vocab, hidden]` dealt by rows, padded so that ranks hold equal shares."""
    return Rule(megatron_name, (whole(hf_name, shape),), (0, *shape[1:]), axis="tp", padded=True, placement=placement)


def renamed(rules: Iterable[Rule], prefixes: Mapping[str, str]) -> tuple[Rule, ...]:
    """The same rules for a checkpoint that says `prefixes[x]` where theirs says `x` at the beginning of a name; of several
    that fit, the longest counts."""
    return tuple(
        replace(rule, parts=tuple(replace(part, hf_name=renamed_hf_name(part.hf_name, prefixes)) for part in rule.parts))
        for rule in rules
    )


def renamed_hf_name(hf_name: str, prefixes: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in prefixes if hf_name.startswith(prefix)), key=len, default=None)
    return hf_name if prefix is None else prefixes[prefix] + hf_name.removeprefix(prefix)


def whole(hf_name: str, shape: Sequence[int]) -> Part:
    """A whole HF tensor whose dimensions are the Megatron tensor's."""
    return Part(hf_name, tuple(Axis(extent, along=dim) for dim, extent in enumerate(shape)))


def stacked(hf_name: str, sizes: Sequence[int], inner: Sequence[int] = ()) -> tuple[Part, ...]:
    """The parts of one HF tensor that has `sizes` rows of each, one below the other."""
    starts, rest = accumulate(sizes, initial=0), tuple(Axis(extent, along=dim) for dim, extent in enumerate(inner, start=1))
    return tuple(Part(hf_name, (Axis(sum(sizes), 0, start, size), *rest)) for start, size in zip(starts, sizes, strict=False))


def _parts(parts: Parts, inner: Sequence[int]) -> tuple[Part, ...]:
    if not isinstance(parts, Mapping):
        return tuple(parts)
    return tuple(whole(hf_name, (size, *inner)) for hf_name, size in parts.items())
