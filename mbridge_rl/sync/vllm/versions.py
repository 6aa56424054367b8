"""The differences between the releases of vLLM that this library works with (0.29 to 0.33), each with the release that
brought it.

Nothing else in this library asks for vLLM's version or tries whether vLLM has something. A difference is recognized by what
vLLM has, not by its number, so that builds between two releases work as well. vLLM is imported inside the functions.

* 0.30 routes experts on a CPU by `CPURouter`; before, the kernel of the experts does it, with what it reads from their layer.
* 0.31 lets the client of an in-process engine shut it down when it is garbage-collected.
* 0.32 labels tokens with the weights that sampled them.
* 0.33 rewrote `WeightSource`: `metadata` became a property, `ParamMeta` got `owners`, and `iter_full` yields what a rank owns.
* 0.33 refuses new requests while generation is paused with mode `abort` or `wait`; before, they waited.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mbridge_rl.core.errors import missing_vllm
from mbridge_rl.core.releases import Releases

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta


T = TypeVar("T")

VLLM = Releases(
    "vllm",
    oldest=(0, 29),
    newest_tested=(0, 33),
    reason="its weight-transfer engines and its engines' constructors have other interfaces than those that mbridge_rl uses",
)


def require_vllm(purpose: str) -> None:
    """Imports vLLM and checks its release.

    Args:
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        ImportError: vLLM is not installed, or is too old.
    """
    if find_spec("vllm") is None:
        raise missing_vllm(purpose)
    import vllm

    if vllm.__version__[:1].isdigit():  # a checkout that was never installed calls itself "dev"
        VLLM.check(vllm.__version__)
    from vllm import outputs

    if not hasattr(outputs, "WeightVersionSpan"):
        warnings.warn(
            f"vLLM {vllm.__version__} does not label tokens with the weights that sampled them, as 0.32 does: if a commit "
            "keeps requests in flight (requests='keep'), all of their tokens count as sampled by the newer weights. Use "
            "'wait' or 'abort' where that matters",
            UserWarning,
            stacklevel=2,
        )


class Metadata(list):  # type: ignore[type-arg]
    """The metadata of a `WeightSource`. vLLM reads it as a property since 0.33, and calls it as a method before."""

    def __call__(self) -> list[ParamMeta]:
        return list(self)


def param_meta(name: str, dtype: torch.dtype, shape: tuple[int, ...], owners: Sequence[int] | None) -> ParamMeta:
    """The metadata of one tensor.

    Args:
        name: its `hf_name`.
        dtype: its dtype.
        shape: its shape.
        owners: the trainer ranks that yield it; `None` means all. vLLM takes it since 0.33.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta

    if owners is None or "owners" not in {field.name for field in fields(ParamMeta)}:
        return ParamMeta(name, dtype, shape)
    return ParamMeta(name, dtype, shape, owners=tuple(owners))


def cpu_router() -> Any:
    """The class that routes experts on a CPU; `None` before 0.30."""
    try:
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    except ModuleNotFoundError:
        return None
    return CPURouter


ATTRIBUTES_OF_EXPERT_LAYERS = (
    "moe_config",
    "activation",
    "use_grouped_topk",
    "renormalize",
    "scoring_func",
    "custom_routing_function",
)
"""What a kernel of experts on a CPU reads from their layer; the last four before 0.30."""


def with_weights(apply: Callable[..., T], weights: Callable[[], tuple[Tensor, Tensor]]) -> Callable[..., T]:
    """The method `apply` of a kernel of experts with the present `weights` in place of its arguments `w1` and `w2`, which have
    another position before 0.30."""
    signature = inspect.signature(apply)

    def apply_with_weights(*args: Any, **kwargs: Any) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["w1"], bound.arguments["w2"] = weights()
        return apply(*bound.args, **bound.kwargs)

    return apply_with_weights


def keep_when_collected(client: Any) -> None:
    """Makes sure that an in-process engine is not shut down when its client is garbage-collected. The shutdown destroys every
    process group of the process: the trainer's, and those of other engines."""
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


def weight_version_spans(sample: Any) -> Sequence[Any]:
    """The tokens of a completion by the label of the weights that sampled them (vLLM's `WeightVersionSpan`). It is empty before
    0.32; `require_vllm` warns of that."""
    return getattr(sample, "weight_versions", None) or ()


def refused_while_paused() -> tuple[type[Exception], ...]:
    """The errors of a request that came while generation was paused, and may be made again; none before 0.33."""
    from vllm import exceptions

    error = getattr(exceptions, "RetryableRequestError", None)
    return () if error is None else (error,)
