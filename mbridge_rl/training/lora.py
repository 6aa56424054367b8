"""LoRA on Megatron's linear layers: `y = W x + scale * B A x` with a frozen `W` (Hu et al., arXiv:2106.09685).

Adapters are two parameters on the linear module itself, so every other name stays as it was:

    decoder.layers.0.mlp.linear_fc1.weight  [out / tp, in]      frozen
    decoder.layers.0.mlp.linear_fc1.lora_a  [rank, in]          replicated      (column parallel)
    decoder.layers.0.mlp.linear_fc1.lora_b  [out / tp, rank]    sharded like W
    decoder.layers.0.mlp.linear_fc2.lora_a  [rank, in / tp]     sharded like W  (row parallel)
    decoder.layers.0.mlp.linear_fc2.lora_b  [out, rank]         replicated

`B A` has the shape of the local weight in both cases, so merging never communicates. Only `rank` numbers per token travel: a
column-parallel adapter gathers (or copies) `A x`, a row-parallel one sums it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbridge_rl.megatron.model import unwrap

ATTENTION_TARGETS = ("linear_qkv", "linear_proj")
DENSE_TARGETS = (*ATTENTION_TARGETS, "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class LoRAConfig:
    """Attributes:
    rank: of `B A`.
    alpha: `scale` is `alpha / rank`.
    targets: names of Megatron linears: `linear_qkv`, `linear_proj`, and the dense layers' `linear_fc1`, `linear_fc2`.
    seed: of `A`; ranks with other parallel layouts start from the same adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DENSE_TARGETS
    seed: int = 0


@dataclass
class _Adapter:
    """How a linear module applies its adapter."""

    scale: float
    enabled: bool = True


def add_lora(model: Sequence[nn.Module], config: LoRAConfig) -> list[str]:
    """Freezes the model and adds trainable adapters, `B` zero and `A` Kaiming-uniform: the output is unchanged at first.

    Call it before wrapping in DDP and before making the optimizer, which both look at what requires a gradient.

    Args:
        model: this rank's chunks, as `build_model` returns them.

    Returns:
        The global names of the linears that carry adapters on this rank.

    Raises:
        NotImplementedError: a target is a layer of experts; nothing was changed.
        ValueError: no layer of this rank has a target, the model has adapters already, or is wrapped in DDP; nothing changed.
    """
    if config.rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, found {config.rank}")
    if any(hasattr(chunk, "ddp_config") for chunk in model):
        raise ValueError("add LoRA before the model is wrapped in DDP: its gradient buffers are made for what trains then")
    chunks = unwrap(model)
    targets = [target for chunk in chunks for target in _targets(chunk, config)]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
    for name, module in targets:
        _attach(name, module, config)
    for chunk in chunks:
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # Recomputed layers pass gradients on only if their input wants one, and frozen embeddings don't.
            chunk.embedding.register_forward_hook(_require_gradient)
    return [name for name, _ in targets]


def adapted_modules(model: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The linears that carry adapters, with their local names, chunk by chunk."""
    for chunk in unwrap(model):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "lora", None), _Adapter):
                yield name, module


@contextmanager
def adapters_disabled(model: Sequence[nn.Module]) -> Iterator[None]:
    """The base model within: the reference policy of a LoRA run."""
    modules = [module for _, module in adapted_modules(model)]
    before = [module.lora.enabled for module in modules]
    for module in modules:
        module.lora.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.lora.enabled = enabled


@torch.no_grad()
def merged_weight(module: nn.Module, base: Tensor) -> Tensor:
    """`base + scale * B A`, both factors as this rank holds them, `[out, in]` (local) in base's dtype; summed in fp32."""
    delta = module.lora_b.float() @ module.lora_a.float()
    return delta.mul_(module.lora.scale).add_(base).to(base.dtype)


def _targets(chunk: nn.Module, config: LoRAConfig) -> list[tuple[str, nn.Module]]:
    """The linears to adapt, under their global names."""
    found = []
    for layer in chunk.decoder.layers:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] not in config.targets:
                continue
            global_name = f"decoder.layers.{layer.layer_number - 1}.{name}"
            if ".experts." in f".{name}" or getattr(module, "parallel_mode", None) not in ("column", "row"):
                raise NotImplementedError(
                    f"LoRA on {global_name} ({type(module).__name__}) is not supported: adapters go on column and row "
                    f"parallel linears outside of experts; for this model use targets={ATTENTION_TARGETS}"
                )
            if hasattr(module, "lora"):
                raise ValueError(f"{global_name} has an adapter already")
            found.append((global_name, module))
    if not found and len(chunk.decoder.layers):
        raise ValueError(f"no layer of this model has a linear named {', '.join(config.targets)}; choose from {DENSE_TARGETS}")
    return found


