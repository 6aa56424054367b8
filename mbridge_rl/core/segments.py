"""Sides: which box of which HF tensor lies where in which local tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.layout import Coordinates, ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Instance, Rule

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """`[start, start + size)` along every dimension of an HF tensor."""

    start: Shape
    size: Shape

    @property
    def volume(self) -> int:
        volume = 1
        for size in self.size:
            volume *= size
        return volume

    def intersect(self, other: Box) -> Box | None:
        start, size = [], []
        for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True):
            first, stop = max(a, b), min(a + n, b + m)
            if stop <= first:
                return None
            start.append(first)
            size.append(stop - first)
        return Box(tuple(start), tuple(size))


@dataclass(frozen=True, slots=True)
class Segment:
    """Box `box` of HF tensor `hf_name` is the strided view `(offset, strides)` (elements) of local tensor `local_name`."""

    hf_name: str
    box: Box
    local_name: str
    offset: int
    strides: Shape

    def offset_of(self, box: Box) -> int:
        """Where the sub-box `box` begins in the local tensor."""
        moves = zip(box.start, self.box.start, self.strides, strict=True)
        return self.offset + sum((to - begin) * stride for to, begin, stride in moves)


@dataclass(frozen=True)
class Side:
    """What one rank (or file, or engine worker) holds: shapes of its tensors, and their segments in HF order."""

    shapes: Mapping[str, Shape]
    segments: tuple[Segment, ...]

    @property
    def padded_names(self) -> tuple[str, ...]:
        """Local tensors with elements that belong to no HF tensor (vocabulary padding)."""
        held = dict.fromkeys(self.shapes, 0)
        for segment in self.segments:
            held[segment.local_name] += segment.box.volume
        return tuple(name for name, shape in self.shapes.items() if held[name] != Box(shape, shape).volume)


def hf_side(spec: ModelSpec) -> Side:
    """Whole HF tensors: a checkpoint, a state dict, a stream."""
    whole = ((name, shape, Box((0,) * len(shape), shape)) for name, shape in spec.hf_shapes.items())
    segments = tuple(Segment(name, box, name, 0, contiguous_strides(shape)) for name, shape, box in whole)
    return Side(spec.hf_shapes, segments)


def megatron_side(spec: ModelSpec, layout: ParallelLayout, rank: int) -> Side:
    """What Megatron rank `rank` holds, under global names (layer and expert indices count over the whole model).

    Raises:
        LayoutError: the model cannot be cut this way.
    """
    spec.validate(layout)
    at = layout.coordinates(rank)
    stages = layout.stage_of_layer(spec.num_layers)
    shapes: dict[str, Shape] = {}
    segments: list[Segment] = []
    for instance in spec.instances:
        if _holds(instance, spec, layout, at, stages):
            shapes[instance.megatron_name] = instance.rule.local_shape(layout)
            segments += _shard(instance, layout, at)
    return Side(shapes, tuple(segments))


def _holds(instance: Instance, spec: ModelSpec, layout: ParallelLayout, at: Coordinates, stages: list[int]) -> bool:
    if instance.expert is not None and instance.expert // (spec.num_experts // layout.ep) != at.ep:
        return False
    match instance.rule.placement:
        case "layer":
            return stages[instance.layer] % layout.pp == at.pp
        case "first_stage":
            return at.pp == 0
        case "last_stage":
            return at.pp == layout.pp - 1
        case "last_stage_copy":
            return layout.pp > 1 and at.pp == layout.pp - 1


def _shard(instance: Instance, layout: ParallelLayout, at: Coordinates) -> Iterator[Segment]:
    """One segment per part and group of the shard, clipped where padding begins."""
    rule = instance.rule
    local_shape = rule.local_shape(layout)
    strides = contiguous_strides(local_shape)
    for hf_name, first, size, local_start in _pieces(instance, rule, layout, at, local_shape[rule.dim]):
        start = [0] * len(local_shape)
        extent = list(local_shape)
        start[rule.dim], extent[rule.dim] = first, size
        yield Segment(
            hf_name, Box(tuple(start), tuple(extent)), instance.megatron_name, local_start * strides[rule.dim], strides
        )


def _pieces(
    instance: Instance, rule: Rule, layout: ParallelLayout, at: Coordinates, local_extent: int
) -> Iterator[tuple[str, int, int, int]]:
    """`(hf_name, first, size, local start)` along the rule's dim of every piece of this rank's shard."""
    ranks, rank = rule.axis_size(layout), rule.axis_rank(at)
    if rule.padded:
        first = rank * local_extent
        size = min(local_extent, rule.extent - first)
        if size > 0:
            yield instance.hf_names[0], first, size, 0
        return
    groups = rule.groups or ranks
    group_extent = rule.extent // groups
    for local_group in range(groups // ranks):
        group = rank * (groups // ranks) + local_group
        local_start = local_group * group_extent
        for hf_name, part in zip(instance.hf_names, rule.parts, strict=True):
            size = part.size // groups
            yield hf_name, group * size, size, local_start
            local_start += size
