"""The answers of `vllm serve` on the routes that `server.ServerEngine` calls: the fields that are read."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.core.typed_values import AtLeastOne, AtLeastZero


@dataclass(frozen=True)
class WorldSize:
    world_size: AtLeastOne


@dataclass(frozen=True)
class WeightInfo:
    weight_version: str


@dataclass(frozen=True)
class Success:
    success: bool


@dataclass(frozen=True)
class Results:
    """The answer of `/collective_rpc`.

    Attributes:
        results: what our own code returned in the workers, one result for each.
    """

    results: list  # type: ignore[type-arg]


@dataclass(frozen=True)
class ServedModel:
    id: str
    root: str | None = None


@dataclass(frozen=True)
class Models:
    data: list[ServedModel]


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass(frozen=True)
class Logprobs:
    content: list[Logprob] | None = None


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `[start, end)`, which weights of this version sampled."""

    version: str
    start: AtLeastZero
    end: AtLeastZero


@dataclass(frozen=True)
class Choice:
    """One of the samples of a prompt."""

    index: AtLeastZero
    token_ids: list[AtLeastZero]
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None

    def __post_init__(self) -> None:
        if any(span.end > len(self.token_ids) for span in self.weight_versions or []):
            raise ValueError(f"weight_versions end beyond the {len(self.token_ids)} tokens")


@dataclass(frozen=True)
class Choices:
    choices: list[Choice]
