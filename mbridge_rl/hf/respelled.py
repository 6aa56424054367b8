"""Reads checkpoints that hold a model's tensors under other names than its mapping, or several of them in one tensor.

Transformers 5 holds the experts of a layer in two stacked tensors in memory, and saves them so with
`save_original_format=False`, where the family's checkpoints have two or three tensors per expert. Each of these is a run of
adjacent bytes of the stack. So such a checkpoint can be read like one in the family's own format, and exports and syncs have
the family's own names, which every engine reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.rules import HFPart, Instance
from mbridge_rl.core.segments import Shape
from mbridge_rl.core.stacked_experts import in_memory_spec
from mbridge_rl.hf.state import Described


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A tensor of the mapping that is a run of elements of a stored tensor, from element `first` on."""

    hf_name: str
    stored_name: str
    first: int
    shape: Shape

    def of(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1)[self.first : self.first + prod(self.shape)].view(self.shape)


class StoredPieces:
    """The pieces of all tensors that have another name or shape in Transformers' memory than in the mapping.

    Attributes:
        of_stored: the pieces of each stored tensor, by its name.
        shapes: the shapes of these stored tensors.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.of_stored: dict[str, list[StoredPiece]] = {}
        self.shapes: dict[str, Shape] = {}
        if (in_memory := in_memory_spec(spec)) is None:
            return
        for own, stored_instance in zip(spec.instances, in_memory.instances, strict=True):
            stored_parts = (stored_instance.hf_names, stored_instance.rule.parts)
            parts = zip(own.hf_names, own.rule.parts, *stored_parts, strict=True)
            for hf_name, part, stored_name, stored in parts:
                if stored_name == hf_name:
                    continue
                first = _first_element(stored, stored_instance) - _first_element(part, own)
                piece = StoredPiece(hf_name, stored_name, first, part.shape)
                pieces = self.of_stored.setdefault(stored_name, [])
                if piece not in pieces[-1:]:  # several parts of one tensor follow each other
                    pieces.append(piece)
                self.shapes[stored_name] = stored.shape

    def among(self, names: Mapping[str, object]) -> list[StoredPiece]:
        """The pieces of the stored tensors that are in `names`, without pieces whose own names are in `names`."""
        stored = (name for name in self.of_stored if name in names)
        return [piece for name in stored for piece in self.of_stored[name] if piece.hf_name not in names]

    def check(self, stored_name: str, shape: Shape, where: str) -> None:
        """Raises StateMismatchError if a stored tensor has another shape."""
        if tuple(shape) != self.shapes[stored_name]:
            raise StateMismatchError(
                f"{where}: {stored_name} has shape {list(shape)}, the config says {list(self.shapes[stored_name])}. "
                f"Nothing was changed"
            )


class Respelled(Mapping[str, Tensor]):
    """Stored tensors by the names of the mapping; pieces are views. The last stored tensor that was read is kept in memory,
    since it may be expensive to read (dequantized) and its pieces are read one after the other.

    Args:
        described: names, dtypes and shapes of `tensors`.

    Attributes:
        tensors: names, dtypes and shapes by the mapping; nothing is read for them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pieces: list[StoredPiece], described: Mapping[str, Described]) -> None:
        self._tensors, self._pieces = tensors, {piece.hf_name: piece for piece in pieces}
        self._last: tuple[str, Tensor] | None = None
        stored = {piece.stored_name for piece in pieces}
        self._names = [*(name for name in tensors if name not in stored), *self._pieces]
        self.tensors = {
            **{
                name: HFTensor(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in described.items()
                if name not in stored
            },
            **{piece.hf_name: HFTensor(piece.hf_name, described[piece.stored_name].dtype, piece.shape) for piece in pieces},
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


class StoredEntry(Protocol):
    """The entry of a tensor in a file's header."""

    @property
    def shape(self) -> Shape: ...

    def piece(self, first: int, shape: Shape) -> StoredEntry:
        """The entry of `shape` elements from element `first` on."""


StoredT = TypeVar("StoredT", bound=StoredEntry)


def respell_entries(spec: ModelSpec, entries: MutableMapping[str, StoredT], where: str) -> None:
    """Replaces entries of a checkpoint's files with the names or shapes of Transformers' memory by entries of the mapping.

    Raises:
        StateMismatchError: a stack of experts has another shape than the config says.
    """
    if spec.hf_shapes.keys() <= entries.keys():
        return
    pieces = StoredPieces(spec)
    present = pieces.among(entries)
    stored = {piece.stored_name: entries.pop(piece.stored_name) for piece in present if piece.stored_name in entries}
    for name, entry in stored.items():
        pieces.check(name, entry.shape, where)
    entries.update({piece.hf_name: stored[piece.stored_name].piece(piece.first, piece.shape) for piece in present})


def respelled(
    spec: ModelSpec, tensors: Mapping[str, Tensor], described: Mapping[str, Described], where: str
) -> Respelled | None:
    """The tensors of a state dict by the names of the mapping; `None` if they have these names already. Raises the errors of
    `respell_entries`."""
    if spec.hf_shapes.keys() <= tensors.keys():
        return None
    pieces = StoredPieces(spec)
    if not (present := pieces.among(described)):
        return None
    for name in {piece.stored_name for piece in present}:
        pieces.check(name, tuple(described[name].shape), where)
    return Respelled(tensors, present, described)


def _first_element(part: HFPart, instance: Instance) -> int:
    """The index of the first element that the part takes of its tensor."""
    first, step = 0, prod(part.shape)
    for axis in part.axes:
        step //= axis.extent
        start = instance.expert or 0 if axis.index else axis.start
        first += start * step
    return first
