"""LoRA on Megatron's linear layers: `y = W x + scale * B A x` with a frozen `W` (Hu et al., arXiv:2106.09685).

Adapters are parameters on the linear module itself, so every other name stays as it was:

    decoder.layers.0.mlp.linear_fc1.weight  [out / tp, in]      frozen
    decoder.layers.0.mlp.linear_fc1.lora_a  [rank, in]          replicated      (column parallel)
    decoder.layers.0.mlp.linear_fc1.lora_b  [out / tp, rank]    sharded like W
    decoder.layers.0.mlp.linear_fc2.lora_a  [rank, in / tp]     sharded like W  (row parallel)
    decoder.layers.0.mlp.linear_fc2.lora_b  [out, rank]         replicated
    decoder.layers.0.mlp.experts.linear_fc1.lora_a3             of one expert of a grouped linear

`B A` has the shape of the local weight in all cases, so merging never communicates. What is cut how follows from the model's
mapping table (`core.adapters`), which also says how the factors are PEFT's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.adapters import (
    ATTENTION_TARGETS,
    DENSE_TARGETS,
    FusedRows,
    LoRAConfig,
    adapted_parts,
    adapter_spec,
    factor_name,
    fused_rows,
    module_name,
)
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.rules import Rule
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import world_rank
from mbridge_rl.training.lora_layers import Adapter, Mode, install, merged_weight

__all__ = [
    "ATTENTION_TARGETS",
    "DENSE_TARGETS",
    "LoRAConfig",
    "adapted_modules",
    "adapters_disabled",
    "add_lora",
    "merged_weight",
]

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_WEIGHT = re.compile(r"weight\d*")


@dataclass(frozen=True)
class _Target:
    """A linear to adapt, under its global name; the rule of its weight, and which of its rows get which adapter."""

    name: str
    module: nn.Module
    rule: Rule
    rows: FusedRows
    first_expert: int | None


def add_lora(model: Sequence[nn.Module], config: LoRAConfig) -> list[str]:
    """Freezes the model and adds trainable adapters, `B` zero and `A` Kaiming-uniform: the output is unchanged at first.

    Call it before wrapping in DDP and before making the optimizer, which both look at what requires a gradient.

    Args:
        model: this rank's chunks, as `build_model` returns them.

    Returns:
        The global names of the linears that carry adapters on this rank.

    Raises:
        UnsupportedModelError, LayoutError, NotImplementedError: a target is no linear that PEFT or this module can adapt, or
            not in this layout; ValueError: a target names nothing, the model has adapters already, was built elsewhere, or is
            wrapped in DDP. Nothing was changed.
    """
    if any(hasattr(chunk, "ddp_config") for chunk in model):
        raise ValueError("add LoRA before the model is wrapped in DDP: its gradient buffers are made for what trains then")
    chunks = unwrap(model)
    if not hasattr(chunks[0], "model_spec"):
        raise ValueError("LoRA needs chunks that know their mapping: build them with AutoBridge.build_model")
    adapter_spec(chunks[0].model_spec, config)  # raises where the config does not fit the model
    targets = [target for chunk in chunks for target in _targets(chunk, config)]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
    for target in targets:
        _attach(target, config, chunks[0].parallel_layout)
    for chunk in chunks:
        chunk.lora_config = config
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # Recomputed layers pass gradients on only if their input wants one, and frozen embeddings don't.
            chunk.embedding.register_forward_hook(_require_gradient)
    return [target.name for target in targets]


def adapted_modules(model: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The linears that carry adapters, with their local names, chunk by chunk."""
    for chunk in unwrap(model):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "lora", None), Adapter):
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


def _targets(chunk: nn.Module, config: LoRAConfig) -> Iterator[_Target]:
    """The linears of a chunk to adapt."""
    spec, layout = chunk.model_spec, chunk.parallel_layout
    rule_of = {module_name(rule.megatron_name): rule for rule in spec.rules if adapted_parts(rule, config.targets)}
    at = layout.coordinates(world_rank())
    experts_before = at.ep * (spec.num_experts or 0) // layout.ep
    for layer in chunk.decoder.layers:
        index = layer.layer_number - 1
        for name, module in layer.named_modules():
            rule = rule_of.get(f"decoder.layers.{{layer}}.{_LOCAL_EXPERT.sub('.', name)}")
            if rule is None or (rule.layers is not None and index not in rule.layers):
                continue
            global_name = f"decoder.layers.{index}.{name}"
            if not hasattr(module, "in_features"):
                raise NotImplementedError(
                    f"LoRA on {global_name} ({type(module).__name__}) is not supported: it is no linear layer of Transformer "
                    f"Engine's; leave it out of the targets"
                )
            if hasattr(module, "lora"):
                raise ValueError(f"{global_name} has an adapter already")
            expert = _LOCAL_EXPERT.search(f".{name}.")
            first_expert = experts_before + int(expert[1] if expert else 0) if ".experts." in name else None
            rows = fused_rows(rule, config, layout, at)
            yield _Target(_LOCAL_EXPERT.sub(".", global_name), module, rule, rows, first_expert)


