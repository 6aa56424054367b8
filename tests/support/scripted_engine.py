"""Engines that say what a test tells them, with the interface of real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from mbridge_rl.sync.vllm.engines.in_process import Completion

Writer = Callable[[list[int], int], int]
"""The next token after a context, for a seed."""


class WritingEngine:
    """Writes token by token what `writer` says, at weights of `version`; keeps how it was asked."""

    def __init__(self, writer: Writer, version: int = 1) -> None:
        self.writer, self.version = writer, version
        self.calls: list[list[list[int]]] = []
        self.before_call: Callable[[], None] = lambda: None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: Sequence[int],
        seed: Sequence[int],
        stop_token_ids: Sequence[int],
        temperature: float,
    ) -> list[Completion]:
        self.before_call()
        self.calls.append([list(prompt) for prompt in prompts])
        assert all(room > 0 for room in max_tokens)
        return [
            self._completion(index, list(prompt), max_tokens[index], seed[index], set(stop_token_ids))
            for index, prompt in enumerate(prompts)
        ]

    def _completion(self, index: int, context: list[int], room: int, seed: int, stops: set[int]) -> Completion:
        tokens: list[int] = []
        while len(tokens) < room and not stops & set(tokens):
            tokens.append(self.writer(context + tokens, seed))
        reason = "stop" if stops & set(tokens) else "length"
        return Completion(index, tokens, [-float(token) for token in tokens], reason, self.version)


def scripted(text: str, tokenizer: Any, prompt_tokens: int) -> Writer:
    """Writes `text` after every prompt of so many tokens, whatever stands between."""
    tokens = tokenizer.encode(text)
    return lambda context, seed: tokens[len(context) - prompt_tokens]


def hashed(size: int, end: int, mean_length: int, prompt_tokens: int = 4) -> Writer:
    """Pseudo-random tokens below `size`: the first depends on prompt and seed, the others on what is before them. `end` comes
    once in `mean_length`."""

    def writer(context: list[int], seed: int) -> int:
        digest = hashlib.blake2b(repr((context, seed if len(context) == prompt_tokens else 0)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        return end if number % mean_length == 0 else number // mean_length % size

    return writer
