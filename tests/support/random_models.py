"""Random models made of every kind of rule, and random layouts that they admit: what the property tests draw from."""

from __future__ import annotations

from dataclasses import replace
from math import lcm, prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import (
    EXPERT,
    Axis,
    HFPart,
    Rule,
    column_parallel,
    grouped_parallel,
    replicated,
    row_parallel,
    vocabulary_parallel,
)

OURS, THEIRS = "decoder.layers.{layer}", "model.layers.{layer}"
small = st.integers(1, 4)
_MOST_RANKS = 12  # before data parallelism doubles them


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """A model whose sizes are multiples of a common one, so that some layouts divide it, and otherwise odd."""
    unit = draw(st.sampled_from([1, 2, 4, 6]))
    hidden, ffn, head_dim = unit * draw(small), unit * draw(small), draw(small)
    kv_heads, queries = unit * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    experts = draw(st.sampled_from([None, 2, 3, 4, 6]))
    vocab, layers = draw(st.integers(3, 17)), draw(st.integers(1, 3))
    tied = draw(st.booleans())
    layer_rules = [
        replicated(f"{OURS}.norm", f"{THEIRS}.norm", (hidden,)),
        *draw(st.sampled_from([_attention, _gated_attention, shared_key_value]))(hidden, kv_heads, queries, head_dim),
        row_parallel(f"{OURS}.proj", f"{THEIRS}.o", (hidden, kv_heads * queries * head_dim)),
        *draw(st.sampled_from([_gated_mlp, _recurrent]))(hidden, ffn, unit),
    ]
    if experts:
        layer_rules += draw(st.sampled_from([_experts, _stacked_experts, _interleaved_experts]))(hidden, ffn, experts)
    if draw(st.booleans()):
        chosen = tuple(draw(st.sets(st.integers(0, layers - 1), min_size=1)))
        layer_rules[-1] = replace(layer_rules[-1], layers=chosen)
    rules = (
        vocabulary_parallel("embedding", "embed", (vocab, hidden), placement="first_stage"),
        *layer_rules,
        replicated("final_norm", "norm", (hidden,), placement="last_stage"),
        vocabulary_parallel(
            "output", "embed" if tied else "lm_head", (vocab, hidden), placement="last_stage_copy" if tied else "last_stage"
        ),
    )
    return ModelSpec("Random", layers, vocab, tied, {}, {}, rules, experts)


