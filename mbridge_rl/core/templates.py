"""Compiles the flows of a plan from a few templates: layers of one kind differ only in names and in their pipeline stage.

One layer of each kind is compiled, and its flows are repeated for the other layers by renaming ranks. A model of a trillion
parameters on a thousand ranks takes seconds. The result differs from `compile_plan` of the whole model only in how replicas
share the work: a template divides each layer's bytes evenly among the layer's holders, which is even over the model as well.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.rules import Rule
from mbridge_rl.core.segments import Side, megatron_side


@dataclass(frozen=True)
class Flows:
    """The amount of data that goes from each source rank to each target rank; one row per HF tensor and pair of ranks.

    Attributes:
        hf_names: the names of the tensors that are sent, in checkpoint order.
        sections: `[tensors]`, the section of each tensor, counted in checkpoint order. A section is a layer, or the tensors
            before or after the layers.
        tensor: `[rows]`, ascending, an index into `hf_names`.
        source, target: `[rows]`, the source rank and the target rank.
        elements, rectangles: `[rows]`, the number of elements and of strided pieces.
        fingerprint: hex digest of the plans from which the rows were made.
    """

    hf_names: list[str]
    sections: np.ndarray
    tensor: np.ndarray
    source: np.ndarray
    target: np.ndarray
    elements: np.ndarray
    rectangles: np.ndarray
    fingerprint: str


def engine_side(spec: ModelSpec, layout: ParallelLayout) -> Side:
    """The side of the workers of one engine, computed without asking them. Tensor, pipeline and expert parallelism divide the
    model as Megatron's do, and if there are fewer KV heads than `tp` ranks, several ranks hold the same head. Names and fusions
    are Megatron's, not the workers' own; the numbers of bytes do not depend on them.

    Raises:
        LayoutError: the layout cannot divide the model; the message gives advice in an engine's own sizes.
    """
    # Megatron cannot shard experts that have biases; an engine can.
    spec = replace(spec, transformer_config={**spec.transformer_config, "add_bias_linear": False})
    try:
        return _engine_side(spec, layout)
    except LayoutError as error:
        if "etp=" not in str(error):
            raise
        raise LayoutError(
            f"{error}. An engine's etp is tp*dp/ep = {layout.tp}*{layout.dp}/{layout.ep}, the ranks that share an expert: "
            f"choose another tp or dp, or an ep that leaves fewer"
        ) from error


def _engine_side(spec: ModelSpec, layout: ParallelLayout) -> Side:
    heads = spec.transformer_config.get("num_attention_heads", layout.tp)
    if heads % layout.tp:
        raise LayoutError(f"{heads} attention heads do not divide by an engine's tp={layout.tp}; choose a divisor")
    heads = [rule for rule in spec.rules if rule.groups and rule.axis == "tp"]
    repeated = [rule for rule in heads if rule.groups and rule.groups % layout.tp and layout.tp % rule.groups == 0]
    if not repeated:
        return megatron_side(spec, layout)
    query_rules = {rule: _parts(rule, key_value=False) for rule in repeated}
    sides = [megatron_side(replace(spec, rules=tuple(query_rules.get(rule, rule) for rule in spec.rules)), layout)]
    for groups in sorted({rule.groups or 1 for rule in repeated}):
        key_value_rules = tuple(_parts(rule, key_value=True) for rule in repeated if rule.groups == groups)
        # Neighbouring ranks hold the same heads, as cp ranks do in Megatron.
        copies = replace(layout, tp=groups, cp=layout.cp * layout.tp // groups, ep=1, etp=1, order="cp-tp-ep-dp-pp")
        sides.append(megatron_side(replace(spec, rules=key_value_rules), copies))
    return Side(
        tuple(segment for side in sides for segment in side.segments),
        {name: shape for side in sides for name, shape in side.shapes.items()},
        {name: ranks for side in sides for name, ranks in side.holders.items()},
        frozenset[str]().union(*(side.padded_names for side in sides)),
    )


def _parts(rule: Rule, *, key_value: bool) -> Rule:
    """The rule with only the key and value parts of a fused projection, which are its smallest, or with only the other
    parts."""
    smallest = min(part.size(rule.dim) for part in rule.parts)
    parts = tuple(part for part in rule.parts if (part.size(rule.dim) == smallest) is key_value)
    if not parts:
        raise LayoutError(
            f"{rule.megatron_name}: {rule.groups} heads cannot be dealt to more ranks than there are; choose a smaller tp"
        )
    name = f"{rule.megatron_name}.key_value" if key_value else rule.megatron_name
    return replace(rule, megatron_name=name, parts=parts, groups=None)


def compile_templates(spec: ModelSpec, source: ParallelLayout, target: ParallelLayout) -> Flows:
    """The flows from Megatron ranks of layout `source` to the workers of one engine of layout `target`.

    Raises:
        LayoutError: one of the layouts cannot divide the model.
    """
    spec.validate(source)
    tensors_of = _tensors_by_layer(spec)
    shifts = [_StageShift(layout, spec.num_layers) for layout in (source, target)]
    state = hashlib.blake2b(digest_size=8)
    tables: list[np.ndarray] = []
    for layers in _kinds(spec):
        alone = _only(spec, layers[0])
        plan = compile_plan(alone, megatron_side(alone, source), engine_side(alone, target))
        state.update(f"{plan.fingerprint} {layers}\n".encode())
        tensor, source_rank, target_rank, *amounts = _table(plan)
        ends = list(zip(shifts, (source_rank, target_rank), strict=True))
        for layer in layers:
            moved = [shift.ranks(ranks, layers[0], layer) for shift, ranks in ends]
            tables.append(np.stack([tensors_of[layer][tensor], *moved, *amounts]))
    table = np.concatenate(tables, axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    return Flows(list(spec.hf_shapes), _sections(spec), *table, fingerprint=state.hexdigest())


def compile_flows(spec: ModelSpec, source: ParallelLayout, target: ParallelLayout) -> Flows:
    """The same flows from one plan of the whole model: exact, but it takes a minute and gigabytes for the largest models."""
    plan = compile_plan(spec, megatron_side(spec, source), engine_side(spec, target))
    return Flows(list(spec.hf_shapes), _sections(spec), *_table(plan), fingerprint=plan.fingerprint)


def _sections(spec: ModelSpec) -> np.ndarray:
    """`[tensors]`: the section of each tensor. Section 0 is before the layers, then every layer is one, and the last is after
    them."""
    layer_of = {hf_name: instance.layer for instance in reversed(spec.instances) for hf_name in instance.hf_names}
    layers = np.array([-1 if layer_of[hf_name] is None else layer_of[hf_name] for hf_name in spec.hf_shapes])
    return np.cumsum(np.diff(layers, prepend=layers[:1]) != 0)


def _tensors_by_layer(spec: ModelSpec) -> dict[int | None, np.ndarray]:
    """The indices in `spec.hf_shapes` of every layer's tensors, in order."""
    index_of = {hf_name: index for index, hf_name in enumerate(spec.hf_shapes)}
    indices_of_layer: dict[int | None, dict[int, None]] = defaultdict(dict)
    for instance in spec.instances:
        indices_of_layer[instance.layer].update((index_of[hf_name], None) for hf_name in instance.hf_names)
    return {layer: np.array(list(indices)) for layer, indices in indices_of_layer.items()}


