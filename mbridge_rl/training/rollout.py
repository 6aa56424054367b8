"""Rollouts: what the engine answers, as batches that every trainer rank holds.

Rank 0 talks to the engine, computes rewards and shares the result as tensors; the other ranks have `engine=None`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mbridge_rl.sync.group import RankGroup
from mbridge_rl.sync.vllm.engine import Completion
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.rewards import Problem, RewardFunction


class Engine(Protocol):
    """What a rollout asks of an engine: `InProcessEngine` and `EngineProcess` have it."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    pad_token_id: int
    eos_token_id: int

    def encode(self, text: str, **options: Any) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


@dataclass(frozen=True)
class SamplingConfig:
    """Attributes:
    max_tokens: of a completion, with its stop token.
    length: every batch is padded to so many tokens; `None` pads to its longest row.
    temperature: 1 samples from the policy itself; give `TrainerConfig` the same.
    seed: of sampling; call `c` uses `seed + c`.
    """

    max_tokens: int = 16
    length: int | None = None
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class RolloutBatch:
    """Sampled completions, rewarded.

    Attributes:
        batch: with `rollout_log_probs`; the rows of a group side by side.
        rewards: `[batch]` fp32.
        versions: `[batch]` int64, of the weights that sampled each row.
        samples: `(prompt, completion)` texts on rank 0, empty elsewhere.
    """

    batch: Batch
    rewards: Tensor
    versions: Tensor
    samples: list[tuple[str, str]]


class Rollout:
    """Samples from an engine. Made and called by all ranks together.

    Args:
        engine: on rank 0; `None` elsewhere.
        tokenizer: for prompts and completions.
        reward: of a completion.
    """

    def __init__(
        self, engine: Engine | None, tokenizer: Tokenizer, reward: RewardFunction, config: SamplingConfig | None = None
    ) -> None:
        self._engine, self._tokenizer, self._reward = engine, tokenizer, reward
        self._config = config or SamplingConfig()
        self._group = RankGroup()
        self._calls = 0
        if engine is None and self._group.rank == 0:
            raise ValueError("rank 0 has no engine: give Rollout(engine=...) one there")

    def collect(self, problems: Sequence[Problem], group_size: int) -> RolloutBatch:
        """`group_size` completions of every problem."""
        self._calls += 1
        tensors: dict[str, Tensor] = {}
        samples: list[tuple[str, str]] = []
        if self._engine is not None:
            completions = self._engine.generate(
                [self._encode(problem) for problem in problems],
                n=group_size,
                temperature=self._config.temperature,
                max_tokens=self._config.max_tokens,
                seed=self._config.seed + self._calls,
                stop_token_ids=[self._tokenizer.eos_token_id],
            )
            texts = [self._text(completion) for completion in completions]
            asked = [problems[completion.prompt_index] for completion in completions]
            samples = [(problem.prompt, text) for problem, text in zip(asked, texts, strict=True)]
            batch = Batch.from_completions(
                [self._encode(problem) for problem in asked],
                [completion.tokens for completion in completions],
                pad_token_id=self._tokenizer.pad_token_id,
                length=self._config.length,
                log_probs=[completion.logprobs for completion in completions],
            )
            rewards = [self._reward(problem, text) for problem, text in zip(asked, texts, strict=True)]
            tensors = {
                "tokens": batch.tokens,
                "mask": batch.mask,
                "rollout_log_probs": batch.need("rollout_log_probs"),
                "rewards": torch.tensor(rewards, dtype=torch.float32),
                "versions": torch.tensor([completion.weight_version for completion in completions]),
            }
        tensors = self._shared(tensors)
        rewards, versions = tensors.pop("rewards"), tensors.pop("versions")
        return RolloutBatch(Batch(**tensors), rewards, versions, samples)

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """Mean reward of the engine's greedy completions, on every rank."""
        mean = torch.zeros(1, dtype=torch.float64)
        if self._engine is not None:
            texts = [self._text(completion) for completion in self.greedy(problems)]
            rewards = [self._reward(problem, text) for problem, text in zip(problems, texts, strict=True)]
            mean = torch.tensor([sum(rewards) / len(rewards)], dtype=torch.float64)
        return self._from_first_rank(mean).item()

    def greedy(self, problems: Sequence[Problem]) -> list[Completion]:
        """The engine's greedy completions. Rank 0 only."""
        if self._engine is None:
            raise ValueError(f"rank {self._group.rank} has no engine; ask rank 0")
        return self._engine.generate(
            [self._encode(problem) for problem in problems],
            temperature=0.0,
            max_tokens=self._config.max_tokens,
            stop_token_ids=[self._tokenizer.eos_token_id],
        )

    def _encode(self, problem: Problem) -> list[int]:
        return self._tokenizer.encode(problem.prompt)

    def _text(self, completion: Completion) -> str:
        tokens = completion.tokens
        if tokens and tokens[-1] == self._tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors on every rank: two numbers say their shapes, then one message each."""
        shape = torch.tensor(tensors["tokens"].shape if tensors else (0, 0))
        rows, length = self._from_first_rank(shape).tolist()
        per_token = {"tokens": torch.int64, "mask": torch.bool, "rollout_log_probs": torch.float32}
        expected = {name: torch.zeros(rows, length, dtype=dtype) for name, dtype in per_token.items()}
        expected["rewards"] = torch.zeros(rows)
        expected["versions"] = torch.zeros(rows, dtype=torch.int64)
        return {name: self._from_first_rank(tensors.get(name, tensor)) for name, tensor in expected.items()}

    def _from_first_rank(self, tensor: Tensor) -> Tensor:
        payload = tensor.contiguous().to(self._group.device)
        work = self._group.broadcast(payload.view(-1).view(torch.uint8), 0)
        if work is not None:
            work.wait()
        return payload.cpu()