def _attach(global_name: str, module: nn.Module, config: LoRAConfig) -> None:
    weight, column = module.weight, module.parallel_mode == "column"
    rows, columns = weight.shape
    sharded, replicated = ("lora_b", "lora_a") if column else ("lora_a", "lora_b")
    values = {
        "lora_a": _initial_a(f"{global_name}.lora_a", config, columns, sharded=not column).to(weight),
        "lora_b": weight.new_zeros(rows, config.rank),
    }
    for name, value in values.items():
        parameter = nn.Parameter(value)
        parameter.allreduce = True
        module.register_parameter(name, parameter)
    # What Megatron's gradient norm and gradient finalization read: a sharded parameter counts on every rank; a replicated one
    # that saw only this rank's part of the sequence is summed over the tensor-parallel group.
    getattr(module, sharded).tensor_model_parallel = module.tp_size > 1
    getattr(module, sharded).partition_dim = 0 if column else 1
    getattr(module, sharded).partition_stride = 1
    getattr(module, replicated).sequence_parallel = bool(module.sequence_parallel)
    module.lora = _Adapter(scale=config.alpha / config.rank)
    module.adapter_parameter_names = ("lora_a", "lora_b")
    module.merged_weight = partial(_merged_weight_of, module)
    module.register_forward_pre_hook(_ask_for_normalized_input)
    module.register_forward_hook(_add_adapter)


def _merged_weight_of(module: nn.Module) -> Tensor:
    return merged_weight(module, module.weight.detach())


def _initial_a(name: str, config: LoRAConfig, columns: int, *, sharded: bool) -> Tensor:
    """This rank's part of `A [rank, in]` fp32: one draw per name, whatever the layout, as wide as the whole layer's input."""
    from megatron.core import parallel_state

    parts, part = 1, 0
    if sharded:
        parts = parallel_state.get_tensor_model_parallel_world_size()
        part = parallel_state.get_tensor_model_parallel_rank()
    seed = hashlib.blake2b(f"{config.seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    bound = 1 / math.sqrt(columns * parts)  # Kaiming uniform with a = sqrt(5), as PEFT initialises it
    whole = torch.rand(config.rank, columns * parts, generator=generator) * (2 * bound) - bound
    return whole[:, part * columns : (part + 1) * columns].contiguous()


def _require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _ask_for_normalized_input(module: nn.Module, arguments: Any) -> None:
    """A linear with a fused norm returns its normalised input, which the adapter needs, for this call only."""
    if hasattr(module, "return_layernorm_output"):
        module.return_layernorm_output = module.lora.enabled


def _add_adapter(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: adds `scale * B A x` to what the linear returned, and returns what it returns without adapters."""
    if not module.lora.enabled:
        return output
    if getattr(module, "return_layernorm_output", False):
        y, bias, x = _without_normalized_input(output)
    else:
        (y, bias), x = output, arguments[0]
    return y + module.lora.scale * _low_rank(module, x), bias


def _without_normalized_input(output: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Megatron passes TE's tuple on where it asked for a bias, `(y, bias, x)`, and else makes `((y, x), None)` of it."""
    if len(output) == 3:
        return output
    (y, x), bias = output
    return y, bias, x


def _low_rank(module: nn.Module, x: Tensor) -> Tensor:
    """`B A x` over the tensor-parallel group, in the layout of the linear's own output."""
    from megatron.core.tensor_parallel import mappings

    inner = F.linear(x, module.lora_a.to(x.dtype))
    if module.tp_size > 1:
        if module.parallel_mode == "column":
            enter = (
                mappings.gather_from_sequence_parallel_region
                if module.sequence_parallel
                else mappings.copy_to_tensor_model_parallel_region
            )
            inner = enter(inner)
        else:
            leave = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if module.sequence_parallel
                else mappings.reduce_from_tensor_model_parallel_region
            )
            inner = leave(inner)
    return F.linear(inner, module.lora_b.to(x.dtype))