def _kinds(spec: ModelSpec) -> list[tuple[int | None, ...]]:
    """Layers grouped by the rules that apply to them; `(None,)` stands for the tensors outside of layers."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    layered = [(index, rule) for index, rule in enumerate(spec.rules) if rule.placement == "layer"]
    for layer in range(spec.num_layers):
        groups[tuple(index for index, rule in layered if rule.layers is None or layer in rule.layers)].append(layer)
    return [(None,), *(tuple(layers) for layers in groups.values())]


def _only(spec: ModelSpec, layer: int | None) -> ModelSpec:
    """The model reduced to one layer, which keeps its index; `None` reduces it to the tensors outside of layers."""
    if layer is None:
        return replace(spec, rules=tuple(rule for rule in spec.rules if rule.placement != "layer"))
    present = (rule for rule in spec.rules if rule.placement == "layer" and (rule.layers is None or layer in rule.layers))
    return replace(spec, rules=tuple(replace(rule, layers=(layer,)) for rule in present))


class _StageShift:
    """Translates ranks of one layer's pipeline stage into ranks of another layer's stage with otherwise equal coordinates."""

    def __init__(self, layout: ParallelLayout, num_layers: int) -> None:
        self._stages = [stage % layout.pp for stage in layout.stage_of_layer(num_layers)]
        at = {rank: layout.coordinates(rank) for rank in range(layout.world_size)}
        rank_at = {place: rank for rank, place in at.items()}
        self._moved = np.array([[rank_at[replace(at[rank], pp=stage)] for rank in at] for stage in range(layout.pp)])

    def ranks(self, ranks: np.ndarray, layer: int | None, other: int | None) -> np.ndarray:
        return ranks if other is None or layer is None else self._moved[self._stages[other]][ranks]


def _table(plan: Plan) -> np.ndarray:
    """`[5, rows]`: tensor, source, target, elements and rectangles of a plan's copies, one row per tensor and pair of ranks."""
    index = {hf_name: position for position, hf_name in enumerate(plan.hf_shapes)}
    rows: dict[tuple[int, int, int], list[int]] = {}
    for copy in plan.copies:
        row = rows.setdefault((index[copy.hf_name], copy.source_rank, copy.target_rank), [0, 0])
        row[0] += copy.numel
        row[1] += 1
    return np.array([(*pair, *row) for pair, row in rows.items()], dtype=np.int64).reshape(-1, 5).T
