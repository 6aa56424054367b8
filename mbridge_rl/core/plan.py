"""Plans: which rectangle goes from which source to which target.

A plan is the intersection of two lists of segments in HF coordinates. It holds names and offsets, never tensors, so it is
compiled once and stays right when tensors are offloaded, replaced or merged between two runs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from torch import Tensor

from mbridge_rl.core.digest import contiguous_strides
from mbridge_rl.core.errors import PlanError
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
        return Box(self.shape, self.shape).volume


@dataclass(frozen=True)
class Plan:
    """All copies between two groups of ranks, in checkpoint order.

    Attributes:
        hf_shapes: the HF tensors that travel, in checkpoint order.
        padded_names: per target rank, the local tensors whose tail no HF tensor fills (the executor zeroes it).
    """

    hf_shapes: Mapping[str, Shape]
    copies: tuple[Copy, ...]
    padded_names: Mapping[int, tuple[str, ...]]

    def from_rank(self, rank: int) -> list[Copy]:
        return [copy for copy in self.copies if copy.source_rank == rank]

    def to_rank(self, rank: int) -> list[Copy]:
        return [copy for copy in self.copies if copy.target_rank == rank]

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

    def word_elements(self, hf_name: str, element_size: int) -> int:
        """How many elements of `hf_name` make one digest word: 8 bytes' worth where every cut allows it, else 1."""
        wanted = 8 // element_size
        columns = self.hf_shapes[hf_name][-1] if self.hf_shapes[hf_name] else 1
        cuts = [columns]
        for copy in self.by_hf_name[hf_name]:
            cuts += [copy.hf.offset, *copy.shape[-1:]]
            cuts += [stride for stride, size in zip(copy.hf.strides[:-1], copy.shape[:-1], strict=True) if size > 1]
        return 1 if wanted < 1 or any(cut % wanted for cut in cuts) else wanted


def compile_plan(hf_shapes: Mapping[str, Shape], sources: Mapping[int, Side], targets: Mapping[int, Side]) -> Plan:
    """Plans every byte that `targets` hold, from `sources`. Ranks that hold the same box share the work evenly.

    Args:
        hf_shapes: every HF tensor of the model, in checkpoint order; copies come in this order.

    Raises:
        PlanError: a region of an HF tensor that a target holds and no source does.
    """
    held_boxes = _holders(sources)
    wanted = _by_hf_name(targets)
    owners = _share(held_boxes, wanted, sources)
    copies: list[Copy] = []
    for hf_name, segments in ((hf_name, wanted[hf_name]) for hf_name in hf_shapes if hf_name in wanted):
        strides = contiguous_strides(hf_shapes[hf_name])
        held = {box: holders[owners[hf_name, frozenset(holders)]] for box, holders in held_boxes.get(hf_name, {}).items()}
        copies += _coalesced(copy for rank, segment in segments for copy in _fill(rank, segment, held, strides))
    padded_names = {rank: side.padded_names for rank, side in targets.items()}
    return Plan({name: shape for name, shape in hf_shapes.items() if name in wanted}, tuple(copies), padded_names)


Held = tuple[int, Segment]


def _holders(sides: Mapping[int, Side]) -> dict[str, dict[Box, dict[int, Held]]]:
    """Who holds each box of each HF tensor; a rank that holds a box twice (tied embeddings) counts once."""
    holders: dict[str, dict[Box, dict[int, Held]]] = defaultdict(dict)
    for rank, side in sides.items():
        for segment in side.segments:
            holders[segment.hf_name].setdefault(segment.box, {}).setdefault(rank, (rank, segment))
    return holders


def _share(
    held_boxes: Mapping[str, Mapping[Box, Mapping[int, Held]]], wanted: Iterable[str], ranks: Iterable[int]
) -> dict[tuple[str, frozenset[int]], int]:
    """Who sends what, where several could: the largest pieces first, each to the least loaded of its holders (Graham's LPT
    rule). Boxes of one HF tensor that the same ranks hold stay together, so that the groups of a fused tensor travel as one.
    """
    volumes: dict[tuple[str, frozenset[int]], int] = defaultdict(int)
    for hf_name in wanted:
        for box, holders in held_boxes.get(hf_name, {}).items():
            volumes[hf_name, frozenset(holders)] += box.volume
    load = dict.fromkeys(ranks, 0)
    owners = {}
    for piece, volume in sorted(volumes.items(), key=lambda item: (len(item[0][1]) > 1, -item[1])):
        owners[piece] = min(piece[1], key=lambda rank: (load[rank], rank))
        load[owners[piece]] += volume
    return owners


def _by_hf_name(sides: Mapping[int, Side]) -> dict[str, list[tuple[int, Segment]]]:
    grouped: dict[str, list[tuple[int, Segment]]] = defaultdict(list)
    for rank, side in sides.items():
        for segment in side.segments:
            grouped[segment.hf_name].append((rank, segment))
    return grouped


def _fill(rank: int, target: Segment, held: Mapping[Box, Held], hf_strides: Shape) -> Iterator[Copy]:
    """Copies that cover `target` exactly once."""
    covered = 0
    for box, (source_rank, source) in held.items():
        overlap = target.box.intersect(box)
        if overlap is None:
            continue
        covered += overlap.volume
        yield Copy(
            source_rank,
            rank,
            overlap.size,
            View(source.local_name, source.offset_of(overlap), source.strides),
            View(target.local_name, target.offset_of(overlap), target.strides),
            View(target.hf_name, sum(a * stride for a, stride in zip(overlap.start, hf_strides, strict=True)), hf_strides),
        )
    if covered != target.box.volume:
        raise PlanError(
            f"{target.hf_name}: rank {rank} needs {target.box.volume} elements of box {target.box.start}+{target.box.size} "
            f"for {target.local_name}, the sources hold {covered} of them; both sides must come from the same model"
        )


def _coalesced(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Merges runs of equal rectangles at constant distances (the KV groups of a fused QKV) into one strided copy."""
    run: list[Copy] = []
    for copy in copies:
        if run and not _continues(run, copy):
            yield _merged(run)
            run = []
        run.append(copy)
    if run:
        yield _merged(run)


def _continues(run: list[Copy], copy: Copy) -> bool:
    last = run[-1]
    alike = (last.source_rank, last.target_rank, last.shape) == (copy.source_rank, copy.target_rank, copy.shape)
    steps = _steps(run[0], run[1]) if len(run) > 1 else _steps(last, copy)
    pairs = ((last.source, copy.source), (last.target, copy.target), (last.hf, copy.hf))
    return alike and all(before.followed_by(after, step) for (before, after), step in zip(pairs, steps, strict=True))


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
    views = (first.source, first.target, first.hf)
    source, target, hf = (
        replace(view, strides=(step, *view.strides)) for view, step in zip(views, _steps(first, run[1]), strict=True)
    )
    return replace(first, shape=(len(run), *first.shape), source=source, target=target, hf=hf)