def _attention(hidden: int, kv_heads: int, queries: int, head_dim: int) -> list[Rule]:
    sizes = {"q": kv_heads * queries * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    return [
        grouped_parallel(f"{OURS}.qkv", {f"{THEIRS}.{name}": size for name, size in sizes.items()}, kv_heads, (hidden,)),
        grouped_parallel(f"{OURS}.qkv_bias", {f"{THEIRS}.{name}_bias": size for name, size in sizes.items()}, kv_heads),
    ]


def _gated_attention(hidden: int, kv_heads: int, queries: int, head_dim: int) -> list[Rule]:
    """Qwen3-Next: q_proj holds, head by head, the query and its gate; Megatron wants them apart inside of a group."""

    def half(index: int) -> HFPart:
        axes = (Axis(kv_heads * queries, 0), Axis(2, start=index), Axis(head_dim, 0), Axis(hidden, 1))
        return HFPart(f"{THEIRS}.q", axes, hf_shape=(kv_heads * queries * 2 * head_dim, hidden))

    keys = [HFPart(f"{THEIRS}.{name}", (Axis(kv_heads * head_dim, 0), Axis(hidden, 1))) for name in "kv"]
    return [Rule(f"{OURS}.qkv", (half(0), half(1), *keys), (0, hidden), axis="tp", groups=kv_heads)]


def shared_key_value(hidden: int, kv_heads: int, queries: int, head_dim: int) -> list[Rule]:
    """Keys and values are one tensor: Megatron holds it twice."""
    query = HFPart(f"{THEIRS}.q", (Axis(kv_heads * queries * head_dim, 0), Axis(hidden, 1)))
    key = HFPart(f"{THEIRS}.k", (Axis(kv_heads * head_dim, 0), Axis(hidden, 1)))
    return [Rule(f"{OURS}.qkv", (query, key, key), (0, hidden), axis="tp", groups=kv_heads)]


def _gated_mlp(hidden: int, ffn: int, unit: int) -> list[Rule]:
    return [
        column_parallel(f"{OURS}.fc1", {f"{THEIRS}.gate": ffn, f"{THEIRS}.up": ffn}, (hidden,)),
        row_parallel(f"{OURS}.fc2", f"{THEIRS}.down", (hidden, ffn)),
    ]


def _recurrent(hidden: int, ffn: int, unit: int) -> list[Rule]:
    """Mamba: one HF tensor of rows [z, x, B, dt], each cut separately; a convolution over [x, B]."""
    sizes = [ffn, ffn, unit, unit]
    starts = [sum(sizes[:index]) for index in range(4)]
    rows = [(start, size) for start, size in zip(starts, sizes, strict=True)]
    projection = tuple(HFPart(f"{THEIRS}.in", (Axis(sum(sizes), 0, start, size), Axis(hidden, 1))) for start, size in rows)
    convolution = tuple(HFPart(f"{THEIRS}.conv", (Axis(ffn + unit, 0, start - ffn, size), Axis(1, 1), Axis(3, 2)))
                        for start, size in rows[1:3])  # fmt: skip
    return [
        Rule(f"{OURS}.in", projection, (0, hidden), axis="tp"),
        Rule(f"{OURS}.conv", convolution, (0, 1, 3), axis="tp"),
    ]


def _experts(hidden: int, ffn: int, experts: int) -> list[Rule]:
    one = f"{THEIRS}.experts.{{expert}}"
    return [
        column_parallel(f"{OURS}.experts.fc1.{{expert}}", {f"{one}.gate": ffn, f"{one}.up": ffn}, (hidden,), axis="etp"),
        row_parallel(f"{OURS}.experts.fc2.{{expert}}", f"{one}.down", (hidden, ffn), axis="etp"),
    ]


def _stacked_experts(hidden: int, ffn: int, experts: int) -> list[Rule]:
    """One 3-D tensor of all experts: gate and up one after the other, `[experts, 2 * ffn, hidden]`."""
    which = Axis(experts, index=EXPERT)
    gate, up = (
        HFPart(f"{THEIRS}.experts.gate_up", (which, Axis(2 * ffn, 0, start, ffn), Axis(hidden, 1))) for start in (0, ffn)
    )
    down = HFPart(f"{THEIRS}.experts.down", (which, Axis(hidden, 0), Axis(ffn, 1)))
    return [
        Rule(f"{OURS}.experts.fc1.{{expert}}", (gate, up), (0, hidden), axis="etp"),
        Rule(f"{OURS}.experts.fc2.{{expert}}", (down,), (hidden, 0), dim=1, axis="etp"),
    ]


def _interleaved_experts(hidden: int, ffn: int, experts: int) -> list[Rule]:
    """GPT-OSS: stacked and transposed, gate and up in alternate columns, `[experts, hidden, 2 * ffn]`."""
    which = Axis(experts, index=EXPERT)
    gate, up = (
        HFPart(
            f"{THEIRS}.experts.gate_up",
            (which, Axis(hidden, 1), Axis(ffn, 0), Axis(2, start=parity)),
            (experts, hidden, 2 * ffn),
        )
        for parity in (0, 1)
    )
    down = HFPart(f"{THEIRS}.experts.down", (which, Axis(ffn, 1), Axis(hidden, 0)))
    return [
        Rule(f"{OURS}.experts.fc1.{{expert}}", (gate, up), (0, hidden), axis="etp"),
        Rule(f"{OURS}.experts.fc2.{{expert}}", (down,), (hidden, 0), dim=1, axis="etp"),
    ]


@st.composite
def layouts(draw: st.DrawFn, spec: ModelSpec) -> ParallelLayout:
    """A layout that `spec` admits, of a few dozen ranks at most: axes that it refuses are set back to 1."""
    size = st.sampled_from([1, 1, 2, 3, 4])
    sizes = {axis: draw(size) for axis in ("tp", "pp", "cp", "ep", "etp")}
    while lcm(sizes["tp"] * sizes["cp"], sizes["ep"] * sizes["etp"]) * sizes["pp"] > _MOST_RANKS:
        sizes[draw(st.sampled_from([axis for axis in sizes if sizes[axis] > 1]))] = 1
    sizes["vpp"] = draw(st.integers(1, 2)) if sizes["pp"] > 1 else 1
    while True:
        try:
            layout = _layout(draw, spec, sizes)
            spec.validate(layout)
        except LayoutError:
            refused = [axis for axis in ("ep", "etp", "tp") if sizes[axis] > 1]
            sizes[draw(st.sampled_from(refused))] = 1
        else:
            return layout


def _layout(draw: st.DrawFn, spec: ModelSpec, sizes: dict[str, int]) -> ParallelLayout:
    dense, expert = sizes["tp"] * sizes["cp"], sizes["ep"] * sizes["etp"]
    dp = lcm(dense, expert) // dense * draw(st.integers(1, 2))
    stages = sizes["pp"] * sizes["vpp"]
    cuts = sorted(draw(st.integers(0, spec.num_layers)) for _ in range(stages - 1))
    stage_layers = tuple(stop - first for first, stop in zip([0, *cuts], [*cuts, spec.num_layers], strict=True))
    order = draw(st.sampled_from(["tp-cp-ep-dp-pp", "cp-tp-ep-dp-pp", "dp-ep-cp-tp-pp"]))
    return ParallelLayout(**sizes, dp=dp, stage_layers=stage_layers, order=order, vocab_multiple=draw(st.integers(1, 3)))


def random_state(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every element of the model another number, none of them 0."""
    state, first = {}, 1
    for hf_name, shape in spec.hf_shapes.items():
        state[hf_name] = torch.arange(first, first + prod(shape)).view(shape).to(dtype)
        first += prod(shape)
    return state
