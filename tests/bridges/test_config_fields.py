"""Every field of every family's config: with another value, logits are Transformers', or the model is refused by its name.

docs/models.md has the numbers (`make support-table`), from the nightly sweep of all fields; a sample, and every field that was
once read wrongly, is swept here each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from families import FAMILIES
from families.family import Family
from field_sweep import FAULTS, Outcome, sweep
from field_values import ANYWHERE, Change, changes_of, foreign_fields, language_part
from ranks import run_ranks

# Of the families' sizes those that make a sweep slow; what a field does is seen in small ones too.
SMALL = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def small(family: Family) -> Family:
    def shrunk(config: dict[str, Any]) -> dict[str, Any]:
        inside = {name: shrunk(value) for name, value in config.items() if name == "text_config"}
        return {**config, **{name: size for name, size in SMALL.items() if name in config}, **inside}

    return dataclasses.replace(family, config=shrunk(dict(family.config)))


def one_of_each() -> list[str]:
    """A variant of every architecture, and those that have what these lack."""
    first = {family.architecture: family.variant for family in reversed(FAMILIES.values())}
    return [variant for variant in FAMILIES if variant in {*first.values(), "nemotron-3-super", "deepseek-v2", "phi3-longrope"}]


def outcomes(family: Family, changes: Iterable[Change], combined: Change | None = None) -> list[Outcome]:
    [results] = run_ranks(sweep, 1, small(family), list(changes), combined, timeout=3600)
    return results


def require_no_fault(results: list[Outcome]) -> None:
    faults = [f"{it.answer}: {it.change.field}, {dict(it.change.values)}: {it.detail}" for it in results if it.answer in FAULTS]
    assert not faults, "\n".join(faults)


def elsewhere(family: Family, names: Iterable[str] = ANYWHERE) -> list[Change]:
    """Changes of fields that the class of the language model's config has under another name, or not at all."""
    config, inside = language_part(family)
    declared = {field.name for field in dataclasses.fields(config)}
    prefix = f"{inside}." if inside else ""
    return [Change(f"{prefix}{name}", {name: ANYWHERE[name]}, inside) for name in names if name not in declared]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("variant", one_of_each())
def test_every_field(variant: str, record_property: Any) -> None:
    """Changes each field of the config's own classes alone, and adds all fields that only other families' classes know."""
    family = FAMILIES[variant]
    _, inside = language_part(family)
    foreign = Change("fields of other families", foreign_fields(family, FAMILIES), inside)
    changes = [*changes_of(family), *elsewhere(family)]
    results = outcomes(family, changes, foreign)
    require_no_fault(results)
    for answer, count in counted(results[: len(changes)]).items():
        record_property(answer, count)
    record_property("of other families", len(results) - len(changes))


def counted(results: list[Outcome]) -> dict[str, int]:
    """Counts the fields by the best answer that one of their values got."""
    answers: dict[str, set[str]] = {}
    for outcome in results:
        answers.setdefault(outcome.change.field, set()).add(outcome.answer)
    ranked = ("equal", "refused", "no legal value")
    best = [next(answer for answer in ranked if answer in given) for given in answers.values()]
    return {answer: best.count(answer) for answer in ranked}


WINDOW, LAYERS, HALF = {"sliding_window": 3}, {"layer_types": ["full_attention"] * 3}, "rope_parameters.partial_rotary_factor"
# What bridges once obeyed though Transformers' models ignore it, or the other way round: by variant, fields of the classes by
# their path, and fields that the classes don't know.
ONCE_WRONG: dict[str, tuple[set[str], dict[str, Any]]] = {
    "llama": ({HALF, "hidden_act", "rms_norm_eps"}, {**WINDOW, **LAYERS}),
    "granite": ({HALF}, WINDOW),
    "olmo2": ({HALF}, WINDOW),
    "seed-oss": ({HALF}, WINDOW),
    "ernie4.5": ({HALF}, {**WINDOW, "attention_bias": True}),
    "nemotron": (set(), WINDOW),
    "gemma": ({HALF}, {**WINDOW, "hidden_activation": "silu"}),
    "gemma3": ({"attn_logit_softcapping"}, {}),
    "gemma3-vl": ({"text_config.final_logit_softcapping"}, {}),
    "mistral": ({HALF, "sliding_window"}, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "qwen2": ({HALF, "use_sliding_window", "layer_types"}, {}),
    "qwen3": ({HALF}, {}),
    "olmoe": ({"clip_qkv"}, WINDOW),
    "glm-4.5": (set(), WINDOW),
    "minimax-m2": (set(), WINDOW),
    "ernie-4.5-moe": (set(), WINDOW),
    "deepseek-v2": ({"mlp_bias"}, {}),
    "gpt-oss": ({"attention_bias"}, {}),
    "qwen3-next": ({"attention_bias"}, WINDOW),
    "qwen3.5": ({"attention_bias"}, {}),
    "falcon-h1": ({"attention_bias"}, WINDOW),
}


@pytest.mark.parametrize("variant", ONCE_WRONG)
def test_fields_that_were_once_wrong(variant: str) -> None:
    fields, unknown = ONCE_WRONG[variant]
    family = FAMILIES[variant]
    changes = [change for change in changes_of(family) if change.field in fields]
    assert {change.field for change in changes} == fields
    changes += [Change(name, {name: value}) for name, value in unknown.items()]
    results = outcomes(family, changes)
    require_no_fault(results)
    assert all(outcome.answer in ("equal", "refused") for outcome in results if outcome.change.field in (*fields, *unknown))
