"""Checkpoints that hold all experts of a layer in two tensors."""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import EXPERT, Axis, Part, Rule


def with_stacked_experts(spec: ModelSpec, *, transposed: bool = False) -> ModelSpec:
    """The same model for checkpoints with `experts.gate_up_proj` `[experts, 2 * ffn, hidden]`, gates first, and
    `experts.down_proj` `[experts, hidden, ffn]` in place of three tensors per expert.

    Args:
        transposed: `[experts, hidden, 2 * ffn]` and `[experts, ffn, hidden]`.
    """
    rules = (
        _stacked(rule, spec.num_experts or 0, transposed) if "{expert}" in rule.megatron_name else rule for rule in spec.rules
    )
    return replace(spec, rules=tuple(rules))


def _stacked(rule: Rule, experts: int, transposed: bool) -> Rule:
    prefix, _, _ = rule.parts[0].hf_name.partition(".{expert}.")
    prefix = prefix.replace(".block_sparse_moe.", ".mlp.")  # as Transformers 5 has it in memory (Mixtral, MiniMax-M2)
    name = "gate_up_proj" if rule.dim == 0 else "down_proj"
    parts = []
    for place, part in enumerate(rule.parts):
        rows, columns = part.shape
        axes = (Axis(len(rule.parts) * rows, 0, place * rows, rows), Axis(columns, 1))
        parts.append(Part(f"{prefix}.{name}", (Axis(experts, index=EXPERT), *(reversed(axes) if transposed else axes))))
    return replace(rule, parts=tuple(parts))
