"""Any two sides are compared bit for bit by digest: Megatron ranks, checkpoints, state dicts, live Transformers modules."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from live import live
from ranks import run_ranks
from tiny import hf_state, tiny_checkpoint, tiny_model
from typer.testing import CliRunner

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.cli import app
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout

CHANGED = "model.layers.2.mlp.experts.5.up_proj.weight"
LAYOUT = ParallelLayout(tp=2, ep=2, etp=1)


def compare_all(rank: int, directory: Path, ranks: Path, other: Path) -> dict[tuple[str, str], list[str]]:
    """Every pair of sides of one model; `other` is the same with one bit flipped, which only one expert rank holds."""
    bridge, model = live(LAYOUT, directory)
    sides: dict[str, Any] = {
        "ranks": model,
        "files": directory,
        "dict": hf_state(directory),
        "module": tiny_model("qwen3-moe"),
        "rank files": ranks,
        "other files": other,
    }
    return {(first, second): bridge.verify(sides[first], sides[second]) for first, second in itertools.combinations(sides, 2)}


def test_every_pair_of_sides(tmp_path: Path) -> None:
    directory, module = tiny_checkpoint(tmp_path / "one", "qwen3-moe")
    with torch.no_grad():
        module.model.layers[2].mlp.experts.gate_up_proj[5].view(torch.int32)[-1, 3] ^= 1
    module.save_pretrained(tmp_path / "other")
    convert = CliRunner().invoke(app, ["convert", str(directory), str(tmp_path / "ranks"), "--pp", "2", "--ep", "4"])
    assert convert.exit_code == 0, convert.output
    for differences in run_ranks(compare_all, 2, directory, tmp_path / "ranks", tmp_path / "other"):
        for pair, different in differences.items():
            assert different == ([CHANGED] if sum(side.startswith("other") for side in pair) == 1 else []), pair


def compare_in_bf16(rank: int, directory: Path) -> tuple[list[str], int]:
    bridge, model = live(LAYOUT, directory, dtype=torch.bfloat16)
    return bridge.verify(model, directory), len(bridge.verify(model, directory, dtype=torch.float32))


def test_in_the_models_dtype_or_another(tmp_path: Path) -> None:
    """A bf16 model holds a fp32 checkpoint rounded: equal as bf16, and nearly nothing of it equal as fp32."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    for in_bf16, different_in_fp32 in run_ranks(compare_in_bf16, 2, directory):
        assert in_bf16 == []
        assert different_in_fp32 == len(hf_state(directory))


def test_without_processes_and_of_another_model(tmp_path: Path) -> None:
    directory, module = tiny_checkpoint(tmp_path, "qwen2-tied")
    bridge = AutoBridge.from_pretrained(directory)
    assert bridge.verify(directory, module) == []
    with pytest.raises(StateMismatchError, match=r"the module .* does not match Qwen2ForCausalLM: missing model.layers.3"):
        bridge.verify(directory, tiny_model("qwen2-tied", num_hidden_layers=3))


def flip_on_one_rank(rank: int, directory: Path) -> list[list[str]]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    differences = [bridge.verify(model, directory)]
    if rank == 1:
        model[0].get_parameter("decoder.layers.0.self_attention.linear_proj.weight").data.view(-1)[5:6].neg_()
    return [*differences, bridge.verify(directory, model)]


def test_one_flipped_sign_on_one_rank_is_named(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3")
    for equal, flipped in run_ranks(flip_on_one_rank, 2, directory):
        assert (equal, flipped) == ([], ["model.layers.0.self_attn.o_proj.weight"])


def one_bad_side(rank: int, directory: Path) -> str:
    bridge, model = live(ParallelLayout(tp=2), directory)
    with pytest.raises(StateMismatchError) as error:
        bridge.verify(tiny_model("llama", num_hidden_layers=4 - rank), model)
    return str(error.value)


def test_what_one_rank_cannot_open_all_ranks_hear_of(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for error in run_ranks(one_bad_side, 2, directory):
        assert "missing model.layers.3" in error
