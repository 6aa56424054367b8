"""A rank's live tensors by their global Megatron names: what `LiveParameters` and `LiveAdapters` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.segments import Side


class LiveTensors(Mapping[str, Tensor]):
    """Parameters by global `megatron_name`. Subclasses fill `_parameters`, and may change what reading one gives."""

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}

    def __getitem__(self, megatron_name: str) -> Tensor:
        return self._parameters[megatron_name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def parameter(self, megatron_name: str) -> Tensor:
        """The parameter (or buffer) object itself, which is the optimizers' key."""
        return self._parameters[megatron_name]

    def stored(self, megatron_name: str) -> Tensor:
        """The values that the parameter itself has, without adapters and scales; imports write into this tensor."""
        return self._parameters[megatron_name].detach()

    def check(self, side: Side, rank: int) -> None:
        """Compares names and shapes with those of the mapping.

        Raises:
            StateMismatchError: they differ; the message names the rank and the parameters.
        """
        missing, extra = side.shapes.keys() - self._parameters.keys(), self._parameters.keys() - side.shapes.keys()
        if missing or extra:
            raise StateMismatchError(
                f"rank {rank}: the Megatron model is not the one of this config: "
                f"it lacks [{listed(missing)}], it has besides [{listed(extra)}]; build it with AutoBridge.build_model"
            )
        for name, shape in side.shapes.items():
            if tuple(self._parameters[name].shape) != shape:
                raise StateMismatchError(
                    f"rank {rank}: {name} has shape {list(self._parameters[name].shape)}, "
                    f"the config and layout say {list(shape)}; nothing was changed"
                )
