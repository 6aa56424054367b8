"""LoRA adapters as a model of their own: the rules of their factors, derived from the base model's rules.

An adapter of `W [out, in]` is `scale * B A` with `A [rank, in]` and `B [out, rank]` (Hu et al., arXiv 2106.09685). PEFT has one
such pair per HF linear, Megatron one per fused linear. The rows of `B` are the rows of `W`, so they are divided into parts,
groups and ranks exactly as `W`'s are; the columns of `A` are the columns of `W`. Every rule of an adapter is therefore the base
weight's rule with one axis replaced by the rank:

    decoder.layers.0.self_attention.linear_qkv.weight   parts q, k, v by KV head    [out / tp, in]
                                              .lora_b   parts q, k, v by KV head    [out / tp, rank]      sharded like W
                                              .lora_a   q, k and v alike            [rank, in]            on all ranks

The result is a `ModelSpec` of its own: plans, streams, digests and files of adapters work as for any model. In the *fused*
form (one `A` for all parts) several PEFT tensors are one local tensor, and must be equal to be imported; in the *canonical*
form every part has its own `A`, stacked `[parts * rank, in]`, as PEFT trains it.

DoRA (Liu et al., arXiv 2402.09353) adds a magnitude per row, sharded like a bias:

    W' = magnitude * (W + scale * B A) / |W + scale * B A| (of every row)

Adapters that start from the weights themselves (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775) do not change `W` either:
`W + scale * (B A - B0 A0)`. In PEFT this is one adapter of twice the rank, `[B, -B0] [A; A0]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mbridge_rl.core.adapter_targets import (
    AdaptedRule,
    adapted_parts,
    adapted_rules,
    adapted_spec,
    linear_name,
    module_name,
)
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import Coordinates, ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Axis, HFPart, Rule

PEFT_PREFIX = "base_model.model."
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class FusedRows:
    """The division of one rank's rows of a fused linear into adapters.

    Attributes:
        groups: how often `parts` repeat in the rows.
        parts: `(rows per group, index of the A)` in order; the index is `None` for a part without an adapter.
    """

    groups: int
    parts: tuple[tuple[int, int | None], ...]

    @property
    def adapted_rows(self) -> int:
        """The number of rows of this rank's `B`."""
        return self.groups * sum(size for size, index in self.parts if index is not None)

    @property
    def is_complete(self) -> bool:
        """Whether every part has an adapter."""
        return all(index is not None for _, index in self.parts)

    def adapter_numbers(self) -> Tensor:
        """The index of each row's `A`, `[rows]` int64; -1 for rows without an adapter. `B` and magnitudes hold the rows with an
        adapter, in this order."""
        numbers_of_group = [torch.full((size,), -1 if index is None else index) for size, index in self.parts]
        return torch.cat(numbers_of_group).repeat(self.groups)


def adapter_spec(spec: ModelSpec, config: LoRAConfig) -> ModelSpec:
    """The adapters of a model as a model of their own, with Megatron names `X.lora_a`, `X.lora_b`, ..., and PEFT's names as HF
    names.

    Raises:
        ValueError: the config contradicts itself, or a target names no linear of the model.
        UnsupportedModelError: a target has no PEFT form.
    """
    spec = adapted_spec(spec, config)
    adapted = adapted_rules(spec, config)
    _require_stacks_in_the_same_layers(adapted)
    names = _peft_modules_of([part for adapted_rule in adapted for part in adapted_rule.parts])
    rules = tuple(factor for adapted_rule in adapted for factor in _Factors(adapted_rule, names).rules())
    return replace(spec, rules=rules, extras=(), ignored_hf_prefixes=(), aliases={})


