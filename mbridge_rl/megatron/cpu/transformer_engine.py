"""Transformer Engine in pure torch, for machines without CUDA.

Megatron-core builds its models from `transformer_engine.pytorch` modules. The modules here have TE's parameter names, shapes,
attributes, initialisation and return values but no kernels. So Megatron's own TE wrappers, layer specs and `sharded_state_dict`
work unchanged, and checkpoints and weight mappings are the same with and without CUDA. FP8, communication overlap and fused
optimizers do not exist; if they are requested, Megatron fails with "not available".

Activations are `[seq, batch, hidden]` or packed `[tokens, hidden]`. `install` is called by `mbridge_rl.megatron.cpu.runtime`
only: no other code may put a `transformer_engine` into `sys.modules`, where other libraries would mistake it for the real one.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbridge_rl.megatron.cpu.module import Initializer, TransformerEngineModule

# The version for Megatron's version tests. Sinks need >= 2.8; with >= 2.10 Megatron would pass `num_splits`, which is for
# kernels.
VERSION = "2.9.0"


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered_gamma: bool) -> Tensor:
    """RMS norm (no bias) or layer norm over the last dimension, in fp32 as TE's kernels do it, rounded once at the end."""
    gamma = weight.float() + 1 if zero_centered_gamma else weight.float()
    if bias is None:
        normalized = F.rms_norm(x.float(), gamma.shape, gamma, eps)
    else:
        normalized = F.layer_norm(x.float(), gamma.shape, gamma, bias.float(), eps)
    return normalized.to(x.dtype)


def _gamma_initializer(zero_centered_gamma: bool) -> Initializer:
    return torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_


