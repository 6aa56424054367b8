"""The command line: it answers at once, explains itself, and says in one line what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def _run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "mbridge_rl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_help_explains_itself_and_imports_nothing_heavy() -> None:
    started = time.monotonic()
    completed = _run("--help")
    assert completed.returncode == 0
    assert time.monotonic() - started < 5  # importing torch alone takes as long on a busy machine
    assert "Megatron-core" in completed.stdout
    assert "demo" in completed.stdout
    code = "import sys, mbridge_rl.cli; assert not {'torch', 'transformers', 'vllm', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_demo_lists_its_options() -> None:
    output = _run("demo", "--help").stdout
    for option in ("--model", "--tp", "--pp", "--ep", "--lora", "--steps", "--seed", "--run-dir"):
        assert option in output
    assert re.search(r"qwen3\|qwen3-moe\|llama", output)


def test_models_lists_the_families() -> None:
    words = _run("models").stdout.split()
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"} <= set(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep", "2"], "Qwen3ForCausalLM has no experts"),
        (["--tp", "3"], "divide"),
        (["--model", "qwen3-moe", "--ep", "3"], "4 experts do not divide by ep=3"),
    ],
)
def test_impossible_layouts_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    completed = _run("demo", *arguments, "--run-dir", str(tmp_path))
    assert completed.returncode == 1
    assert "LayoutError" in completed.stderr
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr


def test_unknown_models_are_refused() -> None:
    completed = _run("demo", "--model", "gpt5")
    assert completed.returncode == 2
    assert "gpt5" in completed.stderr


def _demo(run_dir: Path, *arguments: str) -> dict[str, Any]:
    completed = _run("demo", "--run-dir", str(run_dir), *arguments, timeout=480)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert "Reward and greedy accuracy" in (run_dir / "report.html").read_text()
    assert len(history) == summary["steps"] == summary["syncs"] - 1
    assert all(metrics["verified"] and metrics["digest"] for metrics in history)
    assert len({metrics["digest"] for metrics in history}) == len(history)
    assert all(metrics["rollout_version"] == metrics["step"] for metrics in history)  # each step on the weights before it
    # `tolerance.forward` of two layers and sums of 256 terms is 8e-6, of logits that stay below a hundred.
    assert max(metrics["mismatch_max"] for metrics in history) < 1e-3
    assert history[0]["ratio_max_deviation"] == 0.0
    assert summary["digest_mismatches"] == 0
    assert summary["hf_equals_vllm"] is True
    assert summary["warmup_accuracy"] < 0.4
    return summary


@pytest.mark.slow
def test_the_demo_learns_to_add(tmp_path: Path) -> None:
    summary = _demo(tmp_path)
    assert summary["final_accuracy"] > 0.9
    assert summary["seconds"] < 480


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--model", "qwen3-moe", "--ep", "2"], id="experts", marks=pytest.mark.nightly),
        pytest.param(["--model", "llama", "--pp", "2"], id="pipeline", marks=pytest.mark.nightly),
    ],
)
def test_other_layouts_and_families_learn_too(arguments: list[str], tmp_path: Path) -> None:
    summary = _demo(tmp_path, "--steps", "10", *arguments)
    assert summary["final_accuracy"] > summary["warmup_accuracy"] + 0.1
