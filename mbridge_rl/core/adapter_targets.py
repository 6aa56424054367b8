"""Decides which linears of a model get adapters: turns targets and layers into rules of the mapping table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mbridge_rl.core.errors import UnsupportedModelError, listed
from mbridge_rl.core.lora_config import LoRAConfig, pattern_matches
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import HFPart, Rule
from mbridge_rl.core.stacked_experts import with_stacked_experts

OUTPUT_LAYER = "output_layer.weight"
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class AdaptedRule:
    """A rule whose weights get adapters.

    Attributes:
        parts: the parts of the rule that are adapted.
        config: the config of these adapters alone, with one rank and alpha for all layers of the rule.
    """

    rule: Rule
    parts: tuple[HFPart, ...]
    config: LoRAConfig


def adapted_rules(spec: ModelSpec, config: LoRAConfig) -> list[AdaptedRule]:
    """The rules of `spec` (see `adapted_spec`) whose weights get adapters. A rule whose layers have different adapters (other
    parts, ranks or alphas) occurs once for each of these.

    Raises:
        ValueError: the config contradicts itself, or a target or pattern names no linear of the model.
        UnsupportedModelError: parts of one tensor are given different ranks or alphas.
    """
    config.require_valid()
    require_known_targets(spec, config.targets)
    _require_known_layers(spec, config)
    adapted = [
        adapted_rule
        for rule in spec.rules
        if adapted_parts(rule, config.targets)
        for adapted_rule in _by_layers(spec, rule, config)
    ]
    for adapted_rule in adapted:
        adapted_rule.config.require_valid()
    if config.rank_pattern or config.alpha_pattern:
        _require_known_patterns(spec, config, adapted)
    return adapted


def adapted_spec(spec: ModelSpec, config: LoRAConfig) -> ModelSpec:
    """The model whose HF linears get the adapters: as in its checkpoints or, with `stacked_experts`, as Transformers 5 has it
    in memory."""
    if not config.stacked_experts:
        return spec
    if not any("{expert}" in rule.megatron_name for rule in spec.rules):
        raise ValueError(f"stacked_experts: {spec.architecture} has no experts")
    return spec if _has_stacked_experts(spec) else with_stacked_experts(spec)


def adapted_parts(rule: Rule, targets: Sequence[str]) -> tuple[HFPart, ...]:
    """The parts of `rule` that get adapters; none if the rule is not for a linear's weight."""
    if not is_linear(rule):
        return ()
    if any(_target_matches(target, module_name(rule.megatron_name)) for target in targets):
        return rule.parts
    return tuple(part for part in rule.parts if any(_target_matches(target, linear_name(part.hf_name)) for target in targets))


def is_linear(rule: Rule) -> bool:
    """Whether a rule is for a linear layer's weight, `[out, in]`. An output layer counts only if it is not the embedding,
    too."""
    if rule.placement != "layer" and (rule.placement, rule.megatron_name) != ("last_stage", OUTPUT_LAYER):
        return False
    return len(rule.shape) == 2 and rule.megatron_name.rpartition(".")[2].startswith("weight")


def require_known_targets(spec: ModelSpec, targets: Sequence[str]) -> None:
    """Checks that every target names a linear of the model.

    Raises:
        ValueError: a target names nothing in the model.
        UnsupportedModelError: a target names an embedding.
    """
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
    if any(_target_matches(target, name) for name in names | tied):
        because = "the output layer of this model is its embedding, and " if spec.tied_embeddings else ""
        raise UnsupportedModelError(
            f"{target}: {because}adapters of embeddings are not supported; leave it out of the targets, or train all weights "
            f"(without LoRA)"
        )


def module_name(weight_name: str) -> str:
    """`X.weight`, `X.weight{expert}` -> `X`."""
    return weight_name.rpartition(".")[0]


def linear_name(hf_name: str) -> str:
    """The linear of an HF tensor: `X.weight` -> `X`. A tensor of stacked experts has no `.weight` and is a linear itself."""
    return hf_name.removesuffix(_WEIGHT)


