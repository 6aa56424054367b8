"""LoRA on Megatron's linear layers: `y = W x + scale * B A x` with a frozen `W` (Hu et al., arXiv:2106.09685).

Adapters are parameters on the linear module itself, so all other names stay the same:

    decoder.layers.0.mlp.linear_fc1.weight  [out / tp, in]      frozen
    decoder.layers.0.mlp.linear_fc1.lora_a  [rank, in]          replicated      (column parallel)
    decoder.layers.0.mlp.linear_fc1.lora_b  [out / tp, rank]    sharded like W
    decoder.layers.0.mlp.linear_fc2.lora_a  [rank, in / tp]     sharded like W  (row parallel)
    decoder.layers.0.mlp.linear_fc2.lora_b  [out, rank]         replicated
    decoder.layers.0.mlp.experts.linear_fc1.lora_a3             of one expert of a grouped linear

`B A` always has the shape of the local weight, so merging communicates only DoRA's norms of rows that ranks cut. The sharding
of the factors and their PEFT names follow from the model's mapping table (`core.adapters`). Besides `lora_a` and `lora_b` a
linear may have `lora_magnitude` (DoRA) and the frozen `lora_start_a`, `lora_start_b` (PiSSA, OLoRA).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.adapter_targets import AdaptedRule, adapted_rules, adapted_spec, module_name
from mbridge_rl.core.adapters import FusedRows, adapter_spec, factor_name, fused_rows
from mbridge_rl.core.lora_config import ATTENTION_TARGETS, DENSE_TARGETS, LoRAConfig
from mbridge_rl.core.rules import Rule
from mbridge_rl.megatron.lora.dropout import seed_dropout
from mbridge_rl.megatron.lora.layers import Adapter, Mode, cutting_group, install, merged_weight, merging, row_norms
from mbridge_rl.megatron.lora.start import Start
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import world_rank

__all__ = [
    "ATTENTION_TARGETS",
    "DENSE_TARGETS",
    "LoRAConfig",
    "adapted_modules",
    "adapters_disabled",
    "adapters_merged",
    "add_lora",
    "merge_adapters",
    "merged_weight",
    "unmerge_adapters",
]

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_WEIGHT = re.compile(r"weight\d*")


@dataclass(frozen=True)
class _Target:
    """A linear to adapt, with its global name, the rule of its weight, the config of its adapters, and the division of its rows
    into adapters."""

    name: str
    module: nn.Module
    rule: Rule
    config: LoRAConfig
    rows: FusedRows
    first_expert: int | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of its weights' names: `("",)`, or one per expert of a grouped linear."""
        names = [name for name, _ in self.module.named_parameters(recurse=False)]
        return tuple(name.removeprefix("weight") for name in names if _WEIGHT.fullmatch(name))

    @property
    def mode(self) -> Mode:
        cut: Mode = "row" if self.rule.dim == 1 else "column"
        return "replicated" if self.rule.axis is None else cut if self.rule.axis == "tp" else f"expert_{cut}"

    def weight_name(self, index: int) -> str:
        """The global name of its `index`-th weight."""
        return f"{self.name}.weight{'' if self.first_expert is None else self.first_expert + index}"


