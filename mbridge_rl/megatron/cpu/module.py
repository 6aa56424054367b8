"""The base class of the modules of the pure-torch Transformer Engine, with parameters as Transformer Engine makes and saves
them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Initializer = Callable[[Tensor], Any]


class TransformerEngineModule(torch.nn.Module):
    """The common part of all TE modules: the creation of parameters, and an (empty) FP8 state."""

    fp8 = False
    fp8_calibration = False
    save_original_input = False

    def __init__(
        self,
        *,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        self._params_dtype = params_dtype or torch.get_default_dtype()
        self._device = device or "cpu"
        self._get_rng_state_tracker = get_rng_state_tracker
        self._rng_tracker_name = rng_tracker_name
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}
        self.tp_group: torch.distributed.ProcessGroup | None = None

    def _fork_rng(self) -> contextlib.AbstractContextManager[Any]:
        if self._get_rng_state_tracker is None:
            return contextlib.nullcontext()
        named = () if self._rng_tracker_name is None else (self._rng_tracker_name,)
        return self._get_rng_state_tracker().fork(*named)

    def _parameter(self, shape: int | tuple[int, ...], init: Initializer, **attributes: Any) -> Parameter:
        """A new parameter, initialised under the tensor-parallel RNG, with the `attributes` that Megatron reads."""
        parameter = Parameter(torch.empty(shape, dtype=self._params_dtype, device=self._device))
        with self._fork_rng():
            init(parameter.data)
        for name, value in attributes.items():
            setattr(parameter, name, value)
        return parameter

    def get_extra_state(self) -> Tensor:
        """The empty state that TE stores without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Does nothing: there is no FP8 state to restore."""

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Does nothing: there is no FP8 state to make."""

    def set_tensor_parallel_group(self, tp_group: torch.distributed.ProcessGroup | None) -> None:
        self.tp_group = tp_group
