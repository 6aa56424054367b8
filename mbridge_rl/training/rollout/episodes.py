"""Episodes: a prompt and everything that follows it, token by token, with the writer of each token and the version of its
weights.

Tokens that the engine sampled are stored as token ids and go back to the engine, and later to the trainer, unchanged. They are
decoded to text only for stop texts, rewards and environments, and that text is never encoded again.

An episode advances in rounds. A round is one call of the engine for all unfinished episodes, with at most `segment_tokens`
tokens for each. Weights change only between two rounds, so every token has the version of its round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mbridge_rl.core.typed_values import shown
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.training.rollout.rewards import Judge, Problem, Verdict, described_error, verdict_from

NOT_SAMPLED = -1
"""The version of a token that the policy did not write."""


class SamplingEngine(Protocol):
    """The method of an engine that rollouts use: `InProcessEngine`, `EngineProcess` and `EngineFleet` have it."""

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    pad_token_id: int
    eos_token_id: int

    def encode(self, text: str, **options: Any) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


class Environment(Protocol):
    """The policy's counterpart in one multi-turn episode. Each episode makes its own, as `Class(problem)`. Checkpoints pickle
    it."""

    def respond(self, turn: str) -> str | None:
        """Answers the policy's turn with the text that follows it (including whatever the chat format puts between turns);
        `None` ends the episode."""

    def reward(self) -> float:
        """Returns the reward of the episode; called once, at its end."""


@dataclass(frozen=True)
class SamplingConfig:
    """Attributes:
    max_tokens: number of tokens that the policy may write in an episode, stop tokens included.
    length: number of tokens to which every batch is padded; `None` pads to its longest row.
    temperature: the sampling temperature; 1 samples from the policy itself. Give `TrainerConfig` the same.
    seed: seed of sampling; every episode has its own random stream, whatever else is in the batch.
    stop: texts that end a turn, besides the tokenizer's end token. The token that completes such a text is the turn's last.
    stop_token_ids: tokens that end a turn.
    max_turns: most turns of the policy in an episode with an environment.
    max_context: most tokens of a prompt together with everything after it; `None` sets no limit.
    """

    max_tokens: int = 16
    length: int | None = None
    temperature: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_turns: int = 1
    max_context: int | None = None


@dataclass
class Episode:
    """Attributes:
    prompt, tokens: token ids of the prompt, and of everything that follows it.
    log_probs: log-probability of each of `tokens` when it was sampled; 0 where the policy did not write it.
    versions: version of the weights that sampled each of `tokens`; `NOT_SAMPLED` where an environment wrote it.
    finish: why the episode ended: `stop`, `length` (cut off), `turns`, `error` (its environment raised); empty while
        unfinished.
    turns: number of turns that the policy has finished.
    turn_start: index in `tokens` at which the present turn began.
    verdict: the verdict of the episode's environment, if it gave one.
    """

    problem: Problem
    prompt: list[int]
    seed: int
    environment: Environment | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = ""
    turns: int = 0
    turn_start: int = 0
    verdict: Verdict | None = None

    @property
    def sampled(self) -> int:
        """The number of tokens that the policy wrote."""
        return sum(version != NOT_SAMPLED for version in self.versions)

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    def add(self, tokens: Sequence[int], log_probs: Sequence[float], versions: Sequence[int]) -> None:
        self.tokens += tokens
        self.log_probs += log_probs
        self.versions += versions


class EpisodeRunner:
    """Starts and advances episodes on an engine.

    Args:
        environment: makes the environment of a problem's episode; `None` for single turns.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        environment: Callable[[Problem], Environment] | None = None,
    ) -> None:
        self._engine, self._tokenizer, self.sampling, self._environment = engine, tokenizer, sampling, environment
        self._ends = {tokenizer.eos_token_id, *sampling.stop_token_ids}

    def start(self, problem: Problem, *identity: int) -> Episode:
        """Makes an episode whose random stream is determined by `identity` (the number of its group, its place in the
        group)."""
        environment = None if self._environment is None else self._environment(problem)
        return Episode(problem, self._tokenizer.encode(problem.prompt), _mixed_seed(self.sampling.seed, *identity), environment)

    def advance(self, episodes: Sequence[Episode], segment_tokens: int | None = None, *, greedy: bool = False) -> None:
        """Runs one round for unfinished episodes: samples some tokens of each, and adds the environment's answer where a turn
        ended."""
        rooms = [self._room(episode) for episode in episodes]
        completions = self._engine.generate(
            [[*episode.prompt, *episode.tokens] for episode in episodes],
            temperature=0.0 if greedy else self.sampling.temperature,
            max_tokens=[room if segment_tokens is None else min(room, segment_tokens) for room in rooms],
            seed=[_mixed_seed(episode.seed, len(episode.tokens)) for episode in episodes],
            stop_token_ids=sorted(self._ends),
        )
        for episode, completion in zip(episodes, completions, strict=True):
            self._take(episode, completion)

    def run(self, episodes: Sequence[Episode], *, greedy: bool = False) -> None:
        """Runs rounds until all episodes are finished."""
        while under_way := [episode for episode in episodes if not episode.finish]:
            self.advance(under_way, greedy=greedy)

    def verdicts(self, episodes: Sequence[Episode], judge: Judge) -> list[Verdict]:
        """The verdict on every finished episode: the environment's where it gave one, otherwise the judge's."""
        open_episodes = [episode for episode in episodes if episode.verdict is None]
        questions = [(episode.problem, self.text(episode)) for episode in open_episodes]
        judged = iter(judge.judge(questions) if questions else ())
        return [episode.verdict or next(judged) for episode in episodes]

    def text(self, episode: Episode) -> str:
        """The policy's last turn, without the stop token that ended it."""
        return self._turn_text(episode.tokens[episode.turn_start :])

    def transcript(self, episode: Episode) -> str:
        """The text of everything after the prompt, by the policy and its environment, without the stop token that ended it."""
        return self._turn_text(episode.tokens)

    def _room(self, episode: Episode, appended: int = 0) -> int:
        """How many tokens the policy may still write after `appended` tokens of the environment are added."""
        room = self.sampling.max_tokens - episode.sampled
        if self.sampling.max_context is not None:
            room = min(room, self.sampling.max_context - len(episode.prompt) - len(episode.tokens) - appended)
        return room

    def _take(self, episode: Episode, completion: Completion) -> None:
        count = self._stop_text_at(episode, completion.tokens)
        stopped = count is not None or (bool(completion.tokens) and completion.tokens[-1] in self._ends)
        count = len(completion.tokens) if count is None else count
        versions = completion.token_versions or [completion.weight_version] * len(completion.tokens)
        episode.add(completion.tokens[:count], completion.logprobs[:count], versions[:count])
        if stopped:
            self._end_turn(episode)
        elif self._room(episode) <= 0:
            episode.finish = "length"
            self._ask_environment(episode)

    def _end_turn(self, episode: Episode) -> None:
        episode.turns += 1
        response = self._ask_environment(episode)
        if episode.finish:
            return
        if response is None:
            episode.finish = "stop"
        elif episode.turns >= self.sampling.max_turns:
            episode.finish = "turns"
        else:
            tokens = self._tokenizer.encode(response, add_special_tokens=False)
            if self._room(episode, len(tokens)) <= 0:  # the policy could not answer
                episode.finish = "length"
            else:
                episode.add(tokens, [0.0] * len(tokens), [NOT_SAMPLED] * len(tokens))
                episode.turn_start = len(episode.tokens)
        if episode.finish:
            self._ask_reward(episode)

    def _ask_environment(self, episode: Episode) -> str | None:
        """Passes the turn that ended to the environment and returns its response; an environment that raises ends the
        episode."""
        if episode.environment is None:
            return None
        try:
            response = episode.environment.respond(self.text(episode))
            if not isinstance(response, str | None):
                raise TypeError(f"respond() must return text or None, found {shown(response)}")
        except Exception as error:
            name = type(episode.environment).__qualname__
            episode.finish = "error"
            episode.verdict = Verdict.failed(f"environment {name} raised {described_error(error)}")
            return None
        if episode.finish:
            self._ask_reward(episode)
        return response

    def _ask_reward(self, episode: Episode) -> None:
        if episode.environment is None:
            return
        name = f"the reward of environment {type(episode.environment).__qualname__}"
        episode.verdict = verdict_from(episode.environment.reward, name)

    def _stop_text_at(self, episode: Episode, tokens: Sequence[int]) -> int | None:
        """How many of the new tokens complete the first stop text of the turn; `None` if none does."""
        if not self.sampling.stop:
            return None
        turn = episode.tokens[episode.turn_start :]
        if not self._has_stop([*turn, *tokens]):
            return None
        return next(count for count in range(1, len(tokens) + 1) if self._has_stop([*turn, *tokens[:count]]))

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self.sampling.stop)

    def _turn_text(self, tokens: Sequence[int]) -> str:
        if tokens and tokens[-1] in self._ends:
            tokens = tokens[:-1]
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _mixed_seed(*numbers: int) -> int:
    """A seed of 62 bits that is computed from numbers, the same on every machine."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