def fused_rows(rule: Rule, config: LoRAConfig, layout: ParallelLayout, at: Coordinates) -> FusedRows:
    """How one rank's rows of `rule`'s tensor divide into adapters.

    Raises:
        LayoutError: only some parts are adapted, and ranks cut through the groups of the fused linear.
    """
    if rule.dim == 1:
        return FusedRows(1, ((rule.shape[0], 0),))
    chosen = adapted_parts(rule, config.targets)
    order = list(dict.fromkeys(part.hf_name for part in chosen))
    index_of = {hf_name: index if config.canonical else 0 for index, hf_name in enumerate(order)}
    shards = rule.axis_size(layout)
    if rule.padded:  # rows of padding are included: their B stays zero
        return FusedRows(1, ((rule.local_shape(layout)[0], 0),))
    groups = rule.groups or shards
    parts_of_group = [(part.size(0) // groups, index_of[part.hf_name] if part in chosen else None) for part in rule.parts]
    if groups % shards == 0:
        return FusedRows(groups // shards, tuple(parts_of_group))
    if len(chosen) < len(rule.parts):
        raise LayoutError(
            f"{rule.megatron_name}: {rule.axis}={shards} cuts through its {groups} groups, so its parts cannot be adapted one "
            f"by one; adapt all of {', '.join(linear_name(part.hf_name).rpartition('.')[2] for part in rule.parts)}"
        )
    rows = rule.extent // shards
    begin, start, pieces = rule.axis_rank(at) * rows, 0, []
    for size, index in parts_of_group * groups:
        if (length := min(start + size, begin + rows) - max(start, begin)) > 0:
            pieces.append((length, index))
        start += size
    return FusedRows(1, tuple(pieces))


def factor_name(weight_name: str, factor: str) -> str:
    """`X.weight3` -> `X.lora_a3`."""
    module, _, last = weight_name.rpartition(".")
    return f"{module}.{factor}{last.removeprefix('weight')}"


def equal_tensors(adapters: ModelSpec) -> list[tuple[str, ...]]:
    """Groups of PEFT tensors that are one local tensor, and so must be equal: the `A` that the parts of a fused linear
    share."""
    shared: dict[str, list[str]] = {}
    for instance in adapters.instances:
        if len(instance.hf_names) == 1:
            shared.setdefault(instance.megatron_name, []).append(instance.hf_names[0])
    return [tuple(hf_names) for hf_names in shared.values() if len(hf_names) > 1]


def adapted_linears(spec: ModelSpec, config: LoRAConfig) -> dict[str, LoRAConfig]:
    """The names of the HF linears that have adapters (for stacked experts: of their parameters), each with its own config."""
    spec = adapted_spec(spec, config)
    adapted = {adapted_rule.rule: adapted_rule for adapted_rule in adapted_rules(spec, config)}
    return {
        linear_name(part.hf_name.format(layer=instance.layer, expert=instance.expert)): adapted[instance.rule].config
        for instance in replace(spec, rules=tuple(adapted)).instances
        for part in adapted[instance.rule].parts
    }


class _Factors:
    """The rules of the factors of one rule's adapters.

    Args:
        names: PEFT's name of every HF linear.
    """

    def __init__(self, adapted: AdaptedRule, names: dict[str, str]) -> None:
        rule, parts, config = adapted.rule, adapted.parts, adapted.config
        self._rule, self._config, self._names = rule, config, names
        self._parts = parts
        self._axes = [_PartAxes(rule, part) for part in parts]
        if rule.dim == 1 and len(parts) > 1:
            raise UnsupportedModelError(
                f"{rule.megatron_name} is made of {', '.join(part.hf_name for part in parts)} along its input: PEFT has no "
                f"adapter for that; leave it out of the targets"
            )
        if (config.dora or config.dropout) and any(axes.expert for axes in self._axes):
            raise UnsupportedModelError(
                f"{rule.megatron_name} is made of {parts[0].hf_name}, all experts in one tensor: PEFT has neither DoRA nor "
                f"dropout for it; leave it out of the targets, or use stacked_experts=False where checkpoints have them apart"
            )

    def rules(self) -> list[Rule]:
        """The rules of all factors, in the order of PEFT's files."""
        rank = self._config.rank
        rules = [*self._a("lora_a", 0), self._b("lora_b", 0)]
        if self._config.keeps_start:
            rules += [*self._a("lora_start_a", rank), self._b("lora_start_b", rank)]
        if self._config.dora:
            rules.append(self._magnitude())
        return rules

    def _a(self, factor: str, first: int) -> list[Rule]:
        """The rules of `A [rank, in]`, sharded like the input. Parts of one HF tensor share one `A`."""
        name, rank = factor_name(self._rule.megatron_name, factor), Axis(self._config.peft_rank, 0, first, self._config.rank)
        part_of_tensor = {
            part.hf_name: HFPart(
                f"{self._names[part.hf_name]}.lora_A.weight",
                (*axes.expert, rank, *axes.columns),
                hf_shape=(axes.experts * rank.extent, axes.size_in),
            )
            for part, axes in zip(self._parts, self._axes, strict=True)
        }
        if self._rule.dim == 1:
            return [replace(self._rule, megatron_name=name, parts=tuple(part_of_tensor.values()), shape=(self._config.rank, 0))]
        shape = (0, self._rule.shape[1])
        unsharded = replace(self._rule, megatron_name=name, shape=shape, axis=None, groups=None, padded=False)
        if self._config.canonical:
            return [replace(unsharded, parts=tuple(part_of_tensor.values()))]
        return [replace(unsharded, parts=(part,)) for part in part_of_tensor.values()]

    def _b(self, factor: str, first: int) -> Rule:
        """The rule of `B [out, rank]`, sharded like the output."""
        rank = Axis(self._config.peft_rank, 1, first, self._config.rank)
        parts = tuple(
            HFPart(
                f"{self._names[part.hf_name]}.lora_B.weight",
                (*axes.rows, rank, *axes.expert),
                hf_shape=(axes.size_out, rank.extent * axes.experts),
            )
            for part, axes in zip(self._parts, self._axes, strict=True)
        )
        return self._by_rows(factor, parts, (0, self._config.rank))

    def _magnitude(self) -> Rule:
        """The rule of the magnitude `[out]`, sharded like a bias."""
        parts = tuple(
            HFPart(f"{self._names[part.hf_name]}.lora_magnitude_vector", axes.rows, hf_shape=(axes.size_out,))
            for part, axes in zip(self._parts, self._axes, strict=True)
        )
        return self._by_rows("lora_magnitude", parts, (0,))

    def _by_rows(self, factor: str, parts: tuple[HFPart, ...], shape: tuple[int, ...]) -> Rule:
        name = factor_name(self._rule.megatron_name, factor)
        if self._rule.dim == 1:
            return replace(self._rule, megatron_name=name, parts=parts, shape=shape, dim=0, axis=None, groups=None)
        return replace(self._rule, megatron_name=name, parts=parts, shape=shape)


class _PartAxes:
    """The axes of a linear's weight by their kind: the stack of experts (one axis, or none), the output's and the input's.

    Raises:
        UnsupportedModelError: the part is neither the weight of one HF linear nor a stack of such weights.
    """

    def __init__(self, rule: Rule, part: HFPart) -> None:
        self.expert = tuple(axis for axis in part.axes if axis.index)
        self.columns = tuple(axis for axis in part.axes if axis.along == 1)
        self.rows = tuple(axis for axis in part.axes if axis.along != 1 and not axis.index)
        self.size_out, self.size_in = (prod(axis.extent for axis in axes) for axes in (self.rows, self.columns))
        self.experts = prod(axis.extent for axis in self.expert)
        one_linear = part.hf_name.endswith(_WEIGHT) and part.shape == (self.size_out, self.size_in) and not self.expert
        in_order = part.axes == (*self.rows, *self.columns)
        stack = len(self.expert) == 1 and len(part.shape) == 3 and part.axes[0] == self.expert[0]
        if not self.rows or not self.columns or not (stack or (one_linear and in_order)):
            raise UnsupportedModelError(
                f"{rule.megatron_name} is made of {part.hf_name} {list(part.shape)}, which is not the weight of one HF linear: "
                f"PEFT has no adapter for it; leave it out of the targets"
            )


def _require_stacks_in_the_same_layers(adapted: Sequence[AdaptedRule]) -> None:
    """Raises UnsupportedModelError where the stacks of one module are adapted in different layers: the name of an adapter in
    PEFT depends on the other adapters of its module."""
    layers_of: dict[str, dict[str, set[int] | None]] = {}
    for adapted_rule in adapted:
        for part in adapted_rule.parts:
            if not part.hf_name.endswith(_WEIGHT):
                known = layers_of.setdefault(module_name(part.hf_name), {})
                rule_layers = adapted_rule.rule.layers
                known[part.hf_name] = None if rule_layers is None else {*(known.get(part.hf_name) or ()), *rule_layers}
    for module, layers_of_stack in layers_of.items():
        first, *others = layers_of_stack.items()
        if other := next((name for name, layers in others if layers != first[1]), None):
            raise UnsupportedModelError(
                f"{first[0]} and {other} are adapted in different layers, and the adapters of {module} have one name in all of "
                f"them: give both the same layers"
            )


def _peft_modules_of(parts: list[HFPart]) -> dict[str, str]:
    """The name of the module that holds each part's factors, by `hf_name`.

    PEFT wraps a module once for each of its targeted parameters, so that the factors of the first one are innermost.
    """
    names, stacks = {}, {}
    for hf_name in dict.fromkeys(part.hf_name for part in parts):
        if hf_name.endswith(_WEIGHT):
            names[hf_name] = PEFT_PREFIX + linear_name(hf_name)
        else:
            stacks.setdefault(module_name(hf_name), []).append(hf_name)
    for module, hf_names in stacks.items():
        for inside, hf_name in enumerate(reversed(hf_names)):
            names[hf_name] = PEFT_PREFIX + module + ".base_layer" * inside
    return names
