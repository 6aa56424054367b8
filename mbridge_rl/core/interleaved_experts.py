"""Experts whose gate and up rows alternate in blocks, for Transformer Engine's fused kernels (`moe_mlp_glu_interleave_size`).

Megatron-core has this order of the rows of an expert's first linear since 0.18. It is the same rule with other rectangles: an
expert's rows are not one group `[gate | up]` per rank, but one such group for every block.

    interleave size 32, inner size 96        [gate 0..31 | up 0..31 | gate 32..63 | up 32..63 | gate 64..95 | up 64..95]
"""

from __future__ import annotations

from dataclasses import replace

from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule

FIELD = "moe_mlp_glu_interleave_size"
_FIRST_LINEAR = ".mlp.experts.linear_fc1."


def with_interleaved_experts(spec: ModelSpec, size: int) -> ModelSpec:
    """The same model with experts whose gate and up rows alternate in blocks of `size`, in its Megatron config as well. Shared
    experts keep their order, as in Megatron.

    Raises:
        UnsupportedModelError: the model has no experts with a gate.
        LayoutError: an expert's inner size is no multiple of `size`.
    """
    if not any(map(_is_first_linear, spec.rules)):
        raise UnsupportedModelError(f"{FIELD}={size}: {spec.architecture} has no experts with a gate; leave it unset")
    return replace(
        spec,
        rules=tuple(_interleaved(rule, size) if _is_first_linear(rule) else rule for rule in spec.rules),
        transformer_config={**spec.transformer_config, FIELD: size},
        alternatives=tuple(with_interleaved_experts(other, size) for other in spec.alternatives),
        prediction=None if spec.prediction is None else with_interleaved_experts(spec.prediction, size),
    )


def _is_first_linear(rule: Rule) -> bool:
    return _FIRST_LINEAR in rule.megatron_name and len(rule.parts) == 2


def _interleaved(rule: Rule, size: int) -> Rule:
    inner = rule.parts[0].size(rule.dim)
    if size < 1 or inner % size:
        raise LayoutError(f"{rule.megatron_name}: {FIELD}={size} does not divide the inner size {inner}; choose a divisor")
    return replace(rule, groups=inner // size)
