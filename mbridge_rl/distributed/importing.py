"""Imports a model from a stream of HF tensors in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.digest import digest
from mbridge_rl.core.errors import BridgeError, StateMismatchError, listed
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.hf.respelled import StoredPieces
from mbridge_rl.hf.state import check_hf_tensor, is_ignored

Stream = Iterable[tuple[str, Tensor]]


def import_stream(
    spec: ModelSpec, plan: Plan, targets: Mapping[str, Tensor], stream: Stream, group: RankGroup, *, in_place: bool
) -> None:
    """Fills `targets` from `stream`, on all ranks of `group` or on none.

    The tensors that arrive go into a second copy of `targets` in host memory, and from there into `targets` when every rank has
    all of them; until then nothing is changed. With `in_place` there is no second copy, and a failure leaves a mixture.

    Args:
        spec: the spec of the model.
        plan: the copies from HF tensors to this rank's tensors.
        targets: this rank's tensors.
        stream: `(hf_name, tensor)`, in any order.
        group: the ranks; all call this together.
        in_place: write to `targets` as tensors arrive.

    Raises:
        StateMismatchError: on all ranks, for the reasons of `_Receiver.take`.
    """
    arriving = targets if in_place else {name: torch.empty_like(tensor, device="cpu") for name, tensor in targets.items()}
    receiver = _Receiver(spec, plan, arriving)
    with group.fail_together():
        try:
            receiver.take(stream)
        except BridgeError as error:
            if not in_place or not receiver.arrived:
                raise
            raise type(error)(f"{error}. The import was in place: {receiver.state()}") from error
    if not in_place:
        for name, tensor in arriving.items():
            targets[name].copy_(tensor)


class _Receiver:
    """Checks tensors as they arrive, and copies the parts of them that this rank holds."""

    def __init__(self, spec: ModelSpec, plan: Plan, targets: Mapping[str, Tensor]) -> None:
        self._spec, self._plan, self._targets = spec, plan, targets
        self._padded = {name for names in plan.padded_names.values() for name in names}
        self._pieces: StoredPieces | None = None
        self._tied = frozenset(spec.aliases.values())
        self._names: set[str] = set()  # names as they are in the stream
        self._first: dict[str, tuple[str, torch.dtype, int]] = {}  # name, dtype and digest of the first of two tied tensors
        self.arrived: set[str] = set()

    def take(self, stream: Stream) -> None:
        """Consumes the stream.

        Raises:
            StateMismatchError: a tensor is unknown, repeated, missing or of the wrong shape. The stream is closed, so that
                other ranks that feed it fail as well.
        """
        iterator = iter(stream)
        try:
            for stored_name, stored in iterator:
                for hf_name, tensor in self._split(stored_name, stored):
                    self._take_one(hf_name, tensor)
        except BaseException:
            if hasattr(iterator, "close"):
                iterator.close()
            raise
        if missing_names := self._spec.hf_shapes.keys() - self.arrived - self._spec.repeated_hf_names:
            raise StateMismatchError(
                f"the stream ended after {len(self.arrived)} of {len(self._spec.hf_shapes)} tensors: "
                f"missing {listed(missing_names)}"
            )

    def state(self) -> str:
        """Describes, for an error message, what the model holds after a failed import in place."""
        return (
            f"{len(self.arrived)} of {len(self._spec.hf_shapes)} tensors are the stream's, the others are what they were; "
            f"load the model again before you use it"
        )

    def _split(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """The tensor under the names of the spec: a stack of experts is split into the tensors of each expert."""
        if name in self._spec.hf_shapes or name in self._spec.aliases:
            return [(name, tensor)]
        if self._pieces is None:
            self._pieces = StoredPieces(self._spec)
        if name not in self._pieces.of_stored:
            return [(name, tensor)]
        self._pieces.check(name, tuple(tensor.shape), "the stream")
        stored = tensor.detach().contiguous()
        return [(piece.hf_name, piece.of(stored)) for piece in self._pieces.of_stored[name]]

    def _take_one(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise StateMismatchError(f"the stream holds {name} twice")
        if is_ignored(self._spec, name):
            return
        self._names.add(name)
        hf_name = self._spec.aliases.get(name, name)
        if hf_name not in self._spec.hf_shapes:
            raise StateMismatchError(f"the stream holds {name}, which {self._spec.architecture} does not have")
        check_hf_tensor(self._spec, hf_name, tensor, "the stream")
        hf_tensor = tensor.detach().contiguous()
        if hf_name in self._tied and self._is_repeated(name, hf_name, hf_tensor):
            return
        for copy in self._plan.by_hf_name.get(hf_name, ()):
            target = self._targets[copy.target.name]
            if copy.target.name in self._padded:
                target.zero_()
                self._padded.discard(copy.target.name)
            copy.target.of(target, copy.shape).copy_(copy.source.of(hf_tensor, copy.shape))
        self.arrived.add(hf_name)

    def _is_repeated(self, name: str, hf_name: str, hf_tensor: Tensor) -> bool:
        """Whether a tied tensor came before, under its other name.

        Raises:
            StateMismatchError: the tensor that came before was not the same.
        """
        content = (hf_tensor.dtype, digest(hf_tensor))
        if hf_name not in self._first:
            self._first[hf_name] = (name, *content)
            return False
        first, *other = self._first[hf_name]
        if other != [*content]:
            raise StateMismatchError(
                f"the stream holds a {name} that is not its {first}, and this model was built tied (tie_word_embeddings), so "
                f"that it has one tensor for both: build it from a config with tie_word_embeddings=False"
            )
        return True
