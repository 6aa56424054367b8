"""What an engine in a process of its own answers to fixed prompts."""

from __future__ import annotations

from mbridge_rl.sync.vllm.engines.process import EngineProcess

PROMPTS = [[5, 9, 33, 100, 514], [1, 2, 3]]


ENGINE = {"max_model_len": 64, "max_num_seqs": 8}


Answers = list[tuple[list[int], list[float]]]


def greedy(engine: EngineProcess) -> Answers:
    answers = engine.generate(PROMPTS, temperature=0.0, max_tokens=8)
    return [(answer.tokens, answer.logprobs) for answer in answers]
