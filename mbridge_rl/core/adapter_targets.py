"""Which linears of a model get adapters: targets, by layers, as rules of the mapping table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mbridge_rl.core.errors import UnsupportedModelError, listed
from mbridge_rl.core.lora_config import LoRAConfig, pattern_matches
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Part, Rule
from mbridge_rl.core.stacked_experts import with_stacked_experts

OUTPUT_LAYER = "output_layer.weight"
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class AdaptedRule:
    """A rule whose weights get adapters.

    Attributes:
        parts: those that are adapted.
        config: of these adapters alone: uniform, the same in all layers of the rule.
    """

    rule: Rule
    parts: tuple[Part, ...]
    config: LoRAConfig


def adapted_rules(spec: ModelSpec, config: LoRAConfig) -> list[AdaptedRule]:
    """The rules of `spec` (see `adapted_spec`) whose weights get adapters; one whose layers have different adapters (other
    parts, ranks or alphas) comes once for each of these.

    Raises:
        ValueError: the config contradicts itself, or a target or pattern names no linear of the model.
        UnsupportedModelError: what is one tensor is given different ranks or alphas.
    """
    config.require_valid()
    require_known_targets(spec, config.targets)
    _require_known_layers(spec, config)
    found = [one for rule in spec.rules if adapted_parts(rule, config.targets) for one in _by_layers(spec, rule, config)]
    for one in found:
        one.config.require_valid()
    if config.rank_pattern or config.alpha_pattern:
        _require_known_patterns(spec, config, found)
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


def module_name(weight_name: str) -> str:
    """`X.weight`, `X.weight{expert}` -> `X`."""
    return weight_name.rpartition(".")[0]


def linear_name(hf_name: str) -> str:
    """Of an HF tensor: `X.weight` -> `X`; a tensor of stacked experts, which is no module's `weight`, is a linear itself."""
    return hf_name.removesuffix(_WEIGHT)


def targets_of(spec: ModelSpec, modules: Set[str]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The targets that adapt the HF linears `modules`, in as few and short names as say it exactly, and the layers of those
    that are not adapted in all.

    Raises:
        UnsupportedModelError: of the experts of one layer some are adapted and some are not.
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
    of_last: dict[str, list[str]] = {}
    for pattern in present:
        of_last.setdefault(_last(pattern), []).append(pattern)
    targets: dict[str, tuple[int, ...]] = {}
    for last, patterns in of_last.items():
        union = {layer for pattern in patterns for layer in adapted[pattern]}
        if all(set(adapted[pattern]) == union & present[pattern].keys() for pattern in patterns):
            targets[last] = tuple(sorted(union))
        else:
            targets |= {pattern: adapted[pattern] for pattern in patterns}
    targets = {target: layers for target, layers in targets.items() if layers}
    everywhere = {target for target, layers in targets.items() if _is_everywhere(target, layers, present)}
    return tuple(targets), {target: layers for target, layers in targets.items() if target not in everywhere}


def _all_or_none(names: Set[str], modules: Set[str]) -> bool:
    """Whether the linears of one layer that Megatron has as one are adapted."""
    if (found := names & modules) and (without := names - modules):
        raise UnsupportedModelError(
            f"{listed(found)} have adapters and {listed(without)} have none: Megatron computes the experts of a layer as one, "
            f"so that all of them are adapted, or none"
        )
    return bool(found)


def _is_everywhere(target: str, layers: Sequence[int], present: Mapping[str, Mapping[int, object]]) -> bool:
    named = [of_pattern for pattern, of_pattern in present.items() if target in (pattern, _last(pattern))]
    return set(layers) >= {layer for of_pattern in named for layer in of_pattern}


def _by_layers(spec: ModelSpec, rule: Rule, config: LoRAConfig) -> Iterator[AdaptedRule]:
    """A rule's adapters, once for all layers that have the same."""
    layers_of: dict[tuple[tuple[Part, ...], int, float], list[int]] = {}
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


def _setting(spec: ModelSpec, rule: Rule, parts: Sequence[Part], layer: int, config: LoRAConfig) -> tuple[int, float]:
    """Rank and alpha of a rule's adapters in one layer.

    Raises:
        UnsupportedModelError: its parts are given different ones.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return config.rank, config.alpha
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
    return next(iter(settings))


def _require_known_layers(spec: ModelSpec, config: LoRAConfig) -> None:
    """Raises ValueError where a target is no target, or in one of the layers that it is given no linear."""
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


def _require_known_patterns(spec: ModelSpec, config: LoRAConfig, adapted: Sequence[AdaptedRule]) -> None:
    """Raises ValueError where a pattern matches nothing that has an adapter."""
    names = [
        name
        for one in adapted
        for layer in _layers_of(spec, one.rule)
        for both in _names_in_layer(one.rule, one.parts, layer, spec.num_experts or 0)
        for name in both
    ]
    for field_name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field_name):
            if not any(pattern_matches(pattern, name) for name in names):
                raise ValueError(
                    f"{field_name}: {pattern!r} matches no linear that has an adapter, such as {names[1]} ({names[0]})"
                )


def _has_stacked_experts(spec: ModelSpec) -> bool:
    return any(axis.index for rule in spec.rules for part in rule.parts for axis in part.axes)


def _names(target: str, module: str) -> bool:
    return target in (module, _last(module)) or ("*" in target and fnmatchcase(module, target))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
