"""A Megatron trainer and a vLLM engine in one process: train, refit, generate.

    python refit_in_process.py

The engine starts with the weights of a checkpoint. The trainer makes a few Megatron steps from the same checkpoint, then its
weights are synced into the running engine. At the end a new engine, started from the checkpoint that the trainer saved, returns
the same tokens and log-probabilities. Needs no GPU: Megatron runs without one inside of a scope, so that the engine is not
affected.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from mbridge_rl import AutoBridge, InProcessEngine, ParallelLayout, WeightSync, initialize_parallel
from mbridge_rl.training import Batch, MegatronTrainer, TrainerConfig, supervised_loss

PROMPTS = [[5, 9, 33, 100, 7], [11, 22, 33, 44, 55, 66]]
VOCABULARY = 515


def tiny_qwen3(directory: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=136, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def train(trainer: MegatronTrainer, steps: int = 20) -> None:
    """Teaches the model to predict the next number."""
    tokens = torch.arange(200).view(2, 100)
    batch = Batch(tokens, mask=torch.ones_like(tokens, dtype=torch.bool))
    for _ in range(steps):
        report = trainer.step(batch, supervised_loss)
    print(f"trained {steps} steps, loss {report.loss:.3f}")


def greedy(engine: InProcessEngine) -> list[tuple[list[int], list[float]]]:
    answers = engine.generate(PROMPTS, temperature=0.0, max_tokens=8)
    print(f"  version {answers[0].weight_version}:", [answer.tokens for answer in answers])
    return [(answer.tokens, answer.logprobs) for answer in answers]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = tiny_qwen3(Path(scratch) / "qwen3")

        engine = InProcessEngine(checkpoint, max_model_len=64)
        print("engine up")
        before = greedy(engine)

        bridge = AutoBridge.from_pretrained(checkpoint)
        initialize_parallel(ParallelLayout())
        model = bridge.build_model()
        bridge.load_weights(model)
        trainer = MegatronTrainer(model, TrainerConfig(learning_rate=3e-3))
        train(trainer)

        report = WeightSync(bridge, trainer.model, engine).sync(version=1)
        print(f"refit: {report.tensors} tensors, {report.nbytes} bytes, digest {report.digest}")
        after = greedy(engine)

        bridge.save_pretrained(trainer.model, Path(scratch) / "trained")
        print("a fresh engine from the saved checkpoint")
        fresh = greedy(InProcessEngine(Path(scratch) / "trained", max_model_len=64, weight_version=1))
        print("the refit changed the answers:", after != before)
        print("the refitted engine equals the fresh one:", after == fresh)


if __name__ == "__main__":
    main()
