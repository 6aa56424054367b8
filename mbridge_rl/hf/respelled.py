"""Checkpoints that hold a model's tensors under other names than its mapping says, or several of them in one.

What Transformers 5 has in memory, and saves when it is asked not to convert (`save_original_format=False`), stacks the experts
of a layer in two tensors, where the family's checkpoints have two or three tensors per expert. Every one of these is a run of
adjacent bytes of the stack. So such a checkpoint is read as one of the family's own, and exports and syncs have the family's
own names, which every engine reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.rules import Instance, Part
from mbridge_rl.core.segments import Shape
from mbridge_rl.core.stacked_experts import in_memory_spec
from mbridge_rl.hf.state import Described


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the mapping as a run of elements of a stored one."""

    hf_name: str
    stored_name: str
    first: int
    shape: Shape

    def of(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1)[self.first : self.first + prod(self.shape)].view(self.shape)


class Pieces:
    """Where the tensors of a model lie in what Transformers has in memory.

    Attributes:
        of_stored: the pieces of each tensor that is named or shaped otherwise there, by its name.
        shapes: of these tensors.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.of_stored: dict[str, list[Piece]] = {}
        self.shapes: dict[str, Shape] = {}
        if (in_memory := in_memory_spec(spec)) is None:
            return
        for ours, theirs in zip(spec.instances, in_memory.instances, strict=True):
            parts = zip(ours.hf_names, ours.rule.parts, theirs.hf_names, theirs.rule.parts, strict=True)
            for hf_name, part, stored_name, stored in parts:
                if stored_name == hf_name:
                    continue
                first = _first_element(stored, theirs) - _first_element(part, ours)
                piece = Piece(hf_name, stored_name, first, part.shape)
                pieces = self.of_stored.setdefault(stored_name, [])
                if piece not in pieces[-1:]:  # several parts of one tensor follow each other
                    pieces.append(piece)
                self.shapes[stored_name] = stored.shape

    def found(self, names: Mapping[str, object]) -> list[Piece]:
        """The pieces of those tensors that are among `names`, where their own names are not."""
        stored = (name for name in self.of_stored if name in names)
        return [piece for name in stored for piece in self.of_stored[name] if piece.hf_name not in names]

    def check(self, stored_name: str, shape: Shape, where: str) -> None:
        """Raises StateMismatchError where a stored tensor is shaped otherwise."""
        if tuple(shape) != self.shapes[stored_name]:
            raise StateMismatchError(
                f"{where}: {stored_name} has shape {list(shape)}, the config says {list(self.shapes[stored_name])}. "
                f"Nothing was changed"
            )


class Respelled(Mapping[str, Tensor]):
    """Stored tensors by the names of the mapping; pieces are views. The stored tensor that was read last is kept: it may be
    costly to get (dequantized), and its pieces are read one after the other.

    Args:
        described: names and shapes of `tensors`.

    Attributes:
        tensors: names, dtypes and shapes; nothing is read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pieces: list[Piece], described: Mapping[str, Described]) -> None:
        self._tensors, self._pieces = tensors, {piece.hf_name: piece for piece in pieces}
        self._last: tuple[str, Tensor] | None = None
        stored = {piece.stored_name for piece in pieces}
        self._names = [*(name for name in tensors if name not in stored), *self._pieces]
        self.tensors = {
            **{name: HFTensor(name, one.dtype, tuple(one.shape)) for name, one in described.items() if name not in stored},
            **{one.hf_name: HFTensor(one.hf_name, described[one.stored_name].dtype, one.shape) for one in pieces},
        }

    def __getitem__(self, hf_name: str) -> Tensor:
        piece = self._pieces.get(hf_name)
        if piece is None:
            return self._tensors[hf_name]
        if self._last is None or self._last[0] != piece.stored_name:
            self._last = (piece.stored_name, self._tensors[piece.stored_name])
        return piece.of(self._last[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Stored(Protocol):
    """What a file's header says of a tensor."""

    @property
    def shape(self) -> Shape: ...

    def piece(self, first: int, shape: Shape) -> Stored:
        """The entry of `shape` elements from element `first` on."""


StoredT = TypeVar("StoredT", bound=Stored)


def respell_entries(spec: ModelSpec, entries: MutableMapping[str, StoredT], where: str) -> None:
    """Replaces entries of a checkpoint's files that are named or shaped as in Transformers' memory by those of the mapping.

    Raises:
        StateMismatchError: a stack of experts is of another shape than the config says.
    """
    if spec.hf_shapes.keys() <= entries.keys():
        return
    pieces = Pieces(spec)
    found = pieces.found(entries)
    stored = {piece.stored_name: entries.pop(piece.stored_name) for piece in found if piece.stored_name in entries}
    for name, entry in stored.items():
        pieces.check(name, entry.shape, where)
    entries.update({piece.hf_name: stored[piece.stored_name].piece(piece.first, piece.shape) for piece in found})


def respelled(
    spec: ModelSpec, tensors: Mapping[str, Tensor], described: Mapping[str, Described], where: str
) -> Respelled | None:
    """The tensors of a state dict by the names of the mapping, `None` where they have these anyway; raises as
    `respell_entries`."""
    if spec.hf_shapes.keys() <= tensors.keys():
        return None
    pieces = Pieces(spec)
    if not (found := pieces.found(described)):
        return None
    for name in {piece.stored_name for piece in found}:
        pieces.check(name, tuple(described[name].shape), where)
    return Respelled(tensors, found, described)


def _first_element(part: Part, instance: Instance) -> int:
    """Of what the part takes of its tensor."""
    first, step = 0, prod(part.shape)
    for axis in part.axes:
        step //= axis.extent
        start = instance.expert or 0 if axis.index else axis.start
        first += start * step
    return first
