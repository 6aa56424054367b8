"""Plans: which rectangle goes from which source to which target.

A plan is the intersection of two lists of segments in HF coordinates. It holds names and offsets, never tensors, so it is
compiled once and stays right when tensors are offloaded, replaced or merged between two runs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby
from math import ceil, prod
from operator import mul

from torch import Tensor

from mbridge_rl.core.digest import contiguous_strides, digest_strided
from mbridge_rl.core.errors import PlanError
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.segments import Box, Segment, Shape, Side


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of the tensor `name`, in elements."""

    name: str
    offset: int
    strides: Shape

    def of(self, tensor: Tensor, shape: Shape) -> Tensor:
        """The view itself, `[*shape]`; `tensor` is a contiguous whole."""
        return tensor.as_strided(shape, self.strides, tensor.storage_offset() + self.offset)

    def followed_by(self, other: View, step: int) -> bool:
        return (self.name, self.strides, self.offset + step) == (other.name, other.strides, other.offset)


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangle `[*shape]`: where it is read, where it is written, and what it is in its HF tensor (`hf`)."""

    source_rank: int
    target_rank: int
    shape: Shape
    source: View
    target: View
    hf: View

    @property
    def hf_name(self) -> str:
        return self.hf.name

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def to(self, rank: int) -> Copy:
        """The same for another target rank that holds the same."""
        return Copy(self.source_rank, rank, self.shape, self.source, self.target, self.hf)


@dataclass(frozen=True)
class Plan:
    """All copies between two groups of ranks, in checkpoint order.

    Example, the copies by which the ranks of a trainer make up a checkpoint:

        spec = AutoBridge.from_pretrained(checkpoint).spec
        plan = compile_plan(spec, megatron_side(spec, ParallelLayout(tp=2, pp=2)), hf_side(spec))
        for copy in plan.from_rank(0):
            print(copy.hf_name, copy.shape, "from", copy.source.name, copy.source.offset, "to rank", copy.target_rank)

    Attributes:
        hf_shapes: the HF tensors that travel, in checkpoint order.
        padded_names: per target rank, the local tensors whose tail no HF tensor fills (the executor zeroes it).
    """

    hf_shapes: Mapping[str, Shape]
    copies: tuple[Copy, ...]
    padded_names: Mapping[int, tuple[str, ...]]

    def from_rank(self, rank: int) -> list[Copy]:
        return [copy for copy in self.copies if copy.source_rank == rank]

    @cached_property
    def by_hf_name(self) -> Mapping[str, tuple[Copy, ...]]:
        return {hf_name: tuple(group) for hf_name, group in groupby(self.copies, key=lambda copy: copy.hf_name)}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over every copy; both ends compare it before the first byte."""
        state = hashlib.blake2b(digest_size=8)
        for copy in self.copies:
            state.update(repr(copy).encode())
        return state.hexdigest()


def compile_plan(spec: ModelSpec, source: Side, target: Side, *, same_ranks: bool = False) -> Plan:
    """Plans every byte that `target` holds, from `source`. Source ranks that hold the same box share the work evenly.

    Args:
        spec: the model of both sides; copies come in its checkpoint order.
        same_ranks: rank numbers mean the same processes on both sides; what a rank holds already it takes from itself.

    Raises:
        PlanError: a region of an HF tensor that a target holds and no source does.
    """
    wanted = _by_hf_name(segment for segment in target.segments if not segment.repeats)
    offered = _shared({name: segments for name, segments in _by_hf_name(source.segments).items() if name in wanted}, wanted)
    copies: list[Copy] = []
    for hf_name in (hf_name for hf_name in spec.hf_shapes if hf_name in wanted):
        hf_shape, hf_strides = spec.hf_shapes[hf_name], contiguous_strides(spec.hf_grid(hf_name))
        columns = hf_shape[-1] if hf_shape else 1
        overlaps = [_overlaps(segment, offered.get(hf_name, []), hf_strides) for segment in wanted[hf_name]]
        alike: dict[tuple[int, ...], list[Copy]] = {}
        for rank, held in _held_by_rank(wanted[hf_name]):
            if same_ranks or held not in alike:
                filled = (copy for index in held for copy in _filled(rank, overlaps[index], same_ranks))
                alike[held] = list(_coalesced(filled, columns))
            copies += (copy if copy.target_rank == rank else copy.to(rank) for copy in alike[held])
    hf_shapes = {hf_name: shape for hf_name, shape in spec.hf_shapes.items() if hf_name in wanted}
    padded = [(rank, name) for name in sorted(target.padded_names) for rank in target.holders[name]]
    padded_names = {rank: tuple(name for other, name in padded if other == rank) for rank, _ in padded}
    return Plan(hf_shapes, tuple(copies), padded_names)


