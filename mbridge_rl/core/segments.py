"""Sides of a plan: they say where each box of an HF tensor lies in a local tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import HFPart, Instance, Rule

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """`[start, start + size)` along every dimension of an HF tensor."""

    start: Shape
    size: Shape

    @property
    def volume(self) -> int:
        return prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        if self.start == other.start and self.size == other.size:
            return self
        start, size = [], []
        for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True):
            first = a if a > b else b
            stop = a + n if a + n < b + m else b + m
            if stop <= first:
                return None
            start.append(first)
            size.append(stop - first)
        return Box(tuple(start), tuple(size))

    def cut(self, pieces: int) -> list[Box]:
        """Divides this box into up to `pieces` disjoint boxes of nearly equal size."""
        dim = 0 if self.size and self.size[0] >= pieces else max(range(len(self.size)), key=self.size.__getitem__, default=None)
        if dim is None or pieces <= 1:
            return [self]
        cuts = [self.size[dim] * piece // pieces for piece in range(pieces + 1)]
        return [
            Box(
                (*self.start[:dim], self.start[dim] + first, *self.start[dim + 1 :]),
                (*self.size[:dim], stop - first, *self.size[dim + 1 :]),
            )
            for first, stop in pairwise(cuts)
            if stop > first
        ]

    def cut_at(self, cuts: Sequence[Iterable[int]]) -> list[Box]:
        """The disjoint boxes into which cuts at these places of each dimension divide this box."""
        edges = []
        for start, size, places in zip(self.start, self.size, cuts, strict=True):
            inside = {place for place in places if start < place < start + size}
            edges.append(list(pairwise(sorted({start, start + size, *inside}))))
        return [Box(tuple(first for first, _ in cell), tuple(stop - first for first, stop in cell)) for cell in product(*edges)]


@dataclass(frozen=True, slots=True)
class Segment:
    """Box `box` of HF tensor `hf_name` is the strided view `(offset, strides)` (elements) of local tensor `local_name`, on each
    of `ranks`. The box is given in the tensor's factored shape (`rules.Part.axes`). A segment that `repeats` is never a
    target."""

    hf_name: str
    box: Box
    local_name: str
    offset: int
    strides: Shape
    ranks: tuple[int, ...]
    repeats: bool = False

    def only_on(self, rank: int) -> Segment:
        return Segment(self.hf_name, self.box, self.local_name, self.offset, self.strides, (rank,), self.repeats)

    def within(self, begin: int, stop: int) -> Iterator[Segment]:
        """Yields the part of this segment in elements `[begin, stop)` of the flattened local tensor, as the fewest segments
        that are boxes."""
        axes = sorted(range(len(self.strides)), key=lambda axis: (-self.strides[axis], self.box.size[axis]))
        axes = [axis for axis in axes if self.box.size[axis] > 1]
        digits = [self.box.size[axis] for axis in axes]
        first, last = (self._elements_before(position - self.offset, axes) for position in (begin, stop))
        for start, count in _boxes(digits, first, last - first):
            low, size, faster = list(self.box.start), [1] * len(self.box.size), prod(digits)
            for axis in axes:
                faster //= self.box.size[axis]
                low[axis] += start // faster
                size[axis] = max(1, count // faster)
                start, count = start % faster, min(count, faster)
            box = Box(tuple(low), tuple(size))
            yield Segment(self.hf_name, box, self.local_name, self.offset_of(box), self.strides, self.ranks, self.repeats)

    def _elements_before(self, position: int, axes: Sequence[int]) -> int:
        """The number of this segment's elements before `position`, which is relative to its first element."""
        count, faster = 0, prod(self.box.size)
        if position <= 0:
            return 0
        for axis in axes:
            faster //= self.box.size[axis]
            digit = position // self.strides[axis]
            if digit >= self.box.size[axis]:
                return count + self.box.size[axis] * faster
            count += digit * faster
            position -= digit * self.strides[axis]
        return count + (position > 0)

    def offset_of(self, box: Box) -> int:
        """The offset at which the sub-box `box` begins in the local tensor."""
        offset = self.offset
        for start, own_start, stride in zip(box.start, self.box.start, self.strides, strict=True):
            offset += (start - own_start) * stride
        return offset


