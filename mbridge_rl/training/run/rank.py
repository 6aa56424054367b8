"""The program of every trainer rank of a run, from its start to the exported checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.megatron.lora.attach import add_lora
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
from mbridge_rl.training.checkpoint.saved_state import load_checkpoint, save_checkpoint
from mbridge_rl.training.fleet import EngineFleet
from mbridge_rl.training.loop import GRPO, LoopHooks, train
from mbridge_rl.training.metrics import Metrics
from mbridge_rl.training.rollout.batches import RolloutSource
from mbridge_rl.training.rollout.collect import RolloutBatch
from mbridge_rl.training.rollout.episodes import EpisodeRunner, SamplingConfig
from mbridge_rl.training.rollout.generator import Generator, GeneratorConfig
from mbridge_rl.training.rollout.rewards import Judge, Problem
from mbridge_rl.training.rollout.sampler import EpochSampler, UnsolvedFirstSampler
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.engines import engine_directory, start_engine_process
from mbridge_rl.training.run.run_log import METRICS_FILE, RunLog, read_lines
from mbridge_rl.training.run.setup import (
    checkpoint_directory,
    environment_of,
    load_tokenizer,
    model_directory,
    newest_step,
    problems_of,
)
from mbridge_rl.training.run.tasks import Task, make_judge
from mbridge_rl.training.run.warm_up import warm_up
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer

POLICY = "policy"  # the adapter's name in engines


def train_rank(
    config: RunConfig, resume: bool, make_engine: Any = start_engine_process, make_reward_judge: Any = make_judge
) -> dict[str, Any]:
    """Runs one trainer rank and returns the run's summary on rank 0. Rank 0 has the engines, the rewards and the log."""
    first = dist.get_rank() == 0
    fleet = EngineFleet(lambda index: make_engine(config, index), config.engine.count, restarts=config.engine.restarts)
    source: RolloutSource | None = None
    log: RunLog | None = None
    try:
        if engine_directory(config) == model_directory(config):  # otherwise the warm-up writes it later
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
        # Made before the checkpoint is loaded: the reference policy has the initial weights.
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
    """Takes the place of the log's `say` on ranks that have no log."""


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
        results = source.evaluate(problems)
        if log is not None:
            log.evaluation(step, [(problem.prompt, *result) for problem, result in zip(problems, results, strict=True)])
        return sum(reward for _, reward in results) / len(results)

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

    goal = config.stop_at_accuracy
    return LoopHooks(evaluate, save, record, lambda accuracy: goal is not None and accuracy >= goal)


def _events(metrics: Metrics, rollouts: RolloutBatch) -> list[str]:
    """Messages about what went wrong in a step without ending the run."""
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


def _summary(config: RunConfig, last_step: int, accuracy_before: float | None) -> dict[str, Any]:
    history = read_lines(config.run_dir / METRICS_FILE)
    accuracies = [line["accuracy"] for line in history if line.get("accuracy") is not None]
    return {
        "steps": last_step,
        "reward_first": history[0]["reward"] if history else None,
        "reward_last": history[-1]["reward"] if history else None,
        "accuracy_before": accuracy_before,
        "accuracy": accuracies[-1] if accuracies else accuracy_before,
        "digest": history[-1]["digest"] if history else None,
        "unverified_syncs": sum(not line["verified"] for line in history),
        "engines_lost": sum(line["engines_lost"] for line in history),
        "rewards_failed": sum(line["rewards_failed"] for line in history),
    }
