"""The toy task is learnt in every mode, with full weights and adapters, on forked ranks, torchrun and Ray, rewarded over HTTP;
with every published objective in every mode, in two optimizer steps a batch, of which the second is clipped. The guessing game
is learnt, which takes several turns.

MBRIDGE_SEEDS=0,1,2 plays every case with these seeds (`make nightly`); otherwise there is one case and one seed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from reward_service import reward_service, url_of

pytest.importorskip("vllm")

from mbridge_rl.training.objectives.config import OBJECTIVES
from mbridge_rl.training.run.config_file import with_overrides
from mbridge_rl.training.run.run_log import METRICS_FILE, SAMPLES_FILE, read_lines

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
RECIPE = RECIPES / "toy.yaml"
SEEDS = [int(seed) for seed in os.environ.get("MBRIDGE_SEEDS", "0").split(",")]

MODES = {
    "sync": ["rollout.mode=sync"],
    "one-step-off": ["rollout.mode=one-step-off", "algorithm.old_log_probs=rollout"],
    "async": [
        "rollout.mode=async",
        "rollout.max_staleness=2",
        "rollout.segment_tokens=2",
        "algorithm.correction={weight: token, cap: 2.0}",
    ],
}
LORA = ["lora={rank: 32, alpha: 64}", "trainer.learning_rate=3e-3"]
WEIGHTS = {"full": [], "lora": LORA, "adapters": [*LORA, "sync.adapters=true"]}
WAYS = {"fork": [], "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "ray": []}
NIGHTLY = "MBRIDGE_SEEDS" in os.environ
pytestmark = [pytest.mark.nightly] if NIGHTLY else []  # there is more of these at night
OBJECTIVE_CHANGES = {
    "default": [],
    **{
        name: [f"algorithm.objective={name}", "algorithm.mini_batches=2", "trainer.micro_batch_size=512"] for name in OBJECTIVES
    },
}
OBJECTIVE_CHANGES["rloo"] = ["algorithm.objective=rloo"]  # no ratio: a second step would be off the policy, uncorrected
OBJECTIVE_CHANGES["dr_grpo"] += ["algorithm.aggregation_length=3"]
OBJECTIVE_CHANGES["dapo"] += ["rollout.max_rejected=4"]
OBJECTIVE_CHANGES["cispo"] += ["algorithm.clip_high=0.2"]  # its own cap, 5, is far from what two steps do


def _objective_cases() -> list[tuple[str, str, str, str]]:
    """Every objective in every mode: its three modes are played in all three ways and with all three kinds of weights."""
    weights, ways = list(WEIGHTS), list(WAYS)
    return [
        (mode, weights[(at + at // 3 - turn) % 3], ways[(at + turn) % 3], objective)
        for at, objective in enumerate(OBJECTIVES)
        for turn, mode in enumerate(MODES)
    ]


DEFAULT_CASES = [(mode, weights, way, "default") for mode in MODES for weights in WEIGHTS for way in WAYS]
CASES = [*DEFAULT_CASES, *_objective_cases()] if NIGHTLY else [("async", "adapters", "fork", "default")]


@pytest.mark.slow
@pytest.mark.nightly  # in every run the demo learns, and so does examples/toy_rlhf.py
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("mode", "weights", "way", "objective"), CASES)
def test_the_toy_task_is_learnt(
    mode: str,
    weights: str,
    way: str,
    objective: str,
    seed: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    if way == "ray":
        pytest.importorskip("ray")
    steps = 20 if NIGHTLY else 12
    changes = [*MODES[mode], *WEIGHTS[weights], f"steps={steps}", f"seed={seed}", f"run_dir={tmp_path / 'run'}"]
    changes += ["checkpoint={every: 0}", f"runner.kind={'ray' if way == 'ray' else 'local'}"]
    changes += OBJECTIVE_CHANGES[objective]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(with_overrides(yaml.safe_load(RECIPE.read_text()), changes)))
    command = [sys.executable, *WAYS[way], "-m", "mbridge_rl.cli", "train", str(recipe), "logging.tensorboard=true"]
    with reward_service() as service:
        command.append(f"reward.function={url_of(service)}")
        completed = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]

    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert (tmp_path / "run" / "final-adapter" / "adapter_model.safetensors").exists() == (weights != "full")
    history = read_lines(tmp_path / "run" / METRICS_FILE)
    for name in ("reward", "accuracy"):  # for the table in docs/training.md
        record_property(name, [line[name] for line in history if line[name] is not None])
    assert _rewards_on_the_board(tmp_path / "run" / "tensorboard") == pytest.approx([line["reward"] for line in history])
    staleness = {"sync": 0, "one-step-off": 1, "async": 2}[mode]
    assert max(line["staleness_max"] for line in history) <= staleness
    assert history[-1]["staleness_max"] > 0 or mode == "sync"
    assert len({line["digest"] for line in history}) == len(history)
    assert all(line["verified"] for line in history)
    early, late = ([line["reward"] for line in part] for part in (history[:3], history[-3:]))
    assert sum(late) > sum(early) + 3 * 0.15
    assert max(line["accuracy"] or 0.0 for line in history) > 0.45  # 0.25 to 0.3 after the warm-up
    if objective != "default":
        assert {line["updates"] for line in history} == {1 if objective == "rloo" else 2}
        assert objective == "rloo" or any(line["clip_fraction_low"] + line["clip_fraction_high"] for line in history)


def test_objectives_meet_every_mode_way_and_kind_of_weights() -> None:
    cases = _objective_cases()
    assert len(DEFAULT_CASES) + len(cases) == 48
    for objective in OBJECTIVES:
        own = [case for case in cases if case[3] == objective]
        assert [set(choices) for choices in zip(*own, strict=True)] == [set(MODES), set(WEIGHTS), set(WAYS), {objective}]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_guessing_game_is_learnt(seed: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Episodes have several turns, and only the policy's own are trained on."""
    steps = 30 if NIGHTLY else 6
    changes = [f"steps={steps}", f"seed={seed}", f"run_dir={tmp_path}", "checkpoint.every=0", "logging.samples=640"]
    command = [sys.executable, "-m", "mbridge_rl.cli", "train", str(RECIPES / "guessing.yaml"), *changes]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    history = read_lines(tmp_path / METRICS_FILE)
    rewards = [line["reward"] for line in history]
    record_property("reward", rewards)
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 2 * 0.1
    # Guesses that ignore the answers find 4 digits of 10.
    assert not NIGHTLY or max(rewards) > 0.6
    samples = read_lines(tmp_path / SAMPLES_FILE)
    for line in history:
        completions = [sample["completion"] for sample in samples if sample["step"] == line["step"]]
        assert any(re.fullmatch(r"(\d[<>]){3}\d", text) for text in completions)  # seven tokens, four of them the policy's
        assert line["length_max"] == 4
        assert line["turns"] > 1.5 * len(completions)


def _rewards_on_the_board(directory: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory))
    board.Reload()
    return [event.value for event in board.Scalars("reward")]
