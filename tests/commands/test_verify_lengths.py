"""What `mbridge-rl verify` compares logits of: sequences past all that a config lets begin after some positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint, tiny_config

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.cli import app
from mbridge_rl.commands.verify_lengths import compared_positions, lengths_for, longest

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def config(**fields: Any) -> Any:
    changed = tiny_config("llama", max_position_embeddings=131072)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], str, str]] = {
    "nothing begins": ({}, (64,), "", ""),
    "a window": ({"sliding_window": 100}, (64, 132), "sliding_window=100", ""),
    "a short window": ({"sliding_window": 8}, (8, 64), "sliding_window=8", ""),
    "a window of all positions": ({"sliding_window": 131072}, (64,), "", ""),
    "a number of layers": ({"max_window_layers": 100}, (64,), "", ""),
    "chunks": ({"mamba_chunk_size": 256}, (64, 288), "mamba_chunk_size=256", ""),
    "longrope": (
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096}},
        (64, 4128),
        "original_max_position_embeddings=4096",
        "",
    ),
    "longrope, as Phi-3 says it": (
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
        (48, 80),
        "original_max_position_embeddings=48",
        "",
    ),
    "scaled queries": (
        {"rope_parameters": {"rope_type": "yarn", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 500}},
        (64, 532),
        "original_max_position_embeddings=500",
        "",
    ),
    "the same frequencies at all lengths": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}},
        (64,),
        "",
        "",
    ),
    "of a kind of layers": (
        {
            "rope_parameters": {
                "full": {**LONGROPE, "original_max_position_embeddings": 70},
                "sliding": {},
            }
        },
        (64, 102),
        "original_max_position_embeddings=70",
        "",
    ),
    "one too long": (
        {"sliding_window": 100, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 8192}},
        (64, 132),
        "sliding_window=100",
        "original_max_position_embeddings=8192",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_lengths_are_chosen_from_the_config(kind: str) -> None:
    fields, lengths, covered, left_out = CASES[kind]
    chosen = lengths_for(config(**fields), most=5000)
    assert chosen.lengths == lengths
    assert ", ".join(map(str, chosen.covered)) == covered
    assert ", ".join(map(str, chosen.left_out)) == left_out


def test_memory_bounds_a_sequence() -> None:
    """Eager attention of 8 heads: 12 bytes a head for each pair of positions, and 8 a logit, in a quarter of the memory."""
    most = longest(config(), 1 << 30)
    assert 12 * 8 * most**2 + 8 * 515 * most <= 1 << 28 < 12 * 8 * (most + 1) ** 2 + 8 * 515 * (most + 1)
    assert longest(config(), 0) == 64


def test_logits_of_long_sequences_are_compared_in_part() -> None:
    assert compared_positions(256) == list(range(256))
    positions = compared_positions(5000)
    assert len(positions) == len(set(positions)) == 256
    assert positions == sorted(positions)
    assert positions[-128:] == list(range(4872, 5000))


def verified(capfd: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    with pytest.raises(SystemExit) as end:
        app(["verify", *map(str, arguments), "--timeout", "120"])
    captured = capfd.readouterr()
    assert end.value.code == code, captured
    return captured.out


def windowed(directory: Path) -> Path:
    import transformers

    fields = tiny_config("llama", max_position_embeddings=256).to_dict() | {"model_type": "mistral", "sliding_window": 100}
    fields.pop("architectures")
    transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).save_pretrained(directory)
    return directory


def test_a_window_beyond_the_short_sequence_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that lost its window computes other logits, which a sequence of 64 tokens does not show but a longer one does."""
    directory = windowed(tmp_path)
    output = verified(capfd, directory, code=0)
    assert "sequences of 64 and 132 tokens, past sliding_window=100" in output
    build_model = AutoBridge.build_model

    def windowless(bridge: AutoBridge, *arguments: Any, **options: Any) -> Any:
        return build_model(bridge, *arguments, **options, overrides={"window_size": None, "window_attn_skip_freq": None})

    monkeypatch.setattr(AutoBridge, "build_model", windowless)
    assert "logits          different" in verified(capfd, directory, code=1)
    output = verified(capfd, directory, "--max-positions", 64, code=0)
    assert "not compared    -          what begins after more tokens: sliding_window=100 (--max-positions" in output


def test_a_cap_of_scores_that_only_eager_attention_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Transformers' default attention leaves Gemma 2's cap out; judged by it, the right model would differ."""
    from families import FAMILIES

    family = FAMILIES["gemma2"]
    capped = {**family.config, "attn_logit_softcapping": 2.0}
    type(family)(**{**vars(family), "config": capped}).checkpoint(tmp_path)
    assert "logits          equal" in verified(capfd, tmp_path, code=0)


def test_a_tiny_model_of_every_length_is_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3")
    assert "sequences of 64 tokens\n" in verified(capfd, directory, code=0)
