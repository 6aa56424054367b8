"""The functions of CUDA that Megatron-core calls, implemented on the CPU.

`device_patches` lists the replacements as `(owner, attribute, value)`; `CudaToCpu` redirects tensor creation and moves.
`mbridge_rl.megatron.cpu.runtime` applies both inside of a scope and undoes them. Importing this module changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mbridge_rl.megatron.versions.cpu import missing_names

Patch = tuple[Any, str, Any]


def _to_cpu(device: Any) -> Any:
    """`device`, or "cpu" if it names a CUDA device."""
    return "cpu" if isinstance(device, (str, torch.device)) and str(device).startswith("cuda") else device


_DEVICE_OPTIONS = frozenset({"device", "pin_memory"})
_MOVES = frozenset({Tensor.cuda, Tensor.pin_memory, Tensor.record_stream, Tensor.to, Tensor.type})


class CudaToCpu(TorchFunctionMode):
    """Runs torch functions on the CPU that were called for CUDA. Like every mode it acts only in the thread that entered it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and not _DEVICE_OPTIONS.isdisjoint(kwargs):
            kwargs = {name: _to_cpu(value) for name, value in kwargs.items() if name != "pin_memory"}
        if func in _MOVES:  # a fast test, since this method runs on every torch call of a training step
            if func is Tensor.to:
                args = tuple(_to_cpu(argument) for argument in args)
            elif func is Tensor.record_stream:
                return None
            elif func is not Tensor.type:
                return args[0]
            elif len(args) == 1 and not kwargs:
                # Megatron's optimizers sort parameters by names like 'torch.cuda.FloatTensor' and refuse any other.
                return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


class NullStream:
    """A CUDA stream or event without pending work: every method returns the object itself."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., NullStream]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._nothing

    def _nothing(self, *_: Any, **__: Any) -> NullStream:
        return self


@contextlib.contextmanager
def _null_stream_context(_: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _get_rng_state(*_: Any, **__: Any) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: Tensor, *_: Any, **__: Any) -> None:
    torch.default_generator.set_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _current_device(*_: Any) -> torch.device:
    return torch.device("cpu")


def device_patches() -> list[Patch]:
    """Replacements that make `torch.cuda` work on a CPU: one device, streams without work, and the CPU generator as the CUDA
    one.

    Megatron's tensor-parallel RNG tracker swaps the states of that one generator, so dropout and initialisation follow
    Megatron's rules (equal or different over the tensor-parallel group) as on a GPU.
    """
    cuda = torch.cuda
    return [
        (cuda, "current_device", _current_device),
        (cuda, "synchronize", _nothing),
        (cuda, "Stream", NullStream),
        (cuda, "Event", NullStream),
        (cuda, "current_stream", NullStream),
        (cuda, "default_stream", NullStream),
        (cuda, "stream", _null_stream_context),
        (cuda, "manual_seed", _manual_seed),
        (cuda, "get_rng_state", _get_rng_state),
        (cuda, "set_rng_state", _set_rng_state),
        (dist, "all_gather", _uneven_all_gather(dist.all_gather)),
        (dist, "reduce_scatter", _uneven_reduce_scatter(dist.reduce_scatter)),
    ]


def megatron_patches(random: ModuleType, moe_utils: ModuleType, token_dispatcher: ModuleType) -> list[Patch]:
    """Replacements inside Megatron-core's own modules, which are arguments because the runtime imports them."""
    rng_log = logging.getLogger(random.__name__)
    patches: list[Patch] = [
        (random, "_get_cuda_rng_state", _get_rng_state),
        (random, "_set_cuda_rng_state", _set_rng_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _as_host_value),
        (rng_log, "filters", [*rng_log.filters, _is_not_about_cpu_rng]),
    ]
    return [*patches, *missing_names(moe_utils)]


def _is_not_about_cpu_rng(record: logging.LogRecord) -> bool:
    """Filters out the tracker's warning that the CPU generator moved while it held the CUDA generator: here they are the
    same."""
    return "CPU RNG state changed" not in record.getMessage()


def _as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Converts the split sizes of all_to_all to host values. Megatron converts only tensors that are on CUDA."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather` for parts of unequal length (MoE with expert tensor parallelism), which gloo lacks: pad, gather, cut."""

    def gather(
        tensor_list: Sequence[Tensor], tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> Any:
        lengths = [len(part) if part.dim() else 1 for part in tensor_list]
        if len(set(lengths)) <= 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        if async_op:
            raise NotImplementedError("an asynchronous all_gather of unequal parts is not available on gloo")
        longest = max(lengths)
        padded = [tensor.new_zeros(longest, *tensor.shape[1:]) for _ in tensor_list]
        own = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        all_gather(padded, own, group=group)
        for part, source in zip(tensor_list, padded, strict=True):
            part.copy_(source[: len(part)])
        return None

    return gather


def _uneven_reduce_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """`reduce_scatter` for parts of unequal length, which gloo lacks: all-reduce and take this rank's part."""

    def scatter(
        output: Tensor,
        input_list: Sequence[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        lengths = [len(part) if part.dim() else 1 for part in input_list]
        if len(set(lengths)) <= 1:
            return reduce_scatter(output, list(input_list), op=op, group=group, async_op=async_op)
        if async_op:
            raise NotImplementedError("an asynchronous reduce_scatter of unequal parts is not available on gloo")
        total = torch.cat(list(input_list))
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.split(lengths)[dist.get_rank(group)])
        return None

    return scatter