@dataclass(frozen=True)
class Side:
    """One end of a plan: the tensors that each of its ranks (or files, or engine workers) holds.

    Attributes:
        segments: all segments, in HF order.
        shapes: the local shape of every local tensor; it is the same on all ranks that have the tensor.
        holders: the ranks that have each local tensor.
        padded_names: names of local tensors with elements that belong to no HF tensor (the tail of a padded vocabulary).
    """

    segments: tuple[Segment, ...]
    shapes: Mapping[str, Shape]
    holders: Mapping[str, tuple[int, ...]]
    padded_names: frozenset[str] = frozenset()

    def on(self, rank: int) -> Side:
        """The part of this side that belongs to one rank."""
        segments = tuple(segment.only_on(rank) for segment in self.segments if rank in segment.ranks)
        shapes = {name: shape for name, shape in self.shapes.items() if rank in self.holders[name]}
        return Side(segments, shapes, dict.fromkeys(shapes, (rank,)), self.padded_names & shapes.keys())

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for ranks in set(self.holders.values()) for rank in ranks}))


def hf_side(spec: ModelSpec, ranks: Sequence[int] = (0,)) -> Side:
    """The side with full HF tensors on each of `ranks`: a checkpoint, a state dict, a stream."""
    holders = tuple(ranks)
    grids = ((hf_name, spec.hf_grid(hf_name)) for hf_name in spec.hf_shapes)
    segments = tuple(
        Segment(hf_name, Box((0,) * len(grid), grid), hf_name, 0, contiguous_strides(grid), holders) for hf_name, grid in grids
    )
    return Side(segments, spec.hf_shapes, dict.fromkeys(spec.hf_shapes, holders))


def megatron_side(spec: ModelSpec, layout: ParallelLayout, rank: int | None = None) -> Side:
    """The side of all Megatron ranks (or of `rank` alone) under global names, whose layer and expert indices count over the
    whole model.

    Raises:
        LayoutError: the layout cannot divide the model.
    """
    spec.validate(layout)
    places = _Places(spec, layout, range(layout.world_size) if rank is None else [rank])
    segments: list[Segment] = []
    shapes: dict[str, Shape] = {}
    holders: dict[str, tuple[int, ...]] = {}
    padded: set[str] = set()
    for instance in spec.instances:
        shards = places.of(instance)
        if not shards:
            continue
        local_shape = instance.rule.local_shape(layout)
        shapes[instance.megatron_name] = local_shape
        holding = (*holders.get(instance.megatron_name, ()), *(rank for ranks in shards.values() for rank in ranks))
        holders[instance.megatron_name] = tuple(sorted(set(holding)))
        if instance.rule.padded:
            padded.add(instance.megatron_name)
        for shard, ranks in shards.items():
            segments += _shard(instance, local_shape, instance.rule.axis_size(layout), shard, ranks)
    return Side(tuple(segments), shapes, holders, frozenset(padded))


class _Places:
    """Computes which ranks hold each shard of an instance; the result is computed once per place and not per tensor."""

    def __init__(self, spec: ModelSpec, layout: ParallelLayout, ranks: Iterable[int]) -> None:
        self._spec, self._layout = spec, layout
        self._at = {rank: layout.coordinates(rank) for rank in ranks}
        self._stages = layout.stage_of_layer(spec.num_layers)
        self._known: dict[tuple[object, ...], dict[int, tuple[int, ...]]] = {}

    def of(self, instance: Instance) -> dict[int, tuple[int, ...]]:
        """`{shard index: ranks}`; empty if none of the ranks holds a shard."""
        stage = self._stage(instance)
        if stage is None:
            return {}
        per_rank = (self._spec.num_experts or 0) // self._layout.ep
        expert_rank = None if instance.expert is None else instance.expert // per_rank
        place = (stage, expert_rank, instance.rule.axis)
        if place not in self._known:
            ranks_of_shard: dict[int, list[int]] = {}
            for rank, at in self._at.items():
                if at.pp == stage and expert_rank in (None, at.ep):
                    ranks_of_shard.setdefault(instance.rule.axis_rank(at), []).append(rank)
            self._known[place] = {shard: tuple(ranks) for shard, ranks in sorted(ranks_of_shard.items())}
        return self._known[place]

    def _stage(self, instance: Instance) -> int | None:
        """The pipeline rank that holds the instance, `None` for a copy that does not exist in this layout."""
        last = self._layout.pp - 1
        match instance.rule.placement:
            case "layer":
                return self._stages[instance.layer] % self._layout.pp
            case "first_stage":
                return 0
            case "last_stage":
                return last
            case "last_stage_copy":
                return last or None
            case "last_layer_stage":
                return self._stages[-1] % self._layout.pp
            case "prediction_stage":
                return self._layout.mtp_stage % self._layout.pp
            case "prediction_stage_copy":
                return self._layout.mtp_stage % self._layout.pp or None


