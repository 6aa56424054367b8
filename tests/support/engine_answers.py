"""What an engine in a process of its own answers to fixed prompts."""

from __future__ import annotations

import torch

from mbridge_rl.sync.vllm.engines.process import EngineProcess

PROMPTS = [[5, 9, 33, 100, 514], [1, 2, 3]]


ENGINE = {"max_model_len": 64, "max_num_seqs": 8}


Answers = list[tuple[list[int], list[float]]]


def greedy(engine: EngineProcess) -> Answers:
    answers = engine.generate(PROMPTS, temperature=0.0, max_tokens=8)
    return [(answer.tokens, answer.logprobs) for answer in answers]


def greedy_of_transformers(model: torch.nn.Module, count: int) -> Answers:
    """The `count` likeliest tokens after each prompt, one after the other, with their log-probabilities."""
    answers: Answers = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(count):
            with torch.no_grad():
                step = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(step.argmax()))
            logprobs.append(float(step.max()))
        answers.append((tokens[len(prompt) :], logprobs))
    return answers
