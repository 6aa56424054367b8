"""RLHF in one file: a Megatron-core policy learns to add digits from rewards, and a vLLM engine generates its rollouts.

    python toy_rlhf.py [--steps 60] [--tp 2]

The policy is a tiny random Qwen3, which first gets some supervised steps. Then, step by step: the engine answers, a function
decides which answers are right, Megatron makes one GRPO step, and the engine gets the new weights: every trainer rank writes
its shards into shared memory, in Hugging Face's layout, and the engine proves by digest that it holds them bit for bit.

Needs no GPU. On CPUs the script forks its own trainer ranks; under torchrun it uses those.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch.distributed as dist

from mbridge_rl import AutoBridge, EngineProcess, ParallelLayout, WeightSync, destroy_parallel, initialize_parallel
from mbridge_rl.training import (
    Batch,
    GRPOConfig,
    MegatronTrainer,
    Problem,
    Rollout,
    SamplingConfig,
    TrainerConfig,
    group_advantages,
    grpo_loss,
    launch,
    mismatch_metrics,
    supervised_loss,
)
from mbridge_rl.training.rollout import toy

PROMPTS, GROUP = 50, 16


def reward(problem: Problem, completion: str) -> float:
    """Returns 1 for a right answer and 0 for a wrong one. Any function of the problem and the completion's text is possible."""
    return float(completion == problem.answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tp", type=int, default=2)
    arguments = parser.parse_args()
    layout = ParallelLayout(tp=arguments.tp)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = toy.make_checkpoint(Path(scratch) / "policy")
        accuracy = launch(train, layout.world_size, checkpoint, layout, arguments.steps)
    print(f"greedy accuracy after {arguments.steps} steps: {accuracy:.0%}")


def train(checkpoint: Path, layout: ParallelLayout, steps: int) -> float:
    """Runs one trainer rank; returns the final greedy accuracy."""
    initialize_parallel(layout)
    first = dist.get_rank() == 0
    engine = start_engine(checkpoint) if first else None
    try:
        bridge = AutoBridge.from_pretrained(checkpoint)
        model = bridge.build_model(layout)  # megatron.core GPTModel chunks of this rank
        bridge.load_weights(model)
        trainer = MegatronTrainer(model, TrainerConfig(learning_rate=2e-4, micro_batch_size=PROMPTS * GROUP))
        warm_up(trainer)  # meanwhile the engine starts

        tokenizer = toy.tokenizer()
        rollout = Rollout(engine, tokenizer, reward, SamplingConfig(max_tokens=toy.ANSWER_TOKENS))
        sync = WeightSync(bridge, trainer.model, engine)
        sync.sync(version=1)
        trainer.set_learning_rate(1e-3)

        loss = grpo_loss(GRPOConfig(group_size=GROUP, entropy_coefficient=0.01))
        draw = random.Random(0)  # the same problems on every rank
        for step in range(1, steps + 1):
            # The engine samples a group of answers to every problem and rank 0 rewards them; all ranks get the batch.
            rollouts = rollout.collect(draw.sample(toy.sums(), PROMPTS), GROUP)
            # The advantage: how much better an answer is than the others of its group.
            advantages = group_advantages(rollouts.rewards, GROUP)
            batch = rollouts.batch.with_tensors(advantages=rollouts.batch.spread(advantages))
            # The old log-probabilities come from the trainer itself, so that the ratio is exactly 1 in this step.
            batch = batch.with_tensors(old_log_probs=trainer.compute_log_probs(batch).log_probs)
            report = trainer.step(batch, loss)
            # The engine gets the policy after the step, or the sync raises an error with the reason.
            synced = sync.sync(version=step + 1)

            mismatch = mismatch_metrics(report.statistics.log_probs, batch.need("rollout_log_probs"), batch.mask)
            if first:
                print(
                    f"step {step:3}  reward {rollouts.rewards.mean().item():.2f}  "
                    f"KL train-rollout {mismatch['kl_train_rollout']:.0e}  refit {synced.seconds * 1e3:.0f} ms  "
                    f"digest {synced.digest}",
                    flush=True,
                )
        accuracy = rollout.accuracy(toy.sums())
        sync.close()
        destroy_parallel()
        return accuracy
    finally:
        if engine is not None:
            engine.close()


def start_engine(checkpoint: Path) -> EngineProcess:
    """Starts vLLM in its own process with one thread, so that the trainer has the other cores."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    return EngineProcess(checkpoint, max_model_len=16, max_num_seqs=PROMPTS * GROUP, environment=one_thread).start()


def warm_up(trainer: MegatronTrainer) -> None:
    """Makes supervised steps until a quarter of the sums are right: GRPO needs a policy that already solves some problems."""
    tokenizer, problems = toy.tokenizer(), toy.sums()
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    answers = [[*tokenizer.encode(problem.answer), tokenizer.eos_token_id] for problem in problems]
    batch = Batch.from_completions(prompts, answers, pad_token_id=tokenizer.pad_token_id)
    while (trainer.compute_log_probs(batch).greedy | ~batch.mask).all(dim=1).float().mean() < 0.25:
        trainer.step(batch, supervised_loss)


if __name__ == "__main__":
    main()
