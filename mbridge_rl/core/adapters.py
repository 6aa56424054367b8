"""LoRA adapters as a side of a plan: their factors' rules, derived from the base model's.

An adapter of `W [out, in]` is `scale * B A` with `A [rank, in]` and `B [out, rank]` (Hu et al., arXiv 2106.09685). PEFT has one
such pair per HF linear, Megatron one per fused linear. The rows of `B` are the rows of `W`, so they are dealt to parts, groups
and ranks exactly as `W`'s are; the columns of `A` are the columns of `W`. So every rule of an adapter is the base weight's rule
with one axis replaced by the rank:

    decoder.layers.0.self_attention.linear_qkv.weight   parts q, k, v by KV head    [out / tp, in]
                                              .lora_b   parts q, k, v by KV head    [out / tp, rank]      sharded like W
                                              .lora_a   q, k and v alike            [rank, in]            on all ranks

The result is a `ModelSpec` of its own: plans, streams, digests and files of adapters are those of any model. In the *fused*
form (one `A` for all parts) several PEFT tensors are one local tensor, and must be equal to be imported; in the *canonical*
form every part has its own `A`, stacked `[parts * rank, in]`, which is what PEFT trains.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import sqrt

from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import Coordinates, ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Axis, Part, Rule

PEFT_PREFIX = "base_model.model."
ATTENTION_TARGETS = ("linear_qkv", "linear_proj")
DENSE_TARGETS = (*ATTENTION_TARGETS, "linear_fc1", "linear_fc2")

_WEIGHT = ".weight"


@dataclass(frozen=True)
class LoRAConfig:
    """Attributes:
    rank: of `B A`.
    alpha: `scale` is `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (Kalajdzievski, arXiv 2312.03732).
    targets: which linears get adapters: names of Megatron linears (`linear_qkv`, `linear_fc1`, ...) or of HF linears (`q_proj`,
        which adapts that part of a fused linear alone), or patterns of their full names (`*.experts.*`).
    canonical: every HF linear has its own `A`, as PEFT's; otherwise the parts of a fused linear share one.
    seed: of `A`; ranks with other parallel layouts start from the same adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DENSE_TARGETS
    canonical: bool = False
    rslora: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class FusedRows:
    """Which of one rank's rows of a fused linear come from which adapter.

    Attributes:
        groups: how often `parts` repeat in its rows.
        parts: `(rows per group, which A)` in order; `None` for a part without an adapter.
    """

    groups: int
    parts: tuple[tuple[int, int | None], ...]

    @property
    def adapted_rows(self) -> int:
        """Rows of this rank's `B`."""
        return self.groups * sum(size for size, which in self.parts if which is not None)

    @property
    def is_complete(self) -> bool:
        """No part lacks an adapter."""
        return all(which is not None for _, which in self.parts)


def adapter_spec(spec: ModelSpec, config: LoRAConfig) -> ModelSpec:
    """The adapters of a model as a model: Megatron names `X.lora_a`, `X.lora_b`, HF names PEFT's.

    Raises:
        ValueError: the rank is below 1, or a target names no linear of the model.
        UnsupportedModelError: a target has no PEFT form (stacked or transposed experts).
    """
    if config.rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, found {config.rank}")
    require_known_targets(spec, config.targets)
    rules = tuple(
        factor
        for rule in spec.rules
        if (parts := adapted_parts(rule, config.targets))
        for factor in (*_factors_a(rule, parts, config), _factor_b(rule, parts, config))
    )
    return replace(spec, rules=rules, extras=(), ignored_hf_prefixes=())


def adapted_parts(rule: Rule, targets: Sequence[str]) -> tuple[Part, ...]:
    """The parts of `rule` that get adapters; none for what is no linear's weight."""
    if not is_linear(rule):
        return ()
    if any(_names(target, module_name(rule.megatron_name)) for target in targets):
        return rule.parts
    return tuple(part for part in rule.parts if any(_names(target, module_name(part.hf_name)) for target in targets))


def is_linear(rule: Rule) -> bool:
    """Whether a rule is of a linear layer's weight, `[out, in]`."""
    return rule.placement == "layer" and len(rule.shape) == 2 and rule.megatron_name.rpartition(".")[2].startswith("weight")


def require_known_targets(spec: ModelSpec, targets: Sequence[str]) -> None:
    """Raises ValueError where a target names nothing in the model."""
    for target in targets:
        if not any(adapted_parts(rule, (target,)) for rule in spec.rules):
            known = sorted({_last(module_name(rule.megatron_name)) for rule in spec.rules if is_linear(rule)})
            parts = sorted({_last(module_name(part.hf_name)) for rule in spec.rules if is_linear(rule) for part in rule.parts})
            raise ValueError(
                f"no layer of this model has a linear named {target}; choose from {', '.join(known)} (Megatron's) or "
                f"{', '.join(parts)} (Hugging Face's)"
            )


def fused_rows(rule: Rule, config: LoRAConfig, layout: ParallelLayout, at: Coordinates) -> FusedRows:
    """How one rank's rows of `rule`'s tensor divide into adapters.

    Raises:
        LayoutError: some parts alone, where ranks cut through the groups of the fused linear.
    """
    if rule.dim == 1:
        return FusedRows(1, ((rule.shape[0], 0),))
    chosen = adapted_parts(rule, config.targets)
    order = list(dict.fromkeys(part.hf_name for part in chosen))
    which = {hf_name: index if config.canonical else 0 for index, hf_name in enumerate(order)}
    shards = rule.axis_size(layout)
    groups = rule.groups or shards
    of_group = [(part.size(0) // groups, which[part.hf_name] if part in chosen else None) for part in rule.parts]
    if groups % shards == 0:
        return FusedRows(groups // shards, tuple(of_group))
    if len(chosen) < len(rule.parts):
        raise LayoutError(
            f"{rule.megatron_name}: {rule.axis}={shards} cuts through its {groups} groups, so its parts cannot be adapted one "
            f"by one; adapt all of {', '.join(_last(module_name(part.hf_name)) for part in rule.parts)}"
        )
    rows = rule.extent // shards
    begin, start, pieces = rule.axis_rank(at) * rows, 0, []
    for size, index in of_group * groups:
        if (length := min(start + size, begin + rows) - max(start, begin)) > 0:
            pieces.append((length, index))
        start += size
    return FusedRows(1, tuple(pieces))


def factor_name(weight_name: str, factor: str) -> str:
    """`X.weight3` -> `X.lora_a3`."""
    module, _, last = weight_name.rpartition(".")
    return f"{module}.{factor}{last.removeprefix('weight')}"


def module_name(weight_name: str) -> str:
    """`X.weight`, `X.weight{expert}` -> `X`."""
    return weight_name.rpartition(".")[0]


def targets_of(spec: ModelSpec, modules: Set[str]) -> tuple[str, ...]:
    """The targets that adapt the HF linears `modules`, in as few and short names as say it exactly."""
    patterns: dict[str, set[str]] = {}
    for instance in spec.instances:
        if is_linear(instance.rule):
            for part, hf_name in zip(instance.rule.parts, instance.hf_names, strict=True):
                patterns.setdefault(module_name(part.hf_name), set()).add(module_name(hf_name))
    adapted = [pattern for pattern, names in patterns.items() if names & modules]
    of_last: dict[str, list[str]] = {}
    for pattern in patterns:
        of_last.setdefault(_last(pattern), []).append(pattern)
    unique = (_last(pattern) if all(other in adapted for other in of_last[_last(pattern)]) else pattern for pattern in adapted)
    return tuple(dict.fromkeys(unique))


def equal_tensors(adapters: ModelSpec) -> list[tuple[str, ...]]:
    """PEFT tensors that are one local tensor: the `A` that the parts of a fused linear share."""
    shared: dict[str, list[str]] = {}
    for instance in adapters.instances:
        if len(instance.hf_names) == 1:
            shared.setdefault(instance.megatron_name, []).append(instance.hf_names[0])
    return [tuple(hf_names) for hf_names in shared.values() if len(hf_names) > 1]


def peft_modules(adapters: ModelSpec) -> list[str]:
    """Names of the HF linears that have adapters."""
    suffix = ".lora_A.weight"
    return [name.removeprefix(PEFT_PREFIX).removesuffix(suffix) for name in adapters.hf_shapes if name.endswith(suffix)]


def _factors_a(rule: Rule, parts: tuple[Part, ...], config: LoRAConfig) -> list[Rule]:
    name = factor_name(rule.megatron_name, "lora_a")
    whole_parts = {part.hf_name: _part_a(rule, part, config.rank) for part in parts}
    if rule.dim == 1:
        (part,) = whole_parts.values()
        return [replace(rule, megatron_name=name, parts=(part,), shape=(config.rank, 0))]
    unsharded = replace(rule, megatron_name=name, shape=(0, rule.shape[1]), axis=None, groups=None)
    if config.canonical:
        return [replace(unsharded, parts=tuple(whole_parts.values()))]
    return [replace(unsharded, parts=(part,)) for part in whole_parts.values()]


def _factor_b(rule: Rule, parts: tuple[Part, ...], config: LoRAConfig) -> Rule:
    name = factor_name(rule.megatron_name, "lora_b")
    rows = tuple(_part_b(rule, part, config.rank) for part in parts)
    if rule.dim == 1:
        return replace(rule, megatron_name=name, parts=rows, shape=(0, config.rank), dim=0, axis=None, groups=None)
    return replace(rule, megatron_name=name, parts=rows, shape=(0, config.rank))


def _part_a(rule: Rule, part: Part, rank: int) -> Part:
    _, columns = _rows_and_columns(rule, part)
    return Part(_peft_name(part, "lora_A"), (Axis(rank, 0), *columns), hf_shape=(rank, part.shape[1]))


def _part_b(rule: Rule, part: Part, rank: int) -> Part:
    rows, _ = _rows_and_columns(rule, part)
    return Part(_peft_name(part, "lora_B"), (*rows, Axis(rank, 1)), hf_shape=(part.shape[0], rank))


def _rows_and_columns(rule: Rule, part: Part) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The axes of `[out, in]`: those along the output first, then those along the input."""
    first = next((place for place, axis in enumerate(part.axes) if axis.along == 1), len(part.axes))
    rows, columns = part.axes[:first], part.axes[first:]
    one_linear = len(part.shape) == 2 and part.hf_name.endswith(_WEIGHT)
    several_along_input = rule.dim == 1 and len(rule.parts) > 1
    if not one_linear or several_along_input or not rows or any(axis.along != 1 for axis in columns):
        raise UnsupportedModelError(
            f"{rule.megatron_name} is made of {part.hf_name} {list(part.shape)}, which is not the weight of one HF linear: "
            f"PEFT has no adapter for it; leave it out of the targets"
        )
    return rows, columns


def _peft_name(part: Part, factor: str) -> str:
    return f"{PEFT_PREFIX}{part.hf_name.removesuffix(_WEIGHT)}.{factor}.weight"


def _names(target: str, module: str) -> bool:
    return target in (module, _last(module)) or ("*" in target and fnmatchcase(module, target))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
