"""Whole runs from their configuration, with real engines: disturbed in every way, they end where an undisturbed run does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import saboteurs
from tolerance import assert_near, backward, forward

pytest.importorskip("vllm")

from mbridge_rl.distributed.arena import SHARED_MEMORY
from mbridge_rl.sync.record.sinks import read_syncs
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import parse_config, with_overrides
from mbridge_rl.training.run.launcher import LaunchError
from mbridge_rl.training.run.recipe_run import RunExists, run_training
from mbridge_rl.training.run.run_log import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, read_lines

TESTS = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.slow
EXACT, CLOSE = ("step", "reward", "length_mean"), ("loss", "grad_norm", "entropy")
# Of the toy model; its logits reach this after the warm-up.
LAYERS, WIDTH, LOGITS = 2, 256, 30.0
CURVE = ("step", "reward", "loss", "grad_norm", "entropy", "ratio_max_deviation", "kl_train_rollout", "digest")

BASE: dict[str, Any] = {
    "model": {"path": "toy:qwen3", "dtype": "fp32"},
    "steps": 5,
    "layout": {"tp": 2},
    # An epsilon far above the rounding of gradients, so that what is learned depends on them smoothly.
    "trainer": {"learning_rate": 1e-3, "epsilon": 1e-4, "micro_batch_size": 64},
    "algorithm": {"group_size": 4, "entropy_coefficient": 0.01, "mini_batches": 2},
    "rollout": {"prompts_per_step": 32, "max_tokens": 3},
    "engine": {"max_model_len": 16, "max_num_seqs": 128, "kv_cache_bytes": 1 << 26},
    "task": {"kind": "sums", "order": "unsolved-first"},
    "checkpoint": {"every": 2, "export": False},
    "logging": {"console": False},
}


def config_of(run_dir: Path, *overrides: str) -> RunConfig:
    return parse_config(RunConfig, with_overrides(BASE | {"run_dir": run_dir}, overrides))


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be the same, bit for bit."""
    return [tuple(line[name] for name in CURVE) for line in read_lines(run_dir / METRICS_FILE)]


def events(run_dir: Path) -> str:
    return "\n".join(f"{line['step']}: {line['event']}" for line in read_lines(run_dir / EVENTS_FILE))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    summary = run_training(config_of(run_dir))
    assert summary["steps"] == 5
    assert (summary["unverified_syncs"], summary["engines_lost"]) == (0, 0)
    return run_dir


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(saboteurs.FOLDER, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parents[1]), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_a_failure_that_comes_again_at_the_same_step_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "runner.restarts=9")
    failing = iter([(3, "ValueError: reward of row 17"), (5, "ValueError: of row 2"), (5, "OSError: 8"), (5, "OSError: 9")])

    def launch(config: RunConfig, *, resume: bool) -> dict[str, Any]:
        step, what = next(failing)
        (tmp_path / METRICS_FILE).write_text(f'{{"step": {step}}}\n')
        raise LaunchError(f"rank 0 of 2 failed:\nTraceback (most recent call last):\n{what}")

    monkeypatch.setattr("mbridge_rl.training.run.recipe_run.prepare_run", lambda config, resume: None)
    monkeypatch.setattr("mbridge_rl.training.run.recipe_run._launch", launch)
    with pytest.raises(LaunchError, match=r"(?s)failed twice in the same way after step 5.*does not help.*OSError: 9"):
        run_training(config)
    assert next(failing, None) is None
    assert events(tmp_path).count("restarted after") == 3


def test_a_killed_engine_and_a_killed_rank_leave_the_curve_as_it_is(undisturbed: Path, sabotage: Path) -> None:
    """With deltas, which leave it as it is too: they begin anew where an engine or the trainer does."""
    changes = ["runner.restarts=1", "sync.delta=true"]
    config = config_of(sabotage / "run", "reward.function=saboteurs:kill_engine_then_rank", *changes)
    summary = run_training(config)
    assert curve(config.run_dir) == curve(undisturbed)
    assert any(line["refit_share"] < 1 for line in read_lines(config.run_dir / METRICS_FILE))
    assert (sabotage / "engine.done").read_text() != "[]"
    assert (sabotage / "rank.done").read_text() != "[]"
    assert summary["engines_lost"] == 1
    assert "2: 1 engines were lost and replaced" in events(config.run_dir)
    assert "2: restarted after: rank 1 of 2 failed" in events(config.run_dir)


