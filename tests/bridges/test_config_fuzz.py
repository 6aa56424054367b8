"""Configs that nobody meant: whatever config.json holds ends in a spec or in an error of ours, and never in a long run."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbridge_rl.config_spec import spec_of_config
from mbridge_rl.core.config_fields import KINDS, MOST_EXPERTS_OF_ALL_LAYERS, MOST_LAYERS
from mbridge_rl.core.errors import BridgeError, CheckpointError, UnsupportedModelError

GARBAGE = (
    *(None, True, False, 0, 1, 2, 3, -1, -64, 7, 10_000_000, 10**30, 0.0, 0.5, -0.5, 1e308, float("inf"), float("nan")),
    *(
        "",
        "x",
        "silu",
        "full_attention",
        [],
        [0],
        [None],
        ["full_attention"],
        [[]],
        {},
        {"rope_type": "yarn"},
        {"a": {"b": None}},
    ),
)


@cache
def config_of(variant: str) -> str:
    """The family's config.json, with what its class computes."""
    config = FAMILIES[variant].hf_config()
    return json.dumps(config.to_dict(), default=str)


def values_of(variant: str) -> dict[str, Any]:
    return json.loads(config_of(variant))


def entries_of(values: Any) -> list[tuple[Any, Any]]:
    """Every pair of a container and a key (or index) in a JSON value, at any depth."""
    items = list(values.items()) if isinstance(values, dict) else list(enumerate(values)) if isinstance(values, list) else []
    return [(values, key) for key, _ in items] + [entry for _, value in items for entry in entries_of(value)]


@st.composite
def damaged_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A family's config with up to three fields wrong, missing or new."""
    values = values_of(draw(st.sampled_from(sorted(FAMILIES))))
    for _ in range(draw(st.integers(1, 3))):
        entries = entries_of(values)
        container, key = draw(st.sampled_from(entries))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        garbage = copy.deepcopy(draw(st.sampled_from(GARBAGE)))
        if action == "replace":
            container[key] = garbage
        elif action == "add":
            values[draw(st.sampled_from(sorted(KINDS)))] = garbage
        elif isinstance(container, dict):
            del container[key]
        else:
            container.pop()
    return values


@pytest.mark.parametrize("variant", FAMILIES)
def test_configs_of_all_families_pass(variant: str) -> None:
    assert spec_of_config(values_of(variant)).num_layers > 0


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(values=damaged_configs())
def test_damaged_configs_end_in_a_spec_or_an_error_of_ours(values: dict[str, Any]) -> None:
    try:
        spec = spec_of_config(values)
    except BridgeError:
        return
    assert spec.num_layers <= MOST_LAYERS
    assert (spec.num_experts or 0) * spec.num_layers <= MOST_EXPERTS_OF_ALL_LAYERS
    assert all(size > 0 for rule in spec.rules for part in rule.parts for size in part.shape)


@pytest.mark.parametrize("values", [None, [], 3, "text", {}, {"model_type": 3}, {"model_type": ["llama"]}, {"model_type": "x"}])
def test_what_is_no_config_is_refused(values: Any) -> None:
    with pytest.raises(CheckpointError):
        spec_of_config(values)


# (variant, changed fields, what the error says: field, value, expectation)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": -64}, "hidden_size=-64 in the config; expected an integer from 1"),
    ("llama", {"hidden_size": "96"}, "hidden_size='96' in the config; expected an integer"),
    ("llama", {"vocab_size": 0}, "vocab_size=0"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 in the config; expected an integer from 1 to 1024"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3; expected a divisor of num_attention_heads=4"),
    ("llama", {"head_dim": 31}, "head_dim"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
    ("qwen2", {"hidden_size": 127}, "hidden_size"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope"),
    ("deepseek-v3", {"n_routed_experts": 10_000_000}, "n_routed_experts=10000000 in the config; expected an integer from 1"),
    (
        "deepseek-v3",
        {"n_routed_experts": 8000, "num_hidden_layers": 600, "n_group": 1, "topk_group": 1},
        "8000 experts in each of",
    ),
    ("deepseek-v3", {"num_experts_per_tok": 7}, "num_experts_per_tok=7; expected at most the number of experts, 6"),
    ("deepseek-v3", {"n_group": 4}, "n_group=4, topk_group=2; expected a divisor of the 6 experts"),
    ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank"),
    ("glm-4.7-flash", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
    ("falcon-h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers=[1.0]; expected 5 numbers"),
    ("qwen3-next", {"linear_num_key_heads": 3}, "linear_num_key_heads=3; expected a divisor"),
    ("nemotron-nas", {"block_configs": [{}]}, "block_configs has 1 entries; expected num_hidden_layers=4"),
    ("qwen3-vl", {"text_config": None}, ""),
    ("qwen3-vl", {"vision_config": {"depth": 10**9}}, "vision_config.depth=1000000000"),
]


@pytest.mark.parametrize(
    ("variant", "changes", "message"), REFUSED, ids=[f"{case[0]}-{next(iter(case[1]))}" for case in REFUSED]
)
def test_impossible_values_are_named(variant: str, changes: dict[str, Any], message: str) -> None:
    if changes == {"text_config": None}:  # null takes the default of the model's class
        assert spec_of_config(values_of(variant) | changes).num_layers > 0
        return
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        spec_of_config(values_of(variant) | changes)
    assert message in str(caught.value)
