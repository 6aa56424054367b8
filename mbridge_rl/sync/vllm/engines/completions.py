"""The sampling parameters of a prompt, and the completions of an engine; both are the same for every kind of engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mbridge_rl.sync.vllm.versions import weight_version_spans


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Attributes:
        prompt_index: the index of the prompt that it answers.
        tokens: the generated token ids, with the stop token if one ended it.
        logprobs: the log-probability of each token, under the distribution it was sampled from (after temperature); empty if
            none were requested.
        finish_reason: "stop", "length", or "abort" if a commit ended it.
        weight_version: the version of the weights that generated it; if a commit came in between, that of its last token.
        token_versions: the version of the weights that generated each token.
        adapter: name and version of the adapter that answered, such as "policy@7"; `None` in an engine without adapters.
    """

    prompt_index: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int
    token_versions: tuple[int, ...] = ()
    adapter: str | None = None


def sampling(
    count: int,
    *,
    n: int = 1,
    temperature: float = 1.0,
    max_tokens: int | Sequence[int] = 16,
    seed: int | Sequence[int] | None = None,
    stop_token_ids: Sequence[int] = (),
    logprobs: bool = True,
    ignore_eos: bool = False,
) -> list[dict[str, Any]]:
    """Fields of vLLM's `SamplingParams` for each of `count` prompts, in plain JSON types; see `InProcessEngine.generate`."""
    return [
        {
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens if isinstance(max_tokens, int) else max_tokens[index],
            "seed": _stream(seed, index, n),
            "stop_token_ids": list(stop_token_ids),
            "logprobs": 0 if logprobs else None,  # 0 means only that of the sampled token
            "ignore_eos": ignore_eos,
            "detokenize": False,
        }
        for index in range(count)
    ]


def completion_of(prompt_index: int, sample: Any, version: int) -> Completion:
    """Makes a completion from vLLM's `CompletionOutput`."""
    logprobs = [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs or [], strict=False)]
    spans = [(span.version, span.start, span.end) for span in weight_version_spans(sample)]
    return completion(prompt_index, list(sample.token_ids), logprobs, str(sample.finish_reason), spans, version)


def completion(
    prompt_index: int,
    tokens: list[int],
    logprobs: list[float],
    finish_reason: str,
    spans: Sequence[tuple[str, int, int]],
    version: int,
) -> Completion:
    """A completion whose tokens `[start, end)` were sampled by the versions of `spans`; by `version` if there are no spans."""
    versions = tuple(as_version(label) for label, start, end in spans for _ in range(start, end))
    return Completion(prompt_index, tokens, logprobs, finish_reason, versions[-1] if versions else version, versions)


def as_version(label: str) -> int:
    """vLLM's label of the served weights as a version; -1 if it is not a number."""
    return int(label) if label.lstrip("-").isdigit() else -1


def _stream(seed: int | Sequence[int] | None, index: int, n: int) -> int | None:
    """The seed of a prompt's first sample; vLLM adds the sample's index."""
    if seed is None:
        return None
    return (seed * 1_000_003 + index) * n if isinstance(seed, int) else seed[index] * n