@pytest.mark.parametrize(
    "options",
    [
        [
            *("sync.mode=streaming", "sync.transport=process_group", "sync.requests=abort", "sync.bucket_bytes=65536"),
            "trainer.offload=host",
        ],
        ["sync.store={store}", "sync.nonfinite=pass", "sync.timeout=60", "trainer.offload={folder}/away"],
    ],
    ids=["streaming-process-group-and-host", "named-store-and-folder"],
)
def test_however_weights_travel_the_curve_is_the_same(undisturbed: Path, tmp_path: Path, options: list[str]) -> None:
    name = f"run_{os.getpid()}"
    options = [text.format(store=name, folder=tmp_path) for text in options]
    config = config_of(tmp_path / "run", "steps=2", "checkpoint.every=0", *options)
    store = WeightStore(name, SHARED_MEMORY)
    try:
        run_training(config)
        assert (tmp_path / "away").exists() == (config.trainer.offload != "host")
        head = store.head()
    finally:
        store.remove()
    assert curve(config.run_dir) == curve(undisturbed)[:2]
    assert (None if head is None else head.version) == (3 if config.sync.store else None)  # a named store outlives the run
    for sync in read_syncs(config.run_dir):
        assert (sync.mode, sync.verified) == (config.sync.mode, True)
        assert sync.transport == ("shared_memory" if config.sync.store else "process_group")
        assert sync.buckets > 10 or config.sync.store


@pytest.mark.parametrize(
    "killed", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["undisturbed", "engine-and-rank-killed"]
)
def test_adapters_alone_travel_and_learn_what_merged_ones_do(sabotage: Path, killed: bool) -> None:
    """An engine that is lost comes back with base and adapter, as the run does after a lost rank. Merged or beside the weights,
    an adapter computes the same up to rounding, so that the same tokens are sampled."""
    lora = ["lora={rank: 4, start: orthogonal}", f"steps={5 if killed else 3}", "runner.restarts=1"]
    merged = config_of(sabotage / "merged", *lora)
    run_training(merged)
    changes = ["sync={adapters: true, requests: wait, timeout: 60}"]
    changes += ["reward.function=saboteurs:kill_engine_then_rank"] if killed else []
    config = config_of(sabotage / "adapters", *lora, *changes)
    summary = run_training(config)
    assert summary["engines_lost"] == int(killed)
    assert not killed or "2: restarted after: rank 1 of 2 failed" in events(config.run_dir)
    lines = [read_lines(run.run_dir / METRICS_FILE) for run in (merged, config)]
    for expected, separate in zip(*lines, strict=True):
        assert [separate[name] for name in EXACT] == [expected[name] for name in EXACT]
        for name in CLOSE:  # each update sees the errors of those before it; losses are differences of what is of order 1
            tolerance = 2 * separate["step"] * backward(LAYERS, WIDTH)
            assert_near(separate[name], expected[name], tolerance, scale=max(1.0, expected[name]), what=name)
        assert (separate["staleness_max"], separate["verified"]) == (0, True)
    assert_near(max(line["mismatch_max"] for line in lines[1]), 0.0, forward(LAYERS, WIDTH), scale=LOGITS, what="mismatch")
    assert len({line["digest"] for line in lines[1]}) == config.steps
    # Two layers of q, k, v, o, gate, up and down: rank 4, fp32, a row of A and a column of B each.
    sizes = [96 + 256, 96 + 128, 96 + 128, 256 + 96, 96 + 192, 96 + 192, 192 + 96]
    adapter = 2 * 4 * 4 * sum(sizes)
    for sync in read_syncs(config.run_dir):
        assert (sync.adapter, sync.nbytes, sync.verified, sync.failed) == ("policy", adapter, True, {})
        assert sync.nbytes < 0.15 * sync.full_nbytes
    assert {sync.full_nbytes for sync in read_syncs(merged.run_dir)} == {sync.full_nbytes}


