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

DoRA (Liu et al., arXiv 2402.09353) adds a magnitude per row, dealt as a bias is:

    W' = magnitude * (W + scale * B A) / |W + scale * B A| (of every row)

Adapters that start from the weights themselves (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775) leave `W` as it is, too:
`W + scale * (B A - B0 A0)`. To PEFT that is one adapter of twice the rank, `[B, -B0] [A; A0]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import Coordinates, ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.patterns import pattern_matches
from mbridge_rl.core.rules import Axis, Part, Rule
from mbridge_rl.core.stacked_experts import with_stacked_experts

PEFT_PREFIX = "base_model.model."
OUTPUT_LAYER = "output_layer.weight"
_WEIGHT = ".weight"


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

    def adapter_numbers(self) -> Tensor:
        """Which `A` each row has, `[rows]` int64; -1 where it has none. `B` and magnitudes hold the others in this order."""
        of_group = [torch.full((size,), -1 if which is None else which) for size, which in self.parts]
        return torch.cat(of_group).repeat(self.groups)


def adapter_spec(spec: ModelSpec, config: LoRAConfig) -> ModelSpec:
    """The adapters of a model as a model: Megatron names `X.lora_a`, `X.lora_b`, ..., HF names PEFT's.

    Raises:
        ValueError: the config contradicts itself, or a target names no linear of the model.
        UnsupportedModelError: a target has no PEFT form.
    """
    spec = adapted_spec(spec, config)
    adapted = adapted_rules(spec, config)
    names = _peft_modules_of([part for one in adapted for part in one.parts])
    rules = tuple(factor for one in adapted for factor in _Factors(one, names).rules())
    return replace(spec, rules=rules, extras=(), ignored_hf_prefixes=(), aliases={})


@dataclass(frozen=True, slots=True)
class AdaptedRule:
    """A rule whose weights get adapters.

    Attributes:
        parts: those that are adapted.
        config: of these adapters alone: uniform.
    """

    rule: Rule
    parts: tuple[Part, ...]
    config: LoRAConfig


def adapted_rules(spec: ModelSpec, config: LoRAConfig) -> list[AdaptedRule]:
    """The rules of `spec` (see `adapted_spec`) whose weights get adapters; one whose layers have different ranks or alphas
    comes once for each of these.

    Raises:
        ValueError: the config contradicts itself, or a target or pattern names no linear of the model.
        UnsupportedModelError: what is one tensor is given different ranks or alphas.
    """
    config.require_valid()
    require_known_targets(spec, config.targets)
    found = [
        one
        for rule in spec.rules
        if (parts := adapted_parts(rule, config.targets))
        for one in _by_layers(spec, rule, parts, config)
    ]
    for one in found:
        one.config.require_valid()
    if not config.is_uniform:
        _require_known_patterns(spec, config)
    return found


def adapted_spec(spec: ModelSpec, config: LoRAConfig) -> ModelSpec:
    """The model whose HF linears the adapters are of: as its checkpoints are or, with `stacked_experts`, as Transformers 5 has
    it in memory."""
    if not config.stacked_experts:
        return spec
    if not any("{expert}" in rule.megatron_name for rule in spec.rules):
        raise ValueError(f"stacked_experts: {spec.architecture} has no experts")
    return spec if _has_stacked_experts(spec) else with_stacked_experts(spec)


def adapted_parts(rule: Rule, targets: Sequence[str]) -> tuple[Part, ...]:
    """The parts of `rule` that get adapters; none for what is no linear's weight."""
    if not is_linear(rule):
        return ()
    if any(_names(target, module_name(rule.megatron_name)) for target in targets):
        return rule.parts
    return tuple(part for part in rule.parts if any(_names(target, linear_name(part.hf_name)) for target in targets))


def is_linear(rule: Rule) -> bool:
    """Whether a rule is of a linear layer's weight, `[out, in]`; of an output layer only where it is not the embedding, too."""
    if rule.placement != "layer" and (rule.placement, rule.megatron_name) != ("last_stage", OUTPUT_LAYER):
        return False
    return len(rule.shape) == 2 and rule.megatron_name.rpartition(".")[2].startswith("weight")


def require_known_targets(spec: ModelSpec, targets: Sequence[str]) -> None:
    """Raises ValueError where a target names nothing in the model, and UnsupportedModelError for an embedding."""
    for target in targets:
        if not any(adapted_parts(rule, (target,)) for rule in spec.rules):
            _refuse_embedding(spec, target)
            known = sorted({_last(module_name(rule.megatron_name)) for rule in spec.rules if is_linear(rule)})
            parts = sorted({_last(linear_name(part.hf_name)) for rule in spec.rules if is_linear(rule) for part in rule.parts})
            raise ValueError(
                f"no layer of this model has a linear named {target}; choose from {', '.join(known)} (Megatron's) or "
                f"{', '.join(parts)} (Hugging Face's)"
            )


def _refuse_embedding(spec: ModelSpec, target: str) -> None:
    embeddings = [rule for rule in spec.rules if rule.padded and not is_linear(rule)]
    names = {module_name(rule.megatron_name) for rule in embeddings}
    names |= {linear_name(part.hf_name) for rule in embeddings for part in rule.parts}
    tied = {"lm_head"} if spec.tied_embeddings else set()
    if any(_names(target, name) for name in names | tied):
        because = "the output layer of this model is its embedding, and " if spec.tied_embeddings else ""
        raise UnsupportedModelError(
            f"{target}: {because}adapters of embeddings are not supported; leave it out of the targets, or train all weights "
            f"(without LoRA)"
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
    if rule.padded:  # the rows of no token, too: their B stays zero
        return FusedRows(1, ((rule.local_shape(layout)[0], 0),))
    groups = rule.groups or shards
    of_group = [(part.size(0) // groups, which[part.hf_name] if part in chosen else None) for part in rule.parts]
    if groups % shards == 0:
        return FusedRows(groups // shards, tuple(of_group))
    if len(chosen) < len(rule.parts):
        raise LayoutError(
            f"{rule.megatron_name}: {rule.axis}={shards} cuts through its {groups} groups, so its parts cannot be adapted one "
            f"by one; adapt all of {', '.join(_last(linear_name(part.hf_name)) for part in rule.parts)}"
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


def linear_name(hf_name: str) -> str:
    """Of an HF tensor: `X.weight` -> `X`; a tensor of stacked experts, which is no module's `weight`, is a linear itself."""
    return hf_name.removesuffix(_WEIGHT)


def targets_of(spec: ModelSpec, modules: Set[str]) -> tuple[str, ...]:
    """The targets that adapt the HF linears `modules`, in as few and short names as say it exactly."""
    patterns: dict[str, set[str]] = {}
    for instance in spec.instances:
        if is_linear(instance.rule):
            for part, hf_name in zip(instance.rule.parts, instance.hf_names, strict=True):
                patterns.setdefault(linear_name(part.hf_name), set()).add(linear_name(hf_name))
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


def adapted_linears(spec: ModelSpec, config: LoRAConfig) -> dict[str, LoRAConfig]:
    """The HF linears that have adapters (of stacked experts their parameters), by name, each with the config of its own."""
    spec = adapted_spec(spec, config)
    of_rule = {one.rule: one for one in adapted_rules(spec, config)}
    return {
        linear_name(part.hf_name.format(layer=instance.layer, expert=instance.expert)): of_rule[instance.rule].config
        for instance in replace(spec, rules=tuple(of_rule)).instances
        for part in of_rule[instance.rule].parts
    }


def _by_layers(spec: ModelSpec, rule: Rule, parts: tuple[Part, ...], config: LoRAConfig) -> Iterator[AdaptedRule]:
    if config.is_uniform:
        yield AdaptedRule(rule, parts, config)
        return
    layers_of: dict[tuple[int, float], list[int]] = {}
    for layer in _layers_of(spec, rule):
        own = {
            name: config.of_linear(name, megatron_name)
            for megatron_name, name in _names_in_layer(rule, parts, layer, spec.num_experts or 0)
        }
        settings: dict[tuple[int, float], str] = {}
        for name, one in own.items():
            settings.setdefault((one.rank, one.alpha), name)
        if len(settings) > 1:
            said = ", ".join(f"{name} has rank {rank} and alpha {alpha:g}" for (rank, alpha), name in settings.items())
            raise UnsupportedModelError(
                f"{said}, and Megatron computes them as one linear or one list of experts "
                f"({module_name(rule.megatron_name)}): give all of it one rank and one alpha"
            )
        layers_of.setdefault(next(iter(settings)), []).append(layer)
    for (rank, alpha), layers in layers_of.items():
        own_rule = rule if len(layers_of) == 1 else replace(rule, layers=tuple(layers))
        yield AdaptedRule(own_rule, parts, replace(config, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={}))


def _layers_of(spec: ModelSpec, rule: Rule) -> Sequence[int]:
    """The layers that a rule's names count; one for what is in none."""
    if rule.placement != "layer":
        return (0,)
    return range(spec.num_layers) if rule.layers is None else rule.layers


def _names_in_layer(rule: Rule, parts: Sequence[Part], layer: int, experts: int) -> Iterator[tuple[str, str]]:
    """The names of the Megatron linear and of each of its HF linears, for every expert."""
    for expert in range(experts) if "{expert}" in rule.megatron_name else [0]:
        for part in parts:
            name = linear_name(part.hf_name).format(layer=layer, expert=expert)
            yield module_name(rule.megatron_name).format(layer=layer, expert=expert), name


def _require_known_patterns(spec: ModelSpec, config: LoRAConfig) -> None:
    """Raises ValueError where a pattern matches nothing that has an adapter."""
    names = [
        name
        for rule in spec.rules
        if (parts := adapted_parts(rule, config.targets))
        for layer in _layers_of(spec, rule)
        for both in _names_in_layer(rule, parts, layer, spec.num_experts or 0)
        for name in both
    ]
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            if not any(pattern_matches(pattern, name) for name in names):
                raise ValueError(
                    f"{field_name}: {pattern!r} matches no linear that has an adapter, such as {names[1]} ({names[0]})"
                )


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
        """In the order of PEFT's files."""
        rank = self._config.rank
        rules = [*self._a("lora_a", 0), self._b("lora_b", 0)]
        if self._config.keeps_start:
            rules += [*self._a("lora_start_a", rank), self._b("lora_start_b", rank)]
        if self._config.dora:
            rules.append(self._magnitude())
        return rules

    def _a(self, factor: str, first: int) -> list[Rule]:
        """`[rank, in]`, cut as the input is. Parts of one HF tensor have one."""
        name, rank = factor_name(self._rule.megatron_name, factor), Axis(self._config.peft_rank, 0, first, self._config.rank)
        of_tensor = {
            part.hf_name: Part(
                f"{self._names[part.hf_name]}.lora_A.weight",
                (*axes.expert, rank, *axes.columns),
                hf_shape=(axes.experts * rank.extent, axes.size_in),
            )
            for part, axes in zip(self._parts, self._axes, strict=True)
        }
        if self._rule.dim == 1:
            return [replace(self._rule, megatron_name=name, parts=tuple(of_tensor.values()), shape=(self._config.rank, 0))]
        shape = (0, self._rule.shape[1])
        unsharded = replace(self._rule, megatron_name=name, shape=shape, axis=None, groups=None, padded=False)
        if self._config.canonical:
            return [replace(unsharded, parts=tuple(of_tensor.values()))]
        return [replace(unsharded, parts=(part,)) for part in of_tensor.values()]

    def _b(self, factor: str, first: int) -> Rule:
        """`[out, rank]`, cut as the output is."""
        rank = Axis(self._config.peft_rank, 1, first, self._config.rank)
        parts = tuple(
            Part(
                f"{self._names[part.hf_name]}.lora_B.weight",
                (*axes.rows, rank, *axes.expert),
                hf_shape=(axes.size_out, rank.extent * axes.experts),
            )
            for part, axes in zip(self._parts, self._axes, strict=True)
        )
        return self._by_rows(factor, parts, (0, self._config.rank))

    def _magnitude(self) -> Rule:
        """`[out]`, as a bias."""
        parts = tuple(
            Part(f"{self._names[part.hf_name]}.lora_magnitude_vector", axes.rows, hf_shape=(axes.size_out,))
            for part, axes in zip(self._parts, self._axes, strict=True)
        )
        return self._by_rows("lora_magnitude", parts, (0,))

    def _by_rows(self, factor: str, parts: tuple[Part, ...], shape: tuple[int, ...]) -> Rule:
        name = factor_name(self._rule.megatron_name, factor)
        if self._rule.dim == 1:
            return replace(self._rule, megatron_name=name, parts=parts, shape=shape, dim=0, axis=None, groups=None)
        return replace(self._rule, megatron_name=name, parts=parts, shape=shape)


class _PartAxes:
    """The axes of a linear's weight by what they are: the stack of experts (one, or none), the output's and the input's.

    Raises:
        UnsupportedModelError: it is not the weight of one HF linear, nor a stack of such weights.
    """

    def __init__(self, rule: Rule, part: Part) -> None:
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


def _peft_modules_of(parts: list[Part]) -> dict[str, str]:
    """Name of the module that holds each part's factors, by `hf_name`.

    PEFT wraps a module once for each of its parameters that are targeted, so that the first one's factors lie innermost.
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


def _has_stacked_experts(spec: ModelSpec) -> bool:
    return any(axis.index for rule in spec.rules for part in rule.parts for axis in part.axes)


def _names(target: str, module: str) -> bool:
    return target in (module, _last(module)) or ("*" in target and fnmatchcase(module, target))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
