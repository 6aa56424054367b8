"""A live Transformers module as a side of a plan: where the tensors of a checkpoint lie in its parameters.

Transformers holds some tensors in memory in another form than on disk (the experts of a layer in one tensor) and converts them
when it loads and saves. Its own conversion for saving is run here once, on tensors without data that record of which parameter
they are a view. So no family needs rules for this, and one description serves for reading and for writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mbridge_rl.core.errors import StateMismatchError, UnsupportedModelError, listed
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.segments import Box, Segment, Side
from mbridge_rl.hf.state import check_hf_state

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class HFModule(Mapping[str, Tensor]):
    """The parameters and saved buffers of a Transformers module, by their names in it; they share the module's memory.

    Attributes:
        side: the side of a plan that describes every HF tensor as a view of one of them.

    Raises:
        StateMismatchError: the module is not the model of `spec`, or has no data yet.
        UnsupportedModelError: Transformers computes the saved tensors by more than a rearrangement.
    """

    def __init__(self, spec: ModelSpec, module: nn.Module, ranks: Sequence[int] = (0,)) -> None:
        self._tensors = module.state_dict()
        if without := [name for name, tensor in self._tensors.items() if tensor.is_meta]:
            raise StateMismatchError(f"{type(module).__name__} holds no data yet (meta device): {listed(without)}")
        self._saved = saved_views(module, self._tensors)
        check_hf_state(spec, self._saved, f"the module {type(module).__name__}")
        self.side = self._side(spec, tuple(ranks))
        self._check_ties(type(module).__name__)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def hf_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every HF tensor."""
        return {segment.hf_name: self._tensors[segment.local_name].dtype for segment in self.side.segments}

    def _side(self, spec: ModelSpec, ranks: tuple[int, ...]) -> Side:
        segments = []
        for hf_name in spec.hf_shapes:
            saved, grid = self._saved[hf_name], spec.hf_grid(hf_name)
            try:
                strides = saved.view_of_parameter.view(grid).stride()
            except RuntimeError as error:
                raise UnsupportedModelError(f"{hf_name} lies scattered in {saved.parameter_name}: {error}") from error
            box = Box((0,) * len(grid), grid)
            segments.append(
                Segment(hf_name, box, saved.parameter_name, saved.view_of_parameter.storage_offset(), strides, ranks)
            )
        shapes = {name: tuple(self._tensors[name].shape) for name in dict.fromkeys(segment.local_name for segment in segments)}
        return Side(tuple(segments), shapes, dict.fromkeys(shapes, ranks))

    def _check_ties(self, module_name: str) -> None:
        """Checks that every saved tensor outside of the side is tied to a tensor of the side."""
        data_of_side = {self._tensors[name].data_ptr() for name in self.side.shapes}
        untied = [
            saved.parameter_name
            for saved in self._saved.values()
            if saved.parameter_name not in self.side.shapes and saved.data_in not in data_of_side
        ]
        if untied:
            raise StateMismatchError(
                f"{module_name}: {listed(untied)} should be tied and is not: call its tie_weights() first or, if it is meant "
                f"to be another tensor, make the bridge from the module's checkpoint, or from a config with "
                f"tie_word_embeddings=False"
            )


class SavedView(Tensor):
    """The tensor that Transformers would save under one name: a view of the parameter `parameter_name`, without data."""

    parameter_name: str
    view_of_parameter: Tensor  # meta: shape, offset and strides in elements of the parameter
    data_in: int

    @staticmethod
    def __new__(cls, name: str, view: Tensor, dtype: torch.dtype, data_in: int) -> SavedView:
        saved = Tensor._make_wrapper_subclass(
            cls, view.shape, strides=view.stride(), storage_offset=view.storage_offset(), dtype=dtype, device="cpu"
        )
        saved.parameter_name, saved.view_of_parameter, saved.data_in = name, view, data_in
        return saved

    def changed(self, view: Tensor, dtype: torch.dtype | None = None) -> SavedView:
        return SavedView(self.parameter_name, view, dtype or self.dtype, self.data_in)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Applies views to the tensor without data, and skips copies."""
        kwargs = kwargs or {}
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, SavedView))
        if func in _COPIES:
            return first.changed(first.view_of_parameter, kwargs.get("dtype"))
        returns = func._schema.returns
        if not returns or returns[0].alias_info is None or returns[0].alias_info.is_write:
            raise UnsupportedModelError(
                f"Transformers computes what it saves of {first.parameter_name} by {func}, which is no rearrangement: take the "
                "module's checkpoint (save_pretrained) instead of the module"
            )
        args = tree_map_only(SavedView, lambda saved: saved.view_of_parameter, args)
        return tree_map_only(Tensor, first.changed, func(*args, **kwargs))


def saved_views(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, SavedView]:
    """`{hf_name: view}` of all tensors that Transformers would save."""
    from transformers.core_model_loading import revert_weight_conversion

    unsaved = getattr(module, "_keys_to_ignore_on_save", None) or ()
    parameters = {
        name: SavedView(
            name,
            torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"),
            tensor.dtype,
            tensor.data_ptr(),
        )
        for name, tensor in tensors.items()
        if name not in unsaved
    }
    return revert_weight_conversion(module, parameters)