def _attach(target: _Target, config: LoRAConfig, layout: ParallelLayout) -> None:
    module, rule, rows = target.module, target.rule, target.rows
    weight_names = [name for name, _ in module.named_parameters(recurse=False) if _WEIGHT.fullmatch(name)]
    mode: Mode = "replicated" if rule.axis is None else "row" if rule.dim == 1 else "column"
    if rule.axis == "etp":
        mode = "expert_row" if rule.dim == 1 else "expert_column"
    for index, name in enumerate(weight_names):
        expert = "" if target.first_expert is None else str(target.first_expert + index)
        global_name = factor_name(f"{target.name}.weight{expert}", "lora_a")
        weight = getattr(module, name)
        factors = {
            "lora_a": _initial_a(global_name, config, rule, layout).to(weight),
            "lora_b": weight.new_zeros(rows.adapted_rows, config.rank),
        }
        for factor, value in factors.items():
            parameter = nn.Parameter(value)
            _mark(parameter, factor, mode, module, weight)
            module.register_parameter(f"{factor}{name.removeprefix('weight')}", parameter)
    suffixes = tuple(name.removeprefix("weight") for name in weight_names)
    module.adapter_parameter_names = tuple(f"{factor}{suffix}" for suffix in suffixes for factor in ("lora_a", "lora_b"))
    module.adapted_weights = tuple(weight_names)
    module.merged_weight = partial(_merged_weight_of, module)
    install(module, Adapter(config.scale, mode, rows, suffixes))


def _mark(parameter: nn.Parameter, factor: str, mode: Mode, module: nn.Module, weight: Tensor) -> None:
    """What Megatron's DDP, gradient finalization and gradient norm read: with which replicas it is reduced, whether it saw only
    this rank's part of the sequence, and whether other ranks count it in the norm."""
    sharded = mode.endswith("column") if factor == "lora_b" else mode.endswith("row")
    parameter.partition_dim, parameter.partition_stride = (0 if factor == "lora_b" else 1), 1
    if mode.startswith("expert"):
        # Unmarked parameters count on the first rank of the dense layers' group, which holds some experts only.
        parameter.tensor_model_parallel = True
        parameter.shared = not sharded and _expert_tensor_rank() > 0
        parameter.allreduce = getattr(weight, "allreduce", True)
        return
    parameter.allreduce = True
    parameter.tensor_model_parallel = sharded and module.tp_size > 1
    # Not the module's own flag: Transformer Engine clears it on a linear that is not cut.
    parameter.sequence_parallel = not sharded and bool(module.config.sequence_parallel)


def _expert_tensor_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_parallel_rank()


def _merged_weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    return merged_weight(module, getattr(module, name).detach(), name.removeprefix("weight"))


def _initial_a(name: str, config: LoRAConfig, rule: Rule, layout: ParallelLayout) -> Tensor:
    """This rank's part of `A [adapters * rank, in]` fp32: one draw per name, whatever the layout, as wide as the whole layer's
    input."""
    columns = rule.extent if rule.dim == 1 else rule.shape[1]
    seed = hashlib.blake2b(f"{config.seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    bound = 1 / math.sqrt(columns)  # Kaiming uniform with a = sqrt(5), as PEFT initialises it
    adapters = len({part.hf_name for part in adapted_parts(rule, config.targets)}) if config.canonical else 1
    whole = torch.rand(adapters * config.rank, columns, generator=generator) * (2 * bound) - bound
    if rule.dim == 0:
        return whole
    shards, shard = rule.axis_size(layout), rule.axis_rank(layout.coordinates(world_rank()))
    return whole.chunk(shards, dim=1)[shard].contiguous()


def _require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