def _by_hf_name(segments: Iterable[Segment]) -> dict[str, list[Segment]]:
    grouped: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        grouped[segment.hf_name].append(segment)
    return grouped


def _held_by_rank(segments: Sequence[Segment]) -> list[tuple[int, tuple[int, ...]]]:
    """Rank after rank, each with the indices of its segments: equal for ranks that hold the same."""
    held: dict[int, list[int]] = defaultdict(list)
    for index, segment in enumerate(segments):
        for rank in segment.ranks:
            held[rank].append(index)
    return [(rank, tuple(held[rank])) for rank in sorted(held)]


@dataclass(frozen=True, slots=True)
class _Offer:
    """A box of an HF tensor that `rank` sends to whoever needs it; `holders` could have."""

    box: Box
    rank: int
    holders: Mapping[int, Segment]


@dataclass(frozen=True, slots=True)
class _Overlap:
    """What of a target segment comes from one offer."""

    box: Box
    offer: _Offer
    target: View
    hf: View


# A piece that several ranks hold is cut so that none is larger than this share of a rank's mean load.
_LARGEST_SHARE = 1 / 16


def _shared(segments: Mapping[str, Sequence[Segment]], wanted: Mapping[str, Sequence[Segment]]) -> dict[str, list[_Offer]]:
    """Who sends what, where several could: the largest pieces first, each to the least loaded of its holders (Graham's LPT
    rule); pieces too large for that are cut among them. What many targets want costs its sender as many times.
    """
    boxes = [(hf_name, box, holders) for hf_name, of_name in segments.items() for box, holders in _holders(of_name).items()]
    copies = _copies_wanted(boxes, wanted)
    load = dict.fromkeys((rank for of_name in segments.values() for segment in of_name for rank in segment.ranks), 0.0)
    limit = _LARGEST_SHARE * sum(box.volume * copies[hf_name] for hf_name, box, _ in boxes) / max(1, len(load))
    pieces: list[tuple[float, str, Box, Mapping[int, Segment]]] = []
    for hf_name, box, holders in boxes:
        parts = min(len(holders), ceil(box.volume * copies[hf_name] / limit)) if len(holders) > 1 else 1
        pieces += [(part.volume * copies[hf_name], hf_name, part, holders) for part in box.cut(parts)]
    offers: dict[str, list[_Offer]] = defaultdict(list)
    for cost, hf_name, box, holders in sorted(pieces, key=lambda piece: (len(piece[3]) > 1, -piece[0])):
        rank = min(holders, key=lambda holder: (load[holder], holder))
        load[rank] += cost
        offers[hf_name].append(_Offer(box, rank, holders))
    return offers


def _copies_wanted(boxes: Iterable[tuple[str, Box, object]], wanted: Mapping[str, Sequence[Segment]]) -> dict[str, float]:
    """How often the elements of each HF tensor are sent, on average."""
    offered: dict[str, int] = defaultdict(int)
    for hf_name, box, _ in boxes:
        offered[hf_name] += box.volume
    return {
        hf_name: sum(segment.box.volume * len(segment.ranks) for segment in wanted[hf_name]) / max(1, volume)
        for hf_name, volume in offered.items()
    }


def _holders(segments: Sequence[Segment]) -> dict[Box, Mapping[int, Segment]]:
    """Who holds each of disjoint boxes; a rank that holds one twice (tied embeddings) counts once."""
    boxes = list(dict.fromkeys(segment.box for segment in segments))
    cuts: list[set[int]] = []
    if _some_overlap(boxes):  # a tensor that is K and V of one group, which two ranks share, lies in halves and whole
        cuts = [
            {place for box in boxes for place in (box.start[dim], box.start[dim] + box.size[dim])}
            for dim in range(len(boxes[0].size))
        ]
    holders: dict[Box, dict[int, Segment]] = {}
    for segment in segments:
        for box in segment.box.cut_at(cuts) if cuts else [segment.box]:
            of_box = holders.setdefault(box, {})
            for rank in segment.ranks:
                of_box.setdefault(rank, segment)
    return holders