def _shard(instance: Instance, local_shape: Shape, shards: int, shard: int, ranks: tuple[int, ...]) -> Iterator[Segment]:
    """Yields the segments of each part and group of the shard, without its padding."""
    dim, strides = instance.rule.dim, contiguous_strides(local_shape)
    for index, first, size, local_start in pieces(instance.rule, shards, shard, local_shape[dim]):
        hf_name, part = instance.hf_names[index], instance.rule.parts[index]
        for start, count in _boxes([axis.count for axis in part.axes if axis.along == dim], first, size):
            box, hf_strides = _slice_of_part(part, instance, start, count, strides)
            offset = (local_start + start - first) * strides[dim]
            yield Segment(hf_name, box, instance.megatron_name, offset, hf_strides, ranks, instance.rule.repeats)


def pieces(rule: Rule, shards: int, shard: int, local_extent: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields `(index of the part, first, size, local start)` along the rule's dim for every piece of one shard, in its
    order."""
    if rule.padded:
        first = shard * local_extent
        size = min(local_extent, rule.extent - first)
        if size > 0:
            yield 0, first, size, 0
        return
    groups = rule.groups or shards
    group_extent = rule.extent // groups
    begin, stop = shard * local_extent, (shard + 1) * local_extent
    for group in range(begin // group_extent, -(-stop // group_extent)):
        at = group * group_extent
        for index, part in enumerate(rule.parts):
            size = part.size(rule.dim) // groups
            low, high = max(at, begin), min(at + size, stop)
            if low < high:
                yield index, group * size + low - at, high - low, low - begin
            at += size


def _boxes(digits: list[int], first: int, size: int) -> Iterator[tuple[int, int]]:
    """Divides the range `[first, first + size)` of mixed-radix numbers into ranges `(start, count)` that are a box of digits
    each: the rest of the first value of the slowest digit, its complete values, and the beginning of its last value.

    Args:
        digits: the number of values of each digit, slowest first.
    """
    faster = prod(digits[1:])
    rest = min(-first % faster, size)
    over = (size - rest) % faster
    if rest:
        yield from ((first // faster * faster + start, count) for start, count in _boxes(digits[1:], first % faster, rest))
    if size > rest + over:
        yield first + rest, size - rest - over
    if over:
        begin = first + size - over
        yield from ((begin + start, count) for start, count in _boxes(digits[1:], 0, over))


def _slice_of_part(part: HFPart, instance: Instance, first: int, size: int, local_strides: Shape) -> tuple[Box, Shape]:
    """The box of entries `[first, first + size)` along the rule's dim of `part`, and the local stride of each of its axes."""
    starts, sizes, strides = [], [], []
    for position, axis in enumerate(part.axes):
        if axis.along is None:
            start, count, stride = (instance.expert if axis.index else axis.start), 1, 0
        else:
            faster = prod(other.count for other in part.axes[position + 1 :] if other.along == axis.along)
            start, count, stride = axis.start, axis.count, local_strides[axis.along] * faster
            if axis.along == instance.rule.dim:
                start, count = axis.start + first // faster, max(1, size // faster)
                first, size = first % faster, min(size, faster)
        starts.append(start)
        sizes.append(count)
        strides.append(stride)
    return Box(tuple(starts), tuple(sizes)), tuple(strides)
