"""Learns where every element of every HF tensor lands, by running the model's own `load_weights` on tensors without data.

A `TracedTensor` looks like the HF tensor to the loader. Underneath it is a meta tensor of the same shape, on which the
loader's view operations (narrow, chunk, transpose, ...) really run; its offset and strides then say which elements of the HF
tensor the view has. A dispatch mode sees every operation. A copy into a parameter is recorded but *not* carried out, and so is
every other write to a parameter (zero-filled padding), so that a running engine's weights do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.landing import Landing, ShapedView

logger = logging.getLogger(__name__)

_MAX_REJECTED = 16  # each rejection costs another run over the names; more than a few mean the wrong model

_ELEMENTWISE = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


@dataclass
class Trace:
    """A record of what one worker's loader does with the announced tensors."""

    landings: dict[str, list[Landing]] = field(default_factory=dict)
    filled: dict[str, list[ShapedView]] = field(
        default_factory=dict
    )  # parameter name -> regions that are set to a constant (padding)
    untraceable: dict[str, str] = field(default_factory=dict)  # hf_name -> what the loader does other than copying views
    rejected: dict[str, str] = field(default_factory=dict)  # hf_name -> the loader's own error
    complete: bool = True  # False if the trace was given up after too many rejections


class TracedTensor(Tensor):
    """An HF tensor, or a view of one, without data."""

    hf_name: str
    source: Tensor  # a meta tensor of one byte per element; its strides and offset count elements, whatever the dtype is

    @staticmethod
    def __new__(cls, hf_name: str, source: Tensor, dtype: torch.dtype, device: torch.device) -> TracedTensor:
        traced = Tensor._make_wrapper_subclass(
            cls,
            source.shape,
            strides=source.stride(),
            storage_offset=source.storage_offset(),
            dtype=dtype,
            device=device,
        )
        traced.hf_name = hf_name
        traced.source = source
        return traced

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} is used on a traced tensor outside of the trace")


class _Recorder(TorchDispatchMode):
    """Carries out views on the tensors without data, records writes to parameters, and runs everything else as it is.

    A tensor that is used otherwise than by copying a view is noted as untraceable, and the trace goes on with a stand-in of the
    right shape.
    """

    def __init__(self, tensors: dict[str, Tensor], trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.current = ""  # the tensor that the loader took last
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                self._by_storage.setdefault(_storage_key(tensor), []).append((name, tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traced = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TracedTensor)]
        if func._schema.is_mutable:
            return self._write(func, args, kwargs, traced)
        if not traced:
            return func(*args, **kwargs)
        return self._read(func, args, kwargs, traced[0])

    def _write(self, func: Any, args: Any, kwargs: Any, traced: list[TracedTensor]) -> Any:
        target = args[0]
        if isinstance(target, TracedTensor):
            return self._note(target, f"its loader changes the loaded tensor in place ({func})", target)
        place = self._place(target)
        if place is None:
            if not traced:
                return func(*args, **kwargs)
            return self._note(traced[0], f"its loader writes it to a temporary tensor ({func})", target)
        parameter_name, view = place
        if traced and func is torch.ops.aten.copy_.default:
            source = traced[0].source.expand(view.shape)
            landing = Landing(traced[0].hf_name, parameter_name, _view_of(source), view)
            self.trace.landings.setdefault(landing.hf_name, []).append(landing)
        elif traced:
            self._note(traced[0], f"its loader writes it to {parameter_name} by {func}", target)
        elif func in _FILLS:
            self.trace.filled.setdefault(parameter_name, []).append(view)
        else:
            reason = f"its loader computes {parameter_name} from more than the loaded values ({func})"
            self.trace.untraceable.setdefault(self.current, reason)
        return target

    def _read(self, func: Any, args: Any, kwargs: Any, first: TracedTensor) -> Any:
        if func in _ELEMENTWISE:
            dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device") or first.device
            if is_narrower(dtype, first.dtype):
                self._note(first, f"its loader casts it from {first.dtype} to {dtype}", None)
            return TracedTensor(first.hf_name, first.source, dtype, device)
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and func is not torch.ops.aten.view.dtype
        if is_view:
            result = func(*tree_map_only(TracedTensor, lambda tensor: tensor.source, args), **kwargs)
            return tree_map_only(Tensor, lambda view: TracedTensor(first.hf_name, view, first.dtype, first.device), result)
        self._note(first, f"its loader computes with it ({func})", None)
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), (args, kwargs)
        )
        return tree_map_only(
            Tensor,
            lambda meta: TracedTensor(first.hf_name, meta.to(torch.uint8), meta.dtype, first.device),
            func(*args, **kwargs),
        )

    def _note(self, tensor: TracedTensor, reason: str, result: Any) -> Any:
        self.trace.untraceable.setdefault(tensor.hf_name, reason)
        return result

    def _place(self, target: Tensor) -> tuple[str, ShapedView] | None:
        """The parameter of which `target` is a view, and its place relative to that parameter's first element."""
        for name, tensor in self._by_storage.get(_storage_key(target), ()):
            offset = target.storage_offset() - tensor.storage_offset()
            extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if 0 <= offset <= extent or not target.numel():
                return name, ShapedView(offset, tuple(target.shape), tuple(target.stride()))
        return None