def _some_overlap(boxes: Sequence[Box]) -> bool:
    """Whether some of these boxes, no two of which are equal, overlap."""
    sizes = {box.size for box in boxes}
    if len(sizes) == 1 and not any(start % size for box in boxes for start, size in zip(box.start, box.size, strict=True)):
        return False  # cells of one grid
    return any(one.intersect(other) is not None for one, other in combinations(boxes, 2))


def _overlaps(target: Segment, offers: Sequence[_Offer], hf_strides: Shape) -> list[_Overlap]:
    """Parts that cover `target` exactly once."""
    overlaps = []
    covered = 0
    for offer in offers:
        box = target.box.intersect(offer.box)
        if box is not None:
            covered += box.volume
            hf = View(target.hf_name, sum(map(mul, box.start, hf_strides)), hf_strides)
            overlaps.append(_Overlap(box, offer, View(target.local_name, target.offset_of(box), target.strides), hf))
    if covered != target.box.volume:
        raise PlanError(
            f"{target.hf_name}: rank {target.ranks[0]} needs {target.box.volume} elements of box {target.box.start}+"
            f"{target.box.size} for {target.local_name}, the sources hold {covered} of them; both sides must come from the "
            f"same model"
        )
    return overlaps


def _filled(rank: int, overlaps: Sequence[_Overlap], same_ranks: bool) -> list[Copy]:
    """What `rank` receives of one segment, sender by sender, in the order of the HF tensor."""
    copies = []
    for overlap in overlaps:
        holders = overlap.offer.holders
        source_rank = rank if same_ranks and rank in holders else overlap.offer.rank
        source = holders[source_rank]
        read = View(source.local_name, source.offset_of(overlap.box), source.strides)
        copies.append(Copy(source_rank, rank, overlap.box.size, read, overlap.target, overlap.hf))
    return sorted(copies, key=lambda copy: (copy.source_rank, copy.hf.offset))


def _coalesced(copies: Iterable[Copy], columns: int) -> Iterator[Copy]:
    """Merges runs of equal rectangles at constant distances (the KV groups of a fused QKV) into one strided copy.

    Only along the rows or the columns of the HF tensor: a diagonal run would be one view as well, but no rectangle of it.
    """
    run: list[Copy] = []
    for copy in copies:
        if run and not _continues(run, copy, columns):
            yield _merged(run)
            run = []
        run.append(copy)
    if run:
        yield _merged(run)


def _continues(run: list[Copy], copy: Copy, columns: int) -> bool:
    last = run[-1]
    alike = (last.source_rank, last.target_rank, last.shape) == (copy.source_rank, copy.target_rank, copy.shape)
    steps = _steps(run[0], run[1]) if len(run) > 1 else _steps(last, copy)
    pairs = ((last.source, copy.source), (last.target, copy.target), (last.hf, copy.hf))
    straight = steps[2] % columns == 0 or run[0].hf.offset // columns == copy.hf.offset // columns
    return (
        alike
        and straight
        and min(steps) >= 0
        and all(before.followed_by(after, step) for (before, after), step in zip(pairs, steps, strict=True))
    )


def _steps(first: Copy, second: Copy) -> tuple[int, int, int]:
    return (
        second.source.offset - first.source.offset,
        second.target.offset - first.target.offset,
        second.hf.offset - first.hf.offset,
    )


def _merged(run: list[Copy]) -> Copy:
    if len(run) == 1:
        return run[0]
    first = run[0]
    source, target, hf = (
        View(view.name, view.offset, (step, *view.strides))
        for view, step in zip((first.source, first.target, first.hf), _steps(first, run[1]), strict=True)
    )
    return Copy(first.source_rank, first.target_rank, (len(run), *first.shape), source, target, hf)


def copy_digest(copy: Copy, part: Tensor, tensor: HFTensor) -> int:
    """Digest of the rectangle that `copy` moves, from its values `part` `[*copy.shape]`."""
    return digest_strided(part, columns=tensor.columns, offset=copy.hf.offset, strides=copy.hf.strides)
