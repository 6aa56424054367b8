"""Does a set of HF tensors match the model? Asked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.model import ModelSpec

_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def check_hf_state(spec: ModelSpec, hf_state: Mapping[str, Tensor], where: str) -> None:
    """Checks names, shapes and dtypes of `hf_state` against the mapping.

    Args:
        where: what the state is, for the message (a path, or "the given state dict").

    Raises:
        StateMismatchError: a missing, unexpected or wrongly shaped tensor, or one that is not floating point.
    """
    missing = spec.hf_shapes.keys() - hf_state.keys()
    extra = {
        hf_name
        for hf_name in hf_state.keys() - spec.hf_shapes.keys() - set(spec.ignored_hf_names)
        if not hf_name.endswith(_IGNORED_SUFFIXES)
    }
    if missing or extra:
        problems = [f"missing {listed(missing)}"] if missing else []
        problems += [f"unexpected {listed(extra)}"] if extra else []
        raise StateMismatchError(
            f"{where} does not match {spec.architecture}: {'; '.join(problems)}. "
            f"Is config.json the one of these weights? Nothing was changed"
        )
    for hf_name, shape in spec.hf_shapes.items():
        tensor = hf_state[hf_name]
        if tuple(tensor.shape) != shape:
            raise StateMismatchError(
                f"{where}: {hf_name} has shape {list(tensor.shape)}, the config says {list(shape)}; nothing was changed"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise StateMismatchError(
                f"{where}: {hf_name} is {tensor.dtype}; only float16, bfloat16, float32 and float64 weights can be "
                f"imported, dequantize it first. Nothing was changed"
            )