def add_lora(model: Sequence[nn.Module], config: LoRAConfig) -> list[str]:
    """Freezes the model and adds trainable adapters that do not change its output initially (with a `start` other than
    `kaiming` and `gaussian`, up to rounding).

    Call it after loading the weights, from which DoRA and some `start`s are computed, and before wrapping in DDP and making the
    optimizer, which both depend on the parameters that require a gradient. All ranks call it together.

    Args:
        model: this rank's chunks, as `build_model` returns them.

    Returns:
        The global names of the linears that carry adapters on this rank.

    Raises:
        UnsupportedModelError, LayoutError, NotImplementedError: PEFT or this module cannot adapt a target, or not in this
            layout. Nothing was changed.
        ValueError: a target names nothing, or the model has adapters already, was built elsewhere, or is wrapped in DDP.
            Nothing was changed.
    """
    if any(hasattr(chunk, "ddp_config") for chunk in model):
        raise ValueError("add LoRA before the model is wrapped in DDP: its gradient buffers are made for what trains then")
    chunks = unwrap(model)
    if not hasattr(chunks[0], "model_spec"):
        raise ValueError("LoRA needs chunks that know their mapping: build them with AutoBridge.build_model")
    adapter_spec(chunks[0].model_spec, config)  # raises where the config does not fit the model
    layout = chunks[0].parallel_layout
    targets = [target for chunk in chunks for target in _targets(chunk, config)]
    factors = [
        _first_factors(target, Start(target.config, target.rule, target.rows, target.mode, layout)) for target in targets
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
    for target, target_factors in zip(targets, factors, strict=True):
        _attach(target, target_factors)
    if config.dropout:
        seed_dropout(config.seed, world_rank(), layout.coordinates(world_rank()))
    for chunk in chunks:
        chunk.lora_config = config
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # Recomputed layers pass gradients on only if their input requires one, and that of frozen embeddings does not.
            chunk.embedding.register_forward_hook(_require_gradient)
    return [target.name for target in targets]


def adapted_modules(model: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the local names and modules of the linears that carry adapters, chunk by chunk."""
    for chunk in unwrap(model):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "lora", None), Adapter):
                yield name, module


@contextmanager
def adapters_disabled(model: Sequence[nn.Module]) -> Iterator[None]:
    """Disables the adapters inside of the block, so that the model is the base model: the reference policy of a LoRA run."""
    modules = [module for _, module in adapted_modules(model)]
    before = [module.lora.enabled for module in modules]
    for module in modules:
        module.lora.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.lora.enabled = enabled


def merge_adapters(model: Sequence[nn.Module]) -> None:
    """Adds the adapters to the weights in place, for code that does not know adapters. The original weights are stored on the
    host. A merged model exports the same weights as before, cannot be trained, and has no reference policy. All ranks call it
    together.

    Raises:
        ValueError: the adapters are merged already, or the model has none.
    """
    modules = [module for _, module in adapted_modules(model)]
    if not modules or any(module.lora.base is not None for module in modules):
        raise ValueError("this model has no adapters that are not merged")
    for module in modules:
        names = module.adapted_weights
        merge = merging(module)
        merged = [merge(name) for name in names]
        base = {name: getattr(module, name).detach().to("cpu", copy=True) for name in names}
        for name, weight in zip(names, merged, strict=True):
            getattr(module, name).data.copy_(weight)
        module.lora.base = base


def unmerge_adapters(model: Sequence[nn.Module]) -> None:
    """Undoes `merge_adapters`: every weight is restored bit for bit.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [module for _, module in adapted_modules(model) if module.lora.base is not None]
    if not merged:
        raise ValueError("this model has no merged adapters")
    for module in merged:
        for name, weight in module.lora.base.items():
            getattr(module, name).data.copy_(weight)
        module.lora.base = None


@contextmanager
def adapters_merged(model: Sequence[nn.Module]) -> Iterator[None]:
    """Merges the adapters into the weights inside of the block."""
    merge_adapters(model)
    try:
        yield
    finally:
        unmerge_adapters(model)


def _targets(chunk: nn.Module, config: LoRAConfig) -> Iterator[_Target]:
    """Yields the linears of a chunk that get adapters."""
    spec, layout = adapted_spec(chunk.model_spec, config), chunk.parallel_layout
    rules_of_module: dict[str, list[AdaptedRule]] = {}
    for adapted_rule in adapted_rules(spec, config):
        rules_of_module.setdefault(module_name(adapted_rule.rule.megatron_name), []).append(adapted_rule)
    at = layout.coordinates(world_rank())
    experts_before = at.ep * (spec.num_experts or 0) // layout.ep
    for pattern, index, global_name, module in _modules(chunk):
        candidates = rules_of_module.get(pattern, ())
        adapted = next((rule for rule in candidates if rule.rule.layers is None or index in rule.rule.layers), None)
        if adapted is None:
            continue
        _require_adaptable(module, global_name, adapted)
        expert = _LOCAL_EXPERT.search(f"{global_name}.")
        first_expert = experts_before + int(expert[1] if expert else 0) if ".experts." in global_name else None
        rows = fused_rows(adapted.rule, adapted.config, layout, at)
        name = _LOCAL_EXPERT.sub(".", global_name)
        yield _Target(name, module, adapted.rule, adapted.config, rows, first_expert)


def _modules(chunk: nn.Module) -> Iterator[tuple[str, int, str, nn.Module]]:
    """Yields every module that may be adapted: its name in rules, the index of its layer, its global name, and the module."""
    for layer in chunk.decoder.layers:
        index = layer.layer_number - 1
        for name, module in layer.named_modules():
            yield f"decoder.layers.{{layer}}.{_LOCAL_EXPERT.sub('.', name)}", index, f"decoder.layers.{index}.{name}", module
    if chunk.post_process:
        yield "output_layer", 0, "output_layer", chunk.output_layer


def _require_adaptable(module: nn.Module, name: str, adapted: AdaptedRule) -> None:
    if not hasattr(module, "in_features") and name != "output_layer":
        raise NotImplementedError(
            f"LoRA on {name} ({type(module).__name__}) is not supported: neither Megatron nor Transformers has a linear layer "
            f"there; leave it out of the targets"
        )
    if hasattr(module, "lora"):
        raise ValueError(f"{name} has an adapter already")
    config = adapted.config
    if adapted.rule.padded and (config.dora or config.start not in ("kaiming", "gaussian")):
        feature = "DoRA" if config.dora else f"start={config.start}"
        raise NotImplementedError(
            f"{feature} on {name} is not supported: the rows that pad its vocabulary are no weights; leave it out of the "
            f"targets, or use plain LoRA"
        )


def _first_factors(target: _Target, start: Start) -> list[dict[str, Tensor]]:
    """The initial factors of every weight of a linear, by factor."""
    return [
        start.factors(factor_name(target.weight_name(index), "lora_a"), getattr(target.module, f"weight{suffix}"))
        for index, suffix in enumerate(target.suffixes)
    ]


def _attach(target: _Target, factors: list[dict[str, Tensor]]) -> None:
    module, config, rows, suffixes = target.module, target.config, target.rows, target.suffixes
    module.adapted_weights = tuple(f"weight{suffix}" for suffix in suffixes)
    module.adapter_parameter_names = ()
    module.merging, module.merged_weight = partial(merging, module), partial(merged_weight, module)
    install(module, Adapter(config.scale, target.mode, rows, suffixes, config.dropout))

    def register(factor: str, suffix: str, value: Tensor) -> None:
        weight = getattr(module, f"weight{suffix}")
        parameter = nn.Parameter(value.to(weight), requires_grad=not factor.startswith("lora_start"))
        _mark(parameter, factor, target.mode, module, weight)
        module.register_parameter(f"{factor}{suffix}", parameter)
        module.adapter_parameter_names += (f"{factor}{suffix}",)

    for suffix, weight_factors in zip(suffixes, factors, strict=True):
        for factor, value in weight_factors.items():
            register(factor, suffix, value)
        if config.dora:
            norms = row_norms(module, suffix)
            register("lora_magnitude", suffix, norms[(rows.adapter_numbers() >= 0).to(norms.device)])


def _mark(parameter: nn.Parameter, factor: str, mode: Mode, module: nn.Module, weight: Tensor) -> None:
    """Sets the attributes that Megatron's DDP, gradient finalization and gradient norm read: over which replicas the gradient
    is reduced, whether it belongs to this rank's part of the sequence only, and whether other ranks count it in the norm."""
    is_input_factor = factor in ("lora_a", "lora_start_a")
    sharded = mode.endswith("row" if is_input_factor else "column")
    parameter.partition_dim, parameter.partition_stride = int(is_input_factor), 1
    if mode.startswith("expert"):
        # Megatron counts unmarked parameters on the first rank of the dense layers' group, which holds only some experts.
        parameter.tensor_model_parallel = True
        parameter.shared = not sharded and _expert_tensor_rank() > 0
        parameter.allreduce = getattr(weight, "allreduce", True)
        return
    parameter.allreduce = True
    parameter.tensor_model_parallel = sharded and cutting_group(mode) is not None
    # The module's own flag cannot be used: Transformer Engine clears it on a linear that is not sharded.
    parameter.sequence_parallel = not sharded and bool(module.config.sequence_parallel)


def _expert_tensor_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_parallel_rank()


def _require_gradient(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