def targets_of(spec: ModelSpec, modules: Set[str]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The targets that adapt exactly the HF linears `modules`, as few and short as possible, and the layers of those targets
    that are not adapted in all layers.

    Raises:
        UnsupportedModelError: some experts of a layer are adapted and others are not.
    """
    present: dict[str, dict[int, set[str]]] = {}
    for instance in spec.instances:
        if is_linear(instance.rule):
            for part, hf_name in zip(instance.rule.parts, instance.hf_names, strict=True):
                in_layer = present.setdefault(linear_name(part.hf_name), {}).setdefault(instance.layer or 0, set())
                in_layer.add(linear_name(hf_name))
    adapted = {
        pattern: tuple(layer for layer, names in layers.items() if _all_or_none(names, modules))
        for pattern, layers in present.items()
    }
    patterns_by_last_name: dict[str, list[str]] = {}
    for pattern in present:
        patterns_by_last_name.setdefault(_last(pattern), []).append(pattern)
    targets: dict[str, tuple[int, ...]] = {}
    for last, patterns in patterns_by_last_name.items():
        union = {layer for pattern in patterns for layer in adapted[pattern]}
        if all(set(adapted[pattern]) == union & present[pattern].keys() for pattern in patterns):
            targets[last] = tuple(sorted(union))
        else:
            targets |= {pattern: adapted[pattern] for pattern in patterns}
    targets = {target: layers for target, layers in targets.items() if layers}
    everywhere = {target for target, layers in targets.items() if _is_everywhere(target, layers, present)}
    return tuple(targets), {target: layers for target, layers in targets.items() if target not in everywhere}


def _all_or_none(names: Set[str], modules: Set[str]) -> bool:
    """Whether `names`, the linears of one layer that are one linear in Megatron, are adapted."""
    if (adapted := names & modules) and (without := names - modules):
        raise UnsupportedModelError(
            f"{listed(adapted)} have adapters and {listed(without)} have none: Megatron computes the experts of a layer as "
            f"one, so that all of them are adapted, or none"
        )
    return bool(adapted)


def _is_everywhere(target: str, layers: Sequence[int], present: Mapping[str, Mapping[int, object]]) -> bool:
    named = [in_layers for pattern, in_layers in present.items() if target in (pattern, _last(pattern))]
    return set(layers) >= {layer for in_layers in named for layer in in_layers}


def _by_layers(spec: ModelSpec, rule: Rule, config: LoRAConfig) -> Iterator[AdaptedRule]:
    """Yields a rule's adapters, once for all layers that have the same adapters."""
    layers_of: dict[tuple[tuple[HFPart, ...], int, float], list[int]] = {}
    targets_of_layer = {layer: config.targets_in(layer) for layer in _layers_of(spec, rule)}
    for layer, targets in targets_of_layer.items():
        if parts := adapted_parts(rule, targets):
            layers_of.setdefault((parts, *_setting(spec, rule, parts, layer, config)), []).append(layer)
    for (parts, rank, alpha), layers in layers_of.items():
        own_rule = rule if len(layers) == len(targets_of_layer) else replace(rule, layers=tuple(layers))
        plain = {"rank_pattern": {}, "alpha_pattern": {}, "layers": {}}
        yield AdaptedRule(
            own_rule, parts, replace(config, targets=targets_of_layer[layers[0]], rank=rank, alpha=alpha, **plain)
        )


def _setting(spec: ModelSpec, rule: Rule, parts: Sequence[HFPart], layer: int, config: LoRAConfig) -> tuple[int, float]:
    """Rank and alpha of a rule's adapters in one layer.

    Raises:
        UnsupportedModelError: its parts are given different ranks or alphas.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return config.rank, config.alpha
    config_of = {
        name: config.of_linear(name, megatron_name)
        for megatron_name, name in _names_in_layer(rule, parts, layer, spec.num_experts or 0)
    }
    settings: dict[tuple[int, float], str] = {}
    for name, own_config in config_of.items():
        settings.setdefault((own_config.rank, own_config.alpha), name)
    if len(settings) > 1:
        descriptions = ", ".join(f"{name} has rank {rank} and alpha {alpha:g}" for (rank, alpha), name in settings.items())
        raise UnsupportedModelError(
            f"{descriptions}, and Megatron computes them as one linear or one list of experts "
            f"({module_name(rule.megatron_name)}): give all of it one rank and one alpha"
        )
    return next(iter(settings))


def _require_known_layers(spec: ModelSpec, config: LoRAConfig) -> None:
    """Raises ValueError where `config.layers` has a name that is not in `targets`, or a layer without such a linear."""
    for target, layers in config.layers.items():
        if target not in config.targets:
            raise ValueError(f"layers: {target!r} is none of the targets {', '.join(config.targets)}")
        rules = [rule for rule in spec.rules if adapted_parts(rule, (target,))]
        if elsewhere := [module_name(rule.megatron_name) for rule in rules if rule.placement != "layer"]:
            raise ValueError(f"layers: {target!r} names {listed(elsewhere)}, which is in no layer")
        known = {layer for rule in rules for layer in _layers_of(spec, rule)}
        if unknown := set(layers) - known:
            raise ValueError(
                f"layers: {target!r} is given layers {sorted(unknown)}, this model has such a linear in layers {sorted(known)}"
            )


def _layers_of(spec: ModelSpec, rule: Rule) -> Sequence[int]:
    """The layers in which a rule's tensors are; `(0,)` for a rule outside of the layers."""
    if rule.placement != "layer":
        return (0,)
    return range(spec.num_layers) if rule.layers is None else rule.layers


def _names_in_layer(rule: Rule, parts: Sequence[HFPart], layer: int, experts: int) -> Iterator[tuple[str, str]]:
    """Yields `(name of the Megatron linear, name of the HF linear)` for every part and expert."""
    for expert in range(experts) if "{expert}" in rule.megatron_name else [0]:
        for part in parts:
            name = linear_name(part.hf_name).format(layer=layer, expert=expert)
            yield module_name(rule.megatron_name).format(layer=layer, expert=expert), name


def _require_known_patterns(spec: ModelSpec, config: LoRAConfig, adapted: Sequence[AdaptedRule]) -> None:
    """Raises ValueError where a pattern matches no linear that has an adapter."""
    names = [
        name
        for adapted_rule in adapted
        for layer in _layers_of(spec, adapted_rule.rule)
        for pair in _names_in_layer(adapted_rule.rule, adapted_rule.parts, layer, spec.num_experts or 0)
        for name in pair
    ]
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            if not any(pattern_matches(pattern, name) for name in names):
                raise ValueError(
                    f"{field_name}: {pattern!r} matches no linear that has an adapter, such as {names[1]} ({names[0]})"
                )


def _has_stacked_experts(spec: ModelSpec) -> bool:
    return any(axis.index for rule in spec.rules for part in rule.parts for axis in part.axes)


def _target_matches(target: str, module: str) -> bool:
    return target in (module, _last(module)) or ("*" in target and fnmatchcase(module, target))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
