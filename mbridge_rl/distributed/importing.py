"""Taking a model in from a stream of HF tensors, whatever their order."""

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

    What arrives goes into a second copy of `targets` in host memory, and from there into `targets` when every rank has all of
    it: until then nothing is changed. With `in_place` there is no second copy, and a failure leaves a mixture.

    Args:
        plan: from whole HF tensors to this rank's tensors.
        targets: this rank's tensors.

    Raises:
        StateMismatchError: on all ranks: see `_Receiver.take`.
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
    """Checks tensors as they come and copies what this rank keeps of them."""

    def __init__(self, spec: ModelSpec, plan: Plan, targets: Mapping[str, Tensor]) -> None:
        self._spec, self._plan, self._targets = spec, plan, targets
        self._padded = {name for names in plan.padded_names.values() for name in names}
        self._pieces: StoredPieces | None = None
        self._tied = frozenset(spec.aliases.values())
        self._names: set[str] = set()  # as the stream says them
        self._first: dict[str, tuple[str, torch.dtype, int]] = {}  # of tied tensors: name, dtype and digest of what came first
        self.arrived: set[str] = set()

    def take(self, stream: Stream) -> None:
        """Consumes the stream.

        Raises:
            StateMismatchError: an unknown, repeated, missing or wrongly shaped tensor. The stream is closed, so that ranks who
                feed it together hear of it.
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
        if missing := self._spec.hf_shapes.keys() - self.arrived - self._spec.repeated_hf_names:
            raise StateMismatchError(
                f"the stream ended after {len(self.arrived)} of {len(self._spec.hf_shapes)} tensors: missing {listed(missing)}"
            )

    def state(self) -> str:
        return (
            f"{len(self.arrived)} of {len(self._spec.hf_shapes)} tensors are the stream's, the others are what they were; "
            f"load the model again before you use it"
        )

    def _split(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """What the tensor is by the names of the mapping: a stack of experts is the tensors of each."""
        if name in self._spec.hf_shapes or name in self._spec.aliases:
            return [(name, tensor)]
        if self._pieces is None:
            self._pieces = StoredPieces(self._spec)
        if name not in self._pieces.of_stored:
            return [(name, tensor)]
        self._pieces.check(name, tuple(tensor.shape), "the stream")
        whole = tensor.detach().contiguous()
        return [(piece.hf_name, piece.of(whole)) for piece in self._pieces.of_stored[name]]

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
        whole = tensor.detach().contiguous()
        if hf_name in self._tied and self._is_repeated(name, hf_name, whole):
            return
        for copy in self._plan.by_hf_name.get(hf_name, ()):
            target = self._targets[copy.target.name]
            if copy.target.name in self._padded:
                target.zero_()
                self._padded.discard(copy.target.name)
            copy.target.of(target, copy.shape).copy_(copy.source.of(whole, copy.shape))
        self.arrived.add(hf_name)

    def _is_repeated(self, name: str, hf_name: str, whole: Tensor) -> bool:
        """Whether a tied tensor came before, under its other name.

        Raises:
            StateMismatchError: what came then was not the same.
        """
        content = (whole.dtype, digest(whole))
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
