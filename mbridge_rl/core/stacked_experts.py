"""The mapping for checkpoints that hold all experts of a layer in two tensors, as Transformers 5 has them in memory."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import EXPERT, Axis, HFPart, Rule

# Names of modules in checkpoints on the hub, and Transformers 5's own names for them.
_IN_MEMORY = {
    ".block_sparse_moe.": ".mlp.",  # Mixtral, MiniMax-M2
    ".mlp.moe_statics.": ".mlp.gate.moe_statics.",  # ERNIE 4.5
    "backbone.": "model.",  # Nemotron-H
}


def in_memory_spec(spec: ModelSpec) -> ModelSpec | None:
    """The same model with the tensors that Transformers 5 has in memory, and saves with `save_original_format=False`: stacked
    experts, and the names of its own modules. `None` if checkpoints have these tensors anyway."""
    if any("{expert}" in part.hf_name for rule in spec.rules for part in rule.parts):
        spec = with_stacked_experts(spec)
    elif not any(name in part.hf_name for rule in spec.rules for part in rule.parts for name in _IN_MEMORY):
        return None
    rules = tuple(replace(rule, parts=tuple(_named_in_memory(part) for part in rule.parts)) for rule in spec.rules)
    return replace(spec, rules=rules)


def _named_in_memory(part: HFPart) -> HFPart:
    hf_name = part.hf_name
    for name, in_memory in _IN_MEMORY.items():
        hf_name = hf_name.replace(name, in_memory)
    return replace(part, hf_name=hf_name)


def with_stacked_experts(spec: ModelSpec, *, transposed: bool = False) -> ModelSpec:
    """The same model for checkpoints with `experts.gate_up_proj` `[experts, 2 * ffn, hidden]`, gates first, and
    `experts.down_proj` `[experts, hidden, ffn]` in place of three tensors per expert.

    Args:
        transposed: whether the tensors are `[experts, hidden, 2 * ffn]` and `[experts, ffn, hidden]`. Experts without a gate
            have `up_proj`.
    """
    rules = (
        _stacked(rule, spec.num_experts or 0, transposed) if "{expert}" in rule.megatron_name else rule for rule in spec.rules
    )
    return replace(spec, rules=tuple(rules))


def _stacked(rule: Rule, experts: int, transposed: bool) -> Rule:
    prefix, _, linear = _named_in_memory(rule.parts[0]).hf_name.partition(".{expert}.")
    name = "down_proj" if rule.dim == 1 else "gate_up_proj" if len(rule.parts) > 1 else linear.removesuffix(".weight")
    parts = []
    for place, part in enumerate(rule.parts):
        rows, columns = part.shape
        axes = (Axis(len(rule.parts) * rows, 0, place * rows, rows), Axis(columns, 1))
        parts.append(HFPart(f"{prefix}.{name}", (Axis(experts, index=EXPERT), *(reversed(axes) if transposed else axes))))
    return replace(rule, parts=tuple(parts))
