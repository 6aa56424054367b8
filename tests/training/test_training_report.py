"""What a run leaves behind can be read at any time, and is right after an interruption."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from web_pages import assert_self_contained

from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.report import write_report
from mbridge_rl.training.run.run_log import RunLog, read_lines


def _metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 10,
        "accuracy": 0.5 if step % 2 else None,
        "entropy": float("nan"),
        "verified": True,
        "digest": f"{step:016x}",
        "refit_ms": 1.5,
        "rollout_seconds": 0.25 * step,
    }


def _log(run_dir: Path, steps: range, **options: Any) -> None:
    log = RunLog(run_dir, console=False, tensorboard=False, **options)
    for step in steps:
        log.step(_metrics(step), [{"prompt": "1+1=", "completion": f"<{step}>"}])
    log.close()


def test_a_run_that_goes_on_has_a_report(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # being written
    page = write_report(tmp_path).read_text()
    assert_self_contained(page)
    assert "Step 5 of ?, going on, or interrupted" in page
    assert "Reward and greedy accuracy" in page
    assert "Entropy" not in page  # no finite number
    assert "Clipped tokens" not in page  # none at all
    assert "&lt;5&gt;" in page
    reward, accuracy = re.findall(r"<polyline points='([^']*)'", page)[:2]
    assert len(reward.split()) == 5
    assert len(accuracy.split()) == 3
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 5}))
    (tmp_path / "config.yaml").write_text("steps: 5\n")
    assert "Step 5 of 5, finished" in write_report(tmp_path, tmp_path / "other.html").read_text()


def test_a_resumed_run_drops_what_its_checkpoint_does_not_have(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    _log(tmp_path, range(4, 8), resumed_at=3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in read_lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics.jsonl has no complete step"):
        write_report(tmp_path)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, console=False, tensorboard=True)
    for step in (1, 2):
        log.step(_metrics(step), [])
    log.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("reward")] == [(1, 0.1), (2, 0.2)]
    assert "digest" not in events.Tags()["scalars"]
