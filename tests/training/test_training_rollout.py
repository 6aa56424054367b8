"""From an engine's completions to rewarded batches on every rank, and the toy task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.collect import Rollout, RolloutBatch, SamplingConfig
from mbridge_rl.training.rollout.rewards import Problem, exact_match


class ScriptedEngine:
    """Answers every prompt with the given completions, in turn."""

    def __init__(self, answers: list[str]) -> None:
        self._answers = answers
        self.requests: list[dict[str, Any]] = []

    def generate(self, prompts: Sequence[Sequence[int]], n: int = 1, **options: Any) -> list[Completion]:
        self.requests.append({"prompts": [list(prompt) for prompt in prompts], "n": n, **options})
        tokenizer, completions = toy.tokenizer(), []
        for index in range(len(prompts)):
            for sample in range(n):
                tokens = tokenizer.encode(self._answers[(index * n + sample) % len(self._answers)])
                logprobs = [-0.5 * (position + 1) for position in range(len(tokens))]
                completions.append(Completion(index, tokens, logprobs, "stop", 7))
        return completions


def _collect(rank: int) -> RolloutBatch:
    engine = ScriptedEngine(["7<eos>", "8<eos>", "12<eos>", "123"]) if rank == 0 else None
    rollout = Rollout(engine, toy.tokenizer(), exact_match, SamplingConfig(max_tokens=3, length=8, seed=5))
    problems = [Problem("3+4=", "7"), Problem("6+6=", "12")]
    first = rollout.collect(problems, group_size=2)
    if engine is not None:
        rollout.collect(problems, group_size=2)
        assert len(set(engine.requests[0]["seed"] + engine.requests[1]["seed"])) == 8  # every episode has its own stream
        assert engine.requests[0]["stop_token_ids"] == [2]
        prompts = [toy.tokenizer().encode("3+4="), toy.tokenizer().encode("6+6=")]
        assert engine.requests[0]["prompts"] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    else:
        rollout.collect(problems, group_size=2)
    return first


def test_every_rank_gets_the_rewarded_batch() -> None:
    ranks = run_ranks(_collect, 2)
    for rollout in ranks:
        assert rollout.rewards.tolist() == [1.0, 0.0, 1.0, 0.0]
        assert rollout.versions.tolist() == [7] * 4
        assert rollout.batch.tokens.shape == (4, 8)
        assert rollout.batch.mask.sum(1).tolist() == [2, 2, 3, 3]
        assert toy.tokenizer().decode(rollout.batch.tokens[3, :7]) == "6+6=123"
        assert rollout.batch.need("rollout_log_probs")[rollout.batch.mask].tolist() == [-0.5, -1.0] * 2 + [-0.5, -1.0, -1.5] * 2
    assert ranks[0].samples == [("3+4=", "7"), ("3+4=", "8"), ("6+6=", "12"), ("6+6=", "123")]
    assert ranks[1].samples == ranks[0].samples


def _accuracy(rank: int) -> float:
    engine = ScriptedEngine(["7<eos>", "1<eos>", "1<bos>"]) if rank == 0 else None
    problems = [Problem("3+4=", "7"), Problem("1+1=", "2"), Problem("0+1=", "1")]
    return Rollout(engine, toy.tokenizer(), exact_match).accuracy(problems)


def test_accuracy_counts_only_answers_that_end_rightly() -> None:
    assert run_ranks(_accuracy, 2) == [pytest.approx(1 / 3)] * 2


def test_rank_0_needs_an_engine() -> None:
    with pytest.raises(ValueError, match="rank 0 has no engine"):
        Rollout(None, toy.tokenizer(), exact_match)


def test_the_tokenizer_is_one_token_per_character() -> None:
    tokenizer = toy.tokenizer()
    assert len(tokenizer) % 2 == 1  # tensor parallelism must pad it
    assert tokenizer.encode("9+0=") == [12, 13, 3, 14]
    assert tokenizer.decode([12, 13, 3, 14, tokenizer.eos_token_id]) == "9+0=<eos>"
    assert len({problem.prompt for problem in toy.sums()}) == 100
    assert all(len(tokenizer.encode(problem.prompt)) == toy.PROMPT_TOKENS for problem in toy.sums())
    assert all(len(tokenizer.encode(problem.answer)) < toy.ANSWER_TOKENS for problem in toy.sums())
    assert all(eval(problem.prompt[:-1]) == int(problem.answer) for problem in toy.sums())


@pytest.mark.parametrize("model", toy.MODELS)
def test_toy_checkpoints_are_real_ones(model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = toy.make_checkpoint(tmp_path / "a", model, seed=1, num_layers=3)
    network = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).encode("1+1=") == toy.tokenizer().encode("1+1=")
    assert network.dtype == torch.float32
    bridge = AutoBridge.from_pretrained(directory)
    assert bridge.spec.num_layers == 3
    again = AutoModelForCausalLM.from_pretrained(toy.make_checkpoint(tmp_path / "b", model, seed=1, num_layers=3))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    tokens = torch.tensor([toy.tokenizer().encode("1+1=")])
    assert math.isfinite(network(tokens).logits.sum().item())


def test_unknown_toy_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown toy model 'gpt5': choose from qwen3, qwen3-moe, llama"):
        toy.make_checkpoint(tmp_path, "gpt5")
