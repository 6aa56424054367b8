"""Adapters as a side: PEFT tensors to every layout and back, files that `peft` reads and writes, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import deepseek_models
import pytest
import torch
from adapter_patterns import ALL, LATENT, PATTERNS
from families import FAMILIES
from tiny import assert_same_state, tiny_config
from torch import Tensor

from mbridge_rl.bridges import model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.adapter_targets import is_linear, module_name
from mbridge_rl.core.adapters import PEFT_PREFIX, adapter_spec, equal_tensors, factor_name, fused_rows
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.megatron.lora.layers import expand

SPECS = {
    "qwen2": (lambda: tiny_config("qwen2"), ALL),
    "qwen3-moe": (lambda: tiny_config("qwen3-moe"), ALL),
    "deepseek": (lambda: deepseek_models.config("v3"), (*LATENT, "linear_fc1", "linear_fc2")),
}


def _spec(family: str) -> tuple[ModelSpec, tuple[str, ...]]:
    config, targets = SPECS[family]
    return model_spec(config()), targets


def _layouts(spec: ModelSpec) -> Iterator[ParallelLayout]:
    for tp, pp, ep, etp in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4), (1, 2)):
        if spec.num_experts or (ep, etp) == (1, 1):
            stages = None if spec.num_layers % pp == 0 else (3, 2)
            layout = ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, dp=max(1, ep * etp // tp), stage_layers=stages)
            try:
                spec.validate(layout)
            except LayoutError:
                continue
            yield layout
    if spec.num_layers == 4:
        yield ParallelLayout(tp=2, pp=2, vpp=2)


def _random_state(adapters: ModelSpec) -> dict[str, Tensor]:
    """Small whole numbers, so that products and sums of them are exact; what one A stands for is equal."""
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randint(-4, 5, shape, generator=generator).float() for name, shape in adapters.hf_shapes.items()}
    return state | {name: state[names[0]] for names in equal_tensors(adapters) for name in names}


def _sharded(spec: ModelSpec, layout: ParallelLayout, state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    side = megatron_side(spec, layout)
    dtypes = dict.fromkeys(spec.hf_shapes, torch.float32)
    shards = {rank: virtual.allocate(side.on(rank), dtypes) for rank in range(layout.world_size)}
    virtual.run(compile_plan(spec, hf_side(spec), side), {0: state}, shards)
    return shards


@pytest.mark.parametrize("canonical", [False, True], ids=["shared", "canonical"])
@pytest.mark.parametrize("family", SPECS)
def test_peft_tensors_reach_every_layout_and_come_back(family: str, canonical: bool) -> None:
    spec, targets = _spec(family)
    config = LoRAConfig(rank=3, alpha=3.0, targets=targets, canonical=canonical)
    adapters = adapter_spec(spec, config)
    state = _random_state(adapters)
    layouts = list(_layouts(spec))[:: 1 if family == "qwen2" else 2]
    assert len(layouts) >= 7
    for layout in layouts:
        shards = _sharded(adapters, layout, state)
        exported = virtual.allocate(hf_side(adapters), dict.fromkeys(state, torch.float32))
        virtual.run(compile_plan(adapters, megatron_side(adapters, layout), hf_side(adapters)), shards, {0: exported})
        assert_same_state(exported, state)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"canonical": True}),
        ("qwen2", {"canonical": True, "targets": ("q_proj", "v_proj", "up_proj")}),
        ("qwen2", {"targets": ("k_proj", "down_proj")}),
        ("qwen3-moe", {"canonical": True}),
        ("deepseek", {"canonical": True}),
        ("deepseek", {"targets": ("*.experts.*", "linear_kv_up_proj")}),
        ("qwen2", {"canonical": True, **PATTERNS}),
        ("qwen3-moe", {"rank_pattern": {r".*layers\.[13].*": 2, "o_proj": 1}}),
    ],
    ids=str,
)
def test_every_rank_adds_the_rows_that_hf_says(family: str, changes: dict[str, Any]) -> None:
    """`B A` of a rank's own factors is its shard of the HF modules' `B A`, on every layout."""
    spec, targets = _spec(family)
    config = LoRAConfig(**{"rank": 3, "alpha": 3.0, "targets": targets, **changes})
    adapters = adapter_spec(spec, config)
    state = _random_state(adapters)
    deltas = {name: torch.zeros(shape) for name, shape in spec.hf_shapes.items()}
    for name in deltas:
        module = PEFT_PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in state:
            deltas[name] = state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    assert sum(bool(delta.any()) for delta in deltas.values()) * 2 == len(state)
    compared = 0
    for layout in list(_layouts(spec))[:: 1 if family == "qwen2" else 3]:
        if layout.tp > 4 and {"q_proj", "k_proj"} & set(config.targets):
            continue  # ranks cut through KV groups; refused, see below
        factors, expected = _sharded(adapters, layout, state), _sharded(spec, layout, deltas)
        for instance in spec.instances:
            name_a, name_b = (factor_name(instance.megatron_name, factor) for factor in ("lora_a", "lora_b"))
            for rank in range(layout.world_size):
                if name_a in factors[rank]:
                    rows = fused_rows(instance.rule, config, layout, layout.coordinates(rank))
                    delta = expand(factors[rank][name_a].t(), factors[rank][name_b], rows).t()
                    assert torch.equal(delta, expected[rank][instance.megatron_name]), (layout, instance.megatron_name, rank)
                    compared += 1
    assert compared > 50


def test_every_linear_of_every_family_has_adapters() -> None:
    """Adapters of every linear are mapped to Megatron and back, without code for a family."""
    for family in FAMILIES.values():
        spec = model_spec(family.hf_config())
        linears = {module_name(rule.megatron_name).rpartition(".")[2] for rule in spec.rules if is_linear(rule)} - {"router"}
        assert {"linear_qkv", "linear_proj"} <= linears or {"linear_kv_up_proj", "linear_proj"} <= linears
        adapters = adapter_spec(spec, LoRAConfig(rank=3, targets=tuple(sorted(linears)), canonical=True, start="pissa"))
        layers = (-(-spec.num_layers // 2), spec.num_layers // 2)
        experts = 2 if (spec.num_experts or 1) % 2 == 0 else 1
        layout = ParallelLayout(tp=2, pp=2, ep=experts, etp=1, stage_layers=layers)
        state, side = _random_state(adapters), megatron_side(adapters, layout)
        exported = virtual.allocate(hf_side(adapters), dict.fromkeys(state, torch.float32))
        virtual.run(compile_plan(adapters, side, hf_side(adapters)), _sharded(adapters, layout, state), {0: exported})
        assert_same_state(exported, state)


def test_specs_name_what_cannot_be_adapted() -> None:
    spec, _ = _spec("qwen2")
    with pytest.raises(ValueError, match=r"no layer of this model has a linear named o_prj; choose from .*linear_fc1.*o_proj"):
        adapter_spec(spec, LoRAConfig(targets=("o_prj",)))
    with pytest.raises(
        ValueError, match=r"rank_pattern: 'o_prj' matches no linear that has an adapter, such as model\.layers\.0"
    ):
        adapter_spec(spec, LoRAConfig(rank_pattern={"q_proj": 16, "o_prj": 3}))
    with pytest.raises(ValueError, match=r"pattern 'o_\(' is no regular expression"):
        adapter_spec(spec, LoRAConfig(alpha_pattern={"o_(": 3}))
    with pytest.raises(
        UnsupportedModelError, match=r"q_proj has rank 8.*k_proj has rank 16.*linear_qkv.*one rank and one alpha"
    ):
        adapter_spec(spec, LoRAConfig(rank_pattern={"q_proj": 8}))
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens: adapters of embeddings are not supported; leave it out"):
        adapter_spec(spec, LoRAConfig(targets=("embed_tokens",)))
    for target in ("lm_head", "output_layer"):
        tied = model_spec(tiny_config("qwen2", tie_word_embeddings=True))
        with pytest.raises(UnsupportedModelError, match=f"{target}: the output layer of this model is its embedding"):
            adapter_spec(tied, LoRAConfig(targets=(target,)))
    some = LoRAConfig(targets=("q_proj",))
    (rule,) = (rule for rule in spec.rules if rule.megatron_name.endswith("linear_qkv.weight"))
    layout = ParallelLayout(tp=8)
    with pytest.raises(LayoutError, match=r"tp=8 cuts through its 4 groups.*adapt all of q_proj, k_proj, v_proj"):
        fused_rows(rule, some, layout, layout.coordinates(0))