def is_narrower(held: torch.dtype, sent: torch.dtype) -> bool:
    """Whether parameters of dtype `held` cannot hold all values of dtype `sent`. fp8 fits only itself, because another dtype
    would lack its scales."""
    is_fp8 = any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in (sent, held))
    return sent != held and (is_fp8 or torch.promote_types(sent, held) != held)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _view_of(tensor: Tensor) -> ShapedView:
    return ShapedView(tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))


def parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that a loader may write to, by name. A tensor with several names appears once; parameters come first."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def trace_load_weights(model: nn.Module, metadata: Sequence[HFTensor], device: torch.device) -> Trace:
    """Runs `model.load_weights` on all of `metadata`, without data and without changing the model.

    Tensors that the loader refuses, or uses otherwise than by copying views, are reported in the trace; they raise nothing.

    Raises:
        EngineMismatch: the loader replaces parameters instead of writing into them.
    """
    tensors = parameters_and_buffers(model)
    before = {name: tensor.data for name, tensor in tensors.items()}
    trace, remaining = Trace(), list(metadata)
    while (rejected := _run(model, remaining, device, tensors, trace)) is not None:
        if len(trace.rejected) >= _MAX_REJECTED:
            trace.complete = False
            break
        remaining = [tensor for tensor in remaining if tensor.hf_name != rejected]
        trace.landings.clear()
        trace.filled.clear()
    for hf_name in trace.untraceable.keys() | trace.rejected.keys():
        trace.landings.pop(hf_name, None)
    _require_unreplaced(model, before)
    return trace


def _run(
    model: nn.Module, metadata: list[HFTensor], device: torch.device, tensors: dict[str, Tensor], trace: Trace
) -> str | None:
    """Runs the loader once. If it refuses a tensor, notes its error in `trace` and returns the name of the tensor."""
    recorder = _Recorder(tensors, trace)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for tensor in metadata:
            recorder.current = tensor.hf_name
            source = torch.empty(tensor.shape, dtype=torch.uint8, device="meta")
            yield tensor.hf_name, TracedTensor(tensor.hf_name, source, tensor.dtype, device)

    load_weights: Callable[[Iterator[tuple[str, Tensor]]], Any] = model.load_weights  # type: ignore[assignment]
    try:
        with torch.no_grad(), recorder:
            load_weights(stream())
    except Exception as error:  # a loader is foreign code: any error means that it refuses this tensor
        if not recorder.current:
            raise
        trace.rejected[recorder.current] = f"{type(error).__name__}: {error}"
        return recorder.current
    return None


def _require_unreplaced(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = parameters_and_buffers(model)
    replaced = [name for name, data in before.items() if name not in after or after[name].data_ptr() != data.data_ptr()]
    for name in replaced:
        if name in after:
            after[name].data = before[name]
    if replaced:
        raise EngineMismatch(
            f"{type(model).__name__}.load_weights replaces parameters instead of writing into them, so that a running engine "
            f"cannot be updated in place: {', '.join(replaced[:8])}"
        )
