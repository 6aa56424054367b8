"""Finds and opens what a recipe names: directories, tokenizer, problems, environment; and checks that its requirements are
installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.errors import missing_extra, missing_vllm
from mbridge_rl.training.checkpoint.saved_state import latest_checkpoint
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.episodes import Environment
from mbridge_rl.training.rollout.rewards import Problem
from mbridge_rl.training.run.config import TOY, RunConfig, ToyConfig
from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.tasks import Task, imported, make_task, usable_problems
from mbridge_rl.training.run.tokenizer import open_tokenizer


def require_installed(config: RunConfig) -> None:
    """Checks that the libraries which the configuration needs are installed.

    Raises:
        ImportError: some are missing; the message says how to install them.
    """
    if importlib.util.find_spec("vllm") is None:
        raise missing_vllm("this run needs vllm")
    needed = {
        "ray": ("ray", config.runner.kind == "ray"),
        "zstandard": ("delta", config.sync.delta),
        "tensorboard": ("tensorboard", config.logging.tensorboard),
        "prometheus_client": ("prometheus", config.logging.prometheus_port is not None),
    }
    missing = [
        (name, extra) for name, (extra, is_needed) in needed.items() if is_needed and importlib.util.find_spec(name) is None
    ]
    if missing:
        names, extras = zip(*missing, strict=True)
        raise missing_extra(f"this run needs {', '.join(names)}", ",".join(extras))


def toy_config(config: RunConfig) -> Any:
    """The Transformers config of the toy model that a run with `model.path=toy:...` makes for itself."""
    return toy.model_config(**toy_shape(config))


def toy_shape(config: RunConfig) -> dict[str, Any]:
    shape = config.model.toy or ToyConfig()
    return {
        "model": config.model.path.removeprefix(TOY),
        "num_layers": shape.num_layers,
        "characters": shape.characters,
    }


def require_slots(config: RunConfig, bridge: AutoBridge) -> None:
    """Checks that engines can take the adapters, where only adapters are sent.

    Raises:
        ConfigError: they cannot.
    """
    if not config.sync.adapters or config.lora is None:
        return
    names = [rule.megatron_name for rule in adapter_spec(bridge.spec, config.lora).rules]
    if unsupported := [name for name in names if "{expert}" in name or name.startswith("output_layer.")]:
        raise ConfigError(
            f"sync.adapters: adapters of experts and output layers cannot be read back from vLLM's slots ({unsupported[0]}); "
            "leave them out of lora.targets, or leave sync.adapters out, so that merged weights travel"
        )
    if any("{expert}" in rule.megatron_name for rule in bridge.spec.rules) and not torch.cuda.is_available():
        raise ConfigError(
            "sync.adapters: beside LoRA vLLM computes experts with Triton kernels, which have no CPU form; leave sync.adapters "
            "out, so that merged weights travel"
        )


def checkpoint_directory(config: RunConfig) -> Path:
    return config.run_dir / "checkpoints"


def newest_step(config: RunConfig) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    newest = latest_checkpoint(checkpoint_directory(config))
    return 0 if newest is None else int(newest.name.partition("_")[2])


def model_directory(config: RunConfig) -> Path:
    return config.run_dir / "initial" if config.is_toy else Path(config.model.path)


def load_tokenizer(config: RunConfig) -> Any:
    """Opens the tokenizer that the configuration names; it has a padding token.

    Raises:
        ConfigError: there is no tokenizer, or it cannot be read.
    """
    return open_tokenizer(config.model.tokenizer or model_directory(config))


def problems_of(config: RunConfig, tokenizer: Any) -> tuple[Task, dict[str, int]]:
    """The task with the problems whose prompts fit, and the number of problems left out, by reason."""
    task = make_task(config.task, tokenizer)
    rollout = config.rollout
    limit = config.engine.max_model_len - rollout.max_tokens if rollout.max_prompt_tokens is None else rollout.max_prompt_tokens
    problems, dropped = usable_problems(task.problems, tokenizer, limit, refuse=rollout.long_prompts == "refuse")
    return replace(task, problems=problems), dropped


def environment_of(config: RunConfig) -> Callable[[Problem], Environment] | None:
    """The function or class that makes the environment of an episode; `None` for single turns.

    Raises:
        ConfigError: it cannot be imported.
    """
    path = config.rollout.environment
    return imported(path, "rollout.environment") if path else None