def test_on_ray_the_curve_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    config = config_of(tmp_path / "run", "runner.kind=ray", "steps=2", "checkpoint.every=0", "reward.workers=1")
    run_training(config)
    assert curve(config.run_dir) == curve(undisturbed)[:2]
    assert not ray.is_initialized()


@pytest.mark.nightly
@pytest.mark.parametrize("placement", ["separate", "colocated"])
def test_on_ray_a_killed_engine_and_a_killed_rank_leave_the_curve_as_it_is(
    undisturbed: Path, sabotage: Path, placement: str
) -> None:
    pytest.importorskip("ray")
    changes = ["runner.kind=ray", f"runner.placement={placement}", "runner.restarts=1"]
    config = config_of(sabotage / "run", "reward.function=saboteurs:kill_engine_then_rank", *changes)
    summary = run_training(config)
    assert curve(config.run_dir) == curve(undisturbed)
    assert (sabotage / "engine.done").read_text() != "[]"
    assert (sabotage / "rank.done").read_text() != "[]"
    assert summary["engines_lost"] == 1
    assert "restarted after: rank 1 of 2 failed" in events(config.run_dir)


def test_a_run_is_not_overwritten_and_a_finished_one_is_not_repeated(undisturbed: Path) -> None:
    before = curve(undisturbed)
    with pytest.raises(RunExists, match="go on with --resume"):
        run_training(config_of(undisturbed))
    assert curve(undisturbed) == before


@pytest.mark.nightly
def test_a_killed_driver_is_resumed(undisturbed: Path, sabotage: Path) -> None:
    run_dir, recipe = sabotage / "run", sabotage / "recipe.yaml"
    shutil.copy(undisturbed / "config.yaml", recipe)
    command = [sys.executable, "-m", "mbridge_rl.cli", "train", str(recipe), f"run_dir={run_dir}"]
    command += ["reward.function=saboteurs:kill_driver"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(curve(run_dir)) in (2, 3)
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert curve(run_dir) == curve(undisturbed)
    assert (run_dir / "report.html").exists()


@pytest.mark.nightly
def test_a_killed_ray_driver_leaves_nothing_behind_and_is_resumed(undisturbed: Path, sabotage: Path) -> None:
    pytest.importorskip("ray")
    run_dir = sabotage / "run"
    command = [sys.executable, "-m", "mbridge_rl.cli", "train", str(undisturbed / "config.yaml"), f"run_dir={run_dir}"]
    command += ["runner.kind=ray", "reward.function=saboteurs:slowly"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run_dir / "checkpoints" / "step_00000002").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    actors = saboteurs.ray_pids(driver.pid)
    assert len(actors) >= 3
    driver.kill()
    driver.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in actors):  # pytest's caller limits the time
        time.sleep(0.2)
    assert len(curve(run_dir)) < 5
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert curve(run_dir) == curve(undisturbed)


@pytest.mark.nightly
def test_another_layout_goes_on_from_the_same_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000005")
    run_training(config_of(run_dir, "layout.tp=1", "layout.pp=2", "steps=6"), resume=True)
    before, after = (read_lines(folder / METRICS_FILE) for folder in (undisturbed, run_dir))
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    # Step 5 is repeated from the checkpoint of step 4: it has the same prompts, which the data loader remembers, and the same
    # random streams, so that it is equal up to the order of sums.
    expected, repeated = before[4], after[4]
    assert repeated["step_seconds"] != expected["step_seconds"]
    assert repeated["reward"] == expected["reward"]
    assert_near(repeated["loss"], expected["loss"], 2 * backward(LAYERS, WIDTH), scale=1.0, what="loss")
    samples = [[line for line in read_lines(folder / SAMPLES_FILE) if line["step"] == 5] for folder in (undisturbed, run_dir)]
    assert samples[0] == samples[1]