class RMSNorm(TransformerEngineModule):
    """RMS norm with `weight [hidden]`."""

    has_bias = False

    def __init__(
        self,
        hidden_size: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        normalized_shape: int | None = None,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(params_dtype=params_dtype, device=device)
        size = hidden_size if hidden_size is not None else normalized_shape
        if size is None:
            raise TypeError(f"{type(self).__name__} needs hidden_size")
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        init = _gamma_initializer(zero_centered_gamma)
        self.weight = self._parameter(size, init, sequence_parallel=sequence_parallel)
        zeros = torch.nn.init.zeros_
        self.bias = self._parameter(size, zeros, sequence_parallel=sequence_parallel) if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class LayerNorm(RMSNorm):
    """Layer norm with `weight [hidden]` and `bias [hidden]`."""

    has_bias = True


class _LinearBase(TransformerEngineModule):
    """Sizes, names and tensor-parallel communication that the three linear modules share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Initializer | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(
            params_dtype=params_dtype,
            device=device,
            get_rng_state_tracker=get_rng_state_tracker,
            rng_tracker_name=rng_tracker_name,
        )
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self._init_method = init_method or torch.nn.init.xavier_uniform_

    def _create_weights(self, suffixes: Sequence[str]) -> None:
        """Makes `weight{suffix} [out, in]` for every suffix, then `bias{suffix} [out]`.

        As in TE, weights are marked as tensor-parallel in every `parallel_mode`: the mark does not describe their placement.
        """
        row = self.parallel_mode == "row"
        sharded = {"tensor_model_parallel": True, "partition_dim": int(row), "partition_stride": 1}
        if self.parallel_mode == "column":
            bias_attributes: dict[str, Any] = sharded
        else:
            bias_attributes = {"sequence_parallel": self.sequence_parallel} if row else {}
        shape = (self.out_features, self.in_features)
        for suffix in suffixes:
            setattr(self, f"weight{suffix}", self._parameter(shape, self._init_method, **sharded))
        zeros = torch.nn.init.zeros_
        for suffix in suffixes:
            bias = self._parameter(self.out_features, zeros, **bias_attributes) if self.use_bias else None
            setattr(self, f"bias{suffix}", bias)

    def backward_dw(self) -> None:
        """Does nothing: weight gradients are never delayed here."""

    def _enter_column(self, x: Tensor) -> Tensor:
        """The full input of a column-parallel product; its gradient is summed over the tensor-parallel group."""
        from megatron.core.tensor_parallel import mappings

        if self.tp_size == 1 or self.parallel_mode != "column":
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _leave_row(self, y: Tensor) -> Tensor:
        """The sum of the partial products of a row-parallel product, scattered over the sequence if that is parallel."""
        from megatron.core.tensor_parallel import mappings

        if self.tp_size == 1 or self.parallel_mode != "row":
            return y
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)

    def _multiply(self, x: Tensor) -> Tensor:
        """`x @ weight.T`, plus the bias unless the caller adds it."""
        bias = None if self.return_bias else self.bias
        if self.parallel_mode == "row" and self.tp_size > 1:
            y = self._leave_row(F.linear(x, self.weight))
            return y if bias is None else y + bias  # once, after the sum over ranks
        return F.linear(x, self.weight, bias)


class Linear(_LinearBase):
    """A linear layer with `weight [out, in]` and `bias [out]`; returns `out`, or `(out, bias)` with `return_bias`."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self._create_weights([""])

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        y = self._multiply(self._enter_column(x))
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(_LinearBase):
    """A norm fused with the column-parallel linear layer that follows it.

    The parameters are `layer_norm_weight [in]`, `layer_norm_bias [in]` (layer norm only), `weight [out, in]` and `bias [out]`.
    It returns the same as TE: `out`, `(out, bias)` with `return_bias`, `(out, ln_out)` with `return_layernorm_output`, `(out,
    bias, ln_out)` with both. Megatron's wrapper returns a tuple with a bias unchanged and puts any other into `(..., None)`.
    `ln_out` is the normalised input: this rank's part of the sequence under sequence parallelism, or the full sequence with
    `return_layernorm_output_gathered`. Both flags may be set after construction, as LoRA does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        size, attributes = self.in_features, {"sequence_parallel": self.sequence_parallel}
        init, zeros = _gamma_initializer(zero_centered_gamma), torch.nn.init.zeros_
        self.layer_norm_weight = self._parameter(size, init, **attributes)
        self.layer_norm_bias = self._parameter(size, zeros, **attributes) if normalization == "LayerNorm" else None
        self._create_weights([""])

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor | None, ...]:
        ln_out = _normalize(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)
        total = self._enter_column(ln_out)
        y = self._multiply(total)
        if self.sequence_parallel and self.return_layernorm_output_gathered:
            ln_out = total
        returned = [y]
        if self.return_bias:
            returned.append(self.bias)
        if self.return_layernorm_output:
            returned.append(ln_out)
        return tuple(returned) if len(returned) > 1 else y


class GroupedLinear(_LinearBase):
    """One linear layer per expert, with `weight{i} [out, in]` and `bias{i} [out]` for `i < num_gemms`.

    Tokens are sorted by expert, with `m_splits[i]` tokens for expert `i`. The token dispatcher does all tensor and expert
    parallel communication, so there is none here.
    """

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.num_gemms = num_gemms
        self._create_weights([str(i) for i in range(num_gemms)])

    def forward(
        self, x: Tensor, m_splits: Tensor | Sequence[int], is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        sizes = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
        products = [
            F.linear(tokens, getattr(self, f"weight{i}"), None if self.return_bias else biases[i])
            for i, tokens in enumerate(x.split(sizes))
        ]
        y = torch.cat(products)
        return (y, biases) if self.return_bias else y


class _Unavailable(types.ModuleType):
    """A module in which every undefined public name is `None`; Megatron concludes that this TE has no such kernel."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _NoQuantization:
    """TE's `FP8GlobalStateManager`, with the one method that Megatron calls."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _no_autocast(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


_SUBMODULES = (
    "common",
    "common.recipe",
    "pytorch",
    "pytorch.distributed",
    "pytorch.fp8",
    "pytorch.ops",
    "pytorch.router",
    "pytorch.tensor",
)


def build_modules() -> dict[str, types.ModuleType]:
    """The module tree, by the names in `sys.modules`."""
    from mbridge_rl.megatron.cpu.attention import DotProductAttention

    modules: dict[str, types.ModuleType] = {}
    for name in ("transformer_engine", *(f"transformer_engine.{submodule}" for submodule in _SUBMODULES)):
        module = modules[name] = _Unavailable(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__version__": VERSION},
        "transformer_engine.common.recipe": {"DelayedScaling": type("DelayedScaling", (), {})},
        "transformer_engine.pytorch": {
            cls.__name__: cls for cls in (Linear, LayerNormLinear, GroupedLinear, DotProductAttention, RMSNorm, LayerNorm)
        },
        "transformer_engine.pytorch.distributed": {"CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {})},
        "transformer_engine.pytorch.fp8": {
            "fp8_autocast": _no_autocast,
            "fp8_model_init": _no_autocast,
            "FP8GlobalStateManager": _NoQuantization,
        },
        "transformer_engine.pytorch.ops": {"Sequential": torch.nn.Sequential},
        "transformer_engine.pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (Tensor,), {})},
    }
    for name, attributes in contents.items():
        for attribute, value in attributes.items():
            setattr(modules[name], attribute, value)
    return modules
