"""Runs `mbridge-rl train CONFIG`: prepares the run folder, and trains in this process, under torchrun, or on Ray.

The run folder receives `config.yaml`, `metrics.jsonl`, `samples.jsonl`, `syncs.jsonl` (every weight sync), `events.jsonl`
(failures that did not end the run), `engine-N.log`, `checkpoints/`, `summary.json`, and at the end `final/`, a Hugging Face
checkpoint (adapters merged), and `final-adapter/`, the adapters in PEFT's format.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.hf.bundled import bundled_names
from mbridge_rl.hf.publish import replace_file
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import ConfigError, as_mapping
from mbridge_rl.training.run.launcher import LaunchError, launch
from mbridge_rl.training.run.quantization_check import require_format
from mbridge_rl.training.run.rank import train_rank
from mbridge_rl.training.run.run_folder import RunExists, new_run_folder, only_run
from mbridge_rl.training.run.run_log import EVENTS_FILE, METRICS_FILE, read_lines
from mbridge_rl.training.run.setup import (
    environment_of,
    load_tokenizer,
    model_directory,
    newest_step,
    problems_of,
    require_installed,
    require_slots,
    toy_shape,
)
from mbridge_rl.training.run.tasks import reward_function

_log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"


def run_training(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains as `config` says and returns the content of `summary.json` (under torchrun an empty dictionary on other ranks).

    Args:
        resume: go on from the newest checkpoint of the run folder, or begin anew if there is none.

    Raises:
        ConfigError, LayoutError: the configuration cannot be run; nothing was started.
        RunExists: the folder has a run in it and `resume` is not set, or another process is running in it.
        LaunchError: a rank failed, and `runner.restarts` are used up, or the same failure came again at the same step.
    """
    started = time.perf_counter()
    if int(os.environ.get("RANK", 0)) > 0:  # a rank of torchrun, whose first collective waits until rank 0 has prepared the run
        return _launch(config, resume=resume)
    with only_run(config.run_dir):
        return _run(config, resume=resume, started=started)


def _run(config: RunConfig, *, resume: bool, started: float) -> dict[str, Any]:
    prepare_run(config, resume=resume)
    before: tuple[int, str] | None = None
    for attempt in range(config.runner.restarts + 1):
        try:
            summary = _launch(config, resume=resume or attempt > 0)
            break
        except LaunchError as error:
            failure = _failure_of(config, error)
            if failure == before:
                raise LaunchError(
                    f"the run failed twice in the same way after step {failure[0]}, so that a restart does not help: {error}"
                ) from error
            if attempt == config.runner.restarts:
                raise
            before = failure
            _log.warning("the run was interrupted and goes on from its last checkpoint: %s", error)
            event = {"step": newest_step(config), "event": f"restarted after: {str(error).splitlines()[0]}"}
            with (config.run_dir / EVENTS_FILE).open("a") as events:
                events.write(json.dumps(event) + "\n")
    summary["seconds"] = round(time.perf_counter() - started, 1)
    replace_file(config.run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _failure_of(config: RunConfig, error: LaunchError) -> tuple[int, str]:
    """The step that was logged last, and the last line of the traceback without its numbers, which may be process ids or
    seconds."""
    metrics = config.run_dir / METRICS_FILE
    steps = [line["step"] for line in read_lines(metrics)] if metrics.exists() else []
    return max(steps, default=0), re.sub(r"\d+", "#", str(error).strip().splitlines()[-1])


def prepare_run(config: RunConfig, *, resume: bool) -> None:
    """Checks everything that can be checked before a process is started, and makes the run folder."""
    _require_no_other_run(config, resume=resume)
    require_installed(config)
    if not config.is_toy and config.model.path in bundled_names() and not Path(config.model.path).exists():
        raise ConfigError(
            f"model.path={config.model.path} is a bundled config without weights: such a recipe can be planned (mbridge-rl "
            "plan RECIPE); to train, set model.path to a checkpoint's directory"
        )
    with new_run_folder(config.run_dir):
        _prepare_in_folder(config, resume=resume)


def _prepare_in_folder(config: RunConfig, *, resume: bool) -> None:
    if config.is_toy and not (resume and (config.run_dir / "initial" / "config.json").exists()):
        toy.make_checkpoint(config.run_dir / "initial", seed=config.seed, **toy_shape(config))
    bridge = AutoBridge.from_pretrained(model_directory(config), numerics=config.model.numerics)
    bridge.spec.validate(config.layout)
    require_slots(config, bridge)
    require_format(config, bridge)
    tokenizer = load_tokenizer(config)
    problems_of(config, tokenizer)
    environment_of(config)
    if not config.reward.function.startswith(("http://", "https://")):
        reward_function(config.task, config.reward)
    replace_file(config.run_dir / "config.yaml", yaml.safe_dump(as_mapping(config), sort_keys=False))


def check_run(config: RunConfig, *, resume: bool) -> None:
    """Makes the checks of `prepare_run` without changing the run folder."""
    _require_no_other_run(config, resume=resume)
    with tempfile.TemporaryDirectory() as folder:
        prepare_run(replace(config, run_dir=Path(folder)), resume=False)


def _require_no_other_run(config: RunConfig, *, resume: bool) -> None:
    if os.path.lexists(config.run_dir / METRICS_FILE) and not resume:
        raise RunExists(f"{config.run_dir} holds a run already: go on with --resume, or choose another run_dir")


def _launch(config: RunConfig, *, resume: bool) -> dict[str, Any]:
    if config.runner.kind == "ray":
        from mbridge_rl.training.run.ray_runner import launch_on_ray

        return launch_on_ray(config, resume=resume)
    timeout = config.engine.call_timeout + config.engine.start_timeout
    return launch(
        train_rank, config.layout.world_size, config, resume, collective_timeout=timeout, threads=config.runner.threads
    )
