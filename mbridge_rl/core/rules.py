"""Mapping rules: how one Megatron tensor is composed of Hugging Face tensors, as data.

One primitive covers every rule in use. A Megatron tensor is a sequence of `groups` along `dim`; each group holds, one after
the other, an equal slice of each of its `parts`, and a part is a sub-grid of one HF tensor. Tensor parallelism gives every rank
an equal range of the fused tensor: full groups, or parts of a group if there are more ranks than groups.

    fused QKV        parts q, k, v        groups = KV heads      [q q q q k v | q q q q k v | ...]
    gated MLP        parts gate, up       groups = ranks         [gate up | gate up | ...]
    column, row      one part             groups = ranks
    replicated       one part             not sharded

A part names the axes of its HF tensor, in a factored shape: an axis runs along a dimension of the Megatron tensor, or has a
fixed index (one expert of a stack, the odd columns of an interleaved pair). Transposed, stacked, interleaved and concatenated
HF tensors therefore have the same rules with other axes.

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
        extent: the axis's full size.
        along: the dimension of the Megatron tensor along which it runs, `None` for an axis with a fixed index. Several axes
            along one dimension are its digits, slowest first.
        start, size: the range that the part takes; `size=None` takes the rest. With a fixed index only `start` is taken.
        index: `EXPERT` fixes the axis at the instance's expert index.
    """

    extent: int
    along: int | None = None
    start: int = 0
    size: int | None = None
    index: Literal["expert"] | None = None

    @property
    def count(self) -> int:
        """The number of indices that the part takes."""
        if self.along is None:
            return 1
        return self.extent - self.start if self.size is None else self.size


@dataclass(frozen=True, slots=True)
class HFPart:
    """A sub-grid of one HF tensor inside a Megatron tensor.

    Attributes:
        axes: the axes of the factored shape; its row-major order is the HF tensor's.
        hf_shape: the HF tensor's own shape, if it is not the factored one.
    """

    hf_name: str
    axes: tuple[Axis, ...]
    hf_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full HF tensor."""
        return self.hf_shape or tuple(axis.extent for axis in self.axes)

    def size(self, dim: int) -> int:
        """The part's size along dimension `dim` of the Megatron tensor."""
        return prod(axis.count for axis in self.axes if axis.along == dim)


# The parts of a fused tensor: full HF tensors by name and size along the fused dimension, or any parts.
Parts = Mapping[str, int] | Sequence[HFPart]


@dataclass(frozen=True, slots=True)
class Rule:
    """How the Megatron tensors of `megatron_name` (a pattern) are composed of `parts`.

    Attributes:
        shape: the shape of the full Megatron tensor, with 0 along `dim`, where the size is the sum of the parts.
        dim: the dimension along which parts are fused and shards are cut.
        axis: the tensor-parallel axis that shards the tensor, `None` for replicated tensors.
        groups: number of fused groups, fixed by the model (KV heads, blocks of an expert's rows); `None` makes one group per
            rank of `axis`. If there are more ranks than groups, ranks share them: each takes its range of rows, wherever that
            cuts a group.
        padded: whether Megatron rounds the extent up to a multiple of the axis (vocabularies); the tail belongs to no HF
            tensor.
        placement: which pipeline stage holds the tensor. `last_stage_copy` is the output layer of a tied model: a second copy
            of the embedding that exists only where the last stage is not also the first. `prediction_stage` is the stage of the
            multi-token prediction layers, and `prediction_stage_copy` their copy of the embedding, likewise.
        layers: the decoder layers in which the tensor exists, `None` for all.
        repeats: whether its HF tensors repeat those of other rules of the same Megatron tensor (a checkpoint's copies of the
            embedding): exports write them, imports ignore them.
        dtype: the HF tensor's dtype if it does not depend on the checkpoint's (router biases stay fp32), `None` for the
            checkpoint's.
    """

    megatron_name: str
    parts: tuple[HFPart, ...]
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
                kind = "KV heads" if self.axis == "tp" else "blocks of rows"
                raise LayoutError(
                    f"{self.megatron_name}: {self.groups} groups ({kind}) do not divide by {self.axis}={ranks}; "
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
    """A rule for one layer and expert, with concrete names."""

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
    """A rule for a tensor that is the same on every rank: norms, routers."""
    return Rule(megatron_name, (full_tensor(hf_name, shape),), (0, *shape[1:]), placement=placement, dtype=dtype)


def column_parallel(megatron_name: str, parts: Parts, inner: Sequence[int] = (), *, axis: ShardAxis = "tp") -> Rule:
    """A rule for a tensor whose output features are sharded. `parts` maps HF names to output sizes; each part is sharded
    separately, so `{gate: ffn, up: ffn}` gives every rank a gated MLP `[gate | up]`. `inner` is `(input size,)`, or `()` for
    biases."""
    return Rule(megatron_name, _parts(parts, inner), (0, *inner), axis=axis)


def row_parallel(megatron_name: str, hf_name: str, shape: Sequence[int], *, axis: ShardAxis = "tp") -> Rule:
    """A rule for a tensor whose input features are sharded: `[output, input / ranks]`."""
    return Rule(megatron_name, (full_tensor(hf_name, shape),), (shape[0], 0), dim=1, axis=axis)


def grouped_parallel(megatron_name: str, parts: Parts, groups: int, inner: Sequence[int] = ()) -> Rule:
    """A rule for a fused tensor whose number of groups is fixed by the model: QKV by KV head."""
    return Rule(megatron_name, _parts(parts, inner), (0, *inner), axis="tp", groups=groups)


def vocabulary_parallel(megatron_name: str, hf_name: str, shape: Sequence[int], *, placement: Placement) -> Rule:
    """A rule for `[vocab, hidden]`, sharded by rows and padded so that ranks hold equal shares."""
    return Rule(megatron_name, (full_tensor(hf_name, shape),), (0, *shape[1:]), axis="tp", padded=True, placement=placement)


def renamed(rules: Iterable[Rule], prefixes: Mapping[str, str]) -> tuple[Rule, ...]:
    """The same rules for a checkpoint whose names begin with `prefixes[x]` where the rules' names begin with `x`; if several
    fit, the longest `x` counts."""
    return tuple(
        replace(rule, parts=tuple(replace(part, hf_name=renamed_hf_name(part.hf_name, prefixes)) for part in rule.parts))
        for rule in rules
    )


def renamed_hf_name(hf_name: str, prefixes: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in prefixes if hf_name.startswith(prefix)), key=len, default=None)
    return hf_name if prefix is None else prefixes[prefix] + hf_name.removeprefix(prefix)


def full_tensor(hf_name: str, shape: Sequence[int]) -> HFPart:
    """The part that is a full HF tensor with the dimensions of the Megatron tensor."""
    return HFPart(hf_name, tuple(Axis(extent, along=dim) for dim, extent in enumerate(shape)))


def stacked(hf_name: str, sizes: Sequence[int], inner: Sequence[int] = ()) -> tuple[HFPart, ...]:
    """The parts of one HF tensor that holds them one below the other, with `sizes` rows."""
    starts, rest = accumulate(sizes, initial=0), tuple(Axis(extent, along=dim) for dim, extent in enumerate(inner, start=1))
    return tuple(HFPart(hf_name, (Axis(sum(sizes), 0, start, size), *rest)) for start, size in zip(starts, sizes, strict=False))


def _parts(parts: Parts, inner: Sequence[int]) -> tuple[HFPart, ...]:
    if not isinstance(parts, Mapping):
        return tuple(parts)
    return tuple(full_tensor(hf_name, (size, *inner)) for hf_name, size in parts.items())
