"""Episodes token by token, and the generator in all its modes; engines are scripted, so that every token is known."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scripted_engine import WritingEngine, hashed, scripted

from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.collect import RewardFailed, assemble
from mbridge_rl.training.rollout.episodes import NOT_SAMPLED, Episode, EpisodeRunner, SamplingConfig
from mbridge_rl.training.rollout.generator import EpisodeGroup, Generator, GeneratorConfig
from mbridge_rl.training.rollout.guessing import DIGITS, GuessingGame, hidden_digits
from mbridge_rl.training.rollout.rewards import InProcessJudge, Problem, Verdict
from mbridge_rl.training.rollout.sampler import EpochSampler, UnsolvedFirstSampler

TOKENIZER = toy.tokenizer()
EOS = TOKENIZER.eos_token_id


def _episode(engine: WritingEngine, segment: int | None = None, environment: Any = None, **sampling: Any) -> Episode:
    runner = EpisodeRunner(engine, TOKENIZER, SamplingConfig(**sampling), environment)
    episode = runner.start(Problem("3+4=", "7"), 0, 0)
    while not episode.finish:
        runner.advance([episode], segment)
    return episode


def _text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(tokens)


def test_stop_tokens_stop_texts_and_length_end_an_episode() -> None:
    engine = WritingEngine(scripted("12+3=<eos>4", TOKENIZER, 4))
    ended = _episode(engine, max_tokens=10)
    assert (_text(ended.tokens), ended.finish, ended.truncated) == ("12+3=<eos>", "stop", False)
    by_text = _episode(engine, max_tokens=10, stop=("+3", "="))
    assert (_text(by_text.tokens), by_text.finish) == ("12+3", "stop")
    assert len(by_text.log_probs) == len(by_text.versions) == 4
    by_token = _episode(engine, max_tokens=10, stop_token_ids=(TOKENIZER.encode("+")[0],))
    assert _text(by_token.tokens) == "12+"
    cut = _episode(engine, max_tokens=3)
    assert (_text(cut.tokens), cut.finish, cut.truncated) == ("12+", "length", True)
    no_room = _episode(engine, max_tokens=10, max_context=6)
    assert (_text(no_room.tokens), no_room.finish) == ("12", "length")


@pytest.mark.parametrize("segment", [1, 2, 3, 100])
def test_segments_change_nothing_but_who_wrote_what(segment: int) -> None:
    engine = WritingEngine(hashed(12, EOS, 9))
    uncut = _episode(WritingEngine(hashed(12, EOS, 9)), max_tokens=30, stop=("+7",))

    def next_version() -> None:
        engine.version += 1

    engine.before_call = next_version
    cut = _episode(engine, segment, max_tokens=30, stop=("+7",))
    assert cut.tokens == uncut.tokens
    assert cut.log_probs == uncut.log_probs
    assert cut.versions == [2 + position // segment for position in range(len(cut.tokens))]


class Adder:
    """Answers every turn with `+`, the turn's length and `=`, until the policy has had three turns."""

    def __init__(self, problem: Problem) -> None:
        self.turns: list[str] = []

    def respond(self, turn: str) -> str | None:
        self.turns.append(turn)
        if "8" in turn:
            raise RuntimeError("no eights")
        return None if len(self.turns) == 3 else f"+{len(turn)}="

    def reward(self) -> float:
        return float(len(self.turns))


def test_environments_write_tokens_that_are_not_trained_on() -> None:
    turns = scripted("12<eos>+2=3<eos>+1=456<eos>", TOKENIZER, 4)  # the writer skips the tokens that the environment wrote
    engine = WritingEngine(turns)
    episode = _episode(engine, environment=Adder, max_tokens=20, max_turns=5)
    assert _text(episode.tokens) == "12<eos>+2=3<eos>+1=456<eos>"
    assert (episode.finish, episode.turns, episode.verdict) == ("stop", 3, Verdict(3.0))
    assert episode.environment is not None
    assert episode.environment.turns == ["12", "3", "456"]  # type: ignore[attr-defined]
    sampled = [version != NOT_SAMPLED for version in episode.versions]
    assert sampled == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 3 + [True] * 4
    # The next call gets the tokens as the engine returned them, without another tokenization.
    assert [len(context) for (context,) in engine.calls] == [4, 10, 15]
    assert all(context == [*episode.prompt, *episode.tokens][: len(context)] for (context,) in engine.calls)

    assembled = assemble([episode], [Verdict(1.0)], pad_token_id=0)
    assert assembled.batch.mask[0, 3:].tolist() == [*sampled, False]
    assert assembled.batch.need("rollout_log_probs")[0, 3:-1].tolist() == episode.log_probs
    assert assembled.batch.num_tokens == 9


def test_episodes_end_with_their_turns_their_room_or_their_environment() -> None:
    engine = WritingEngine(scripted("12<eos>+2=3<eos>+1=456<eos>", TOKENIZER, 4))
    two = _episode(engine, environment=Adder, max_tokens=20, max_turns=2)
    assert (two.finish, two.turns, two.verdict) == ("turns", 2, Verdict(2.0))
    full = _episode(engine, environment=Adder, max_tokens=4, max_turns=5)
    assert (full.finish, _text(full.tokens), full.verdict) == ("length", "12<eos>+2=3", Verdict(2.0))
    for room in (10, 11):  # 4 of the prompt, 3 of the turn, 3 of the answer, and at least one more
        answered = _episode(engine, environment=Adder, max_tokens=20, max_turns=5, max_context=room)
        assert (answered.finish, _text(answered.tokens)) == ("length", "12<eos>" if room == 10 else "12<eos>+2=3")
    broken = _episode(WritingEngine(scripted("18<eos>", TOKENIZER, 4)), environment=Adder, max_tokens=20, max_turns=5)
    assert broken.finish == "error"
    assert broken.verdict == Verdict(error="environment Adder raised RuntimeError: no eights")


GUESSES = toy.tokenizer(DIGITS + "?<>")


def _halving(context: list[int], seed: int) -> int:
    """Guesses the middle of the digits that are still possible after the answers so far."""
    turns, first, last = GUESSES.decode(context)[1:], 0, 9
    for guess, answer in zip(turns[::2], turns[1::2], strict=False):
        first, last = (int(guess) + 1, last) if answer == ">" else (first, int(guess) - 1)
    return GUESSES.encode(str((first + last) // 2))[0]


def _counting(context: list[int], seed: int) -> int:
    """Guesses 0, 1, 2 and 3, whatever is answered."""
    return GUESSES.encode(str(len(context) // 2))[0]


def _games(writer: Any) -> list[Episode]:
    sampling = SamplingConfig(max_tokens=4, max_turns=4, stop=tuple(DIGITS))
    runner = EpisodeRunner(WritingEngine(writer), GUESSES, sampling, GuessingGame)
    episodes = [runner.start(problem, index) for index, problem in enumerate(hidden_digits())]
    runner.run(episodes)
    assert [runner.transcript(episode) for episode in episodes][:4] == (
        ["4<1<0", "4<1", "4<1>2", "4<1>2>3"] if writer is _halving else ["0", "0>1", "0>1>2", "0>1>2>3"]
    )
    return episodes


def test_only_who_reads_the_answers_finds_every_hidden_digit() -> None:
    episodes = _games(_halving)
    assert [episode.verdict for episode in episodes] == [Verdict(1.0)] * 10
    assert [episode.turns for episode in episodes] == [3, 2, 3, 4, 1, 3, 4, 2, 3, 4]
    assert episodes[3].versions == [1, NOT_SAMPLED, 1, NOT_SAMPLED, 1, NOT_SAMPLED, 1]
    blind = _games(_counting)
    assert [episode.verdict for episode in blind] == [Verdict(1.0)] * 4 + [Verdict(0.0)] * 6
    assert {episode.finish for episode in blind[4:]} == {"turns"}
    silent = GuessingGame(hidden_digits()[3])
    assert (silent.respond(""), silent.reward(), silent.respond("?3"), silent.reward()) == ("?", 0.0, None, 1.0)


def test_rewards_that_are_missing_are_unknown_zero_or_the_end() -> None:
    engine = WritingEngine(scripted("7<eos>", TOKENIZER, 4))
    episodes = [_episode(engine, max_tokens=4) for _ in range(2)]
    verdicts = [Verdict(1.0), Verdict(error="broken")]
    masked = assemble(episodes, verdicts, pad_token_id=0)
    assert math.isnan(masked.rewards[1])
    assert (masked.counts, masked.errors) == ({"rewards_failed": 1}, ("broken",))
    assert assemble(episodes, verdicts, pad_token_id=0, failed_rewards="zero").rewards.tolist() == [1.0, 0.0]
    with pytest.raises(RewardFailed, match="1 of 2 rewards failed: broken"):
        assemble(episodes, verdicts, pad_token_id=0, failed_rewards="raise")


# The generator.

SIZE, EACH = 2, 3


class Play:
    """A generator on a scripted engine, and a trainer that takes batches as the loop does."""

    def __init__(self, steps: int, problems: int = 20, reward: Any = None, **config: Any) -> None:
        self.engine = WritingEngine(hashed(12, EOS, 6), version=0)
        runner = EpisodeRunner(self.engine, TOKENIZER, SamplingConfig(max_tokens=12))
        self.sampler = EpochSampler([Problem(f"{i % 10}+{i // 10}=", str(i)) for i in range(problems)], seed=1)
        judge = InProcessJudge(reward or (lambda problem, completion: float(len(completion))))
        settings = GeneratorConfig(EACH, SIZE, steps, **config)
        self.generator, self.step, self.steps = Generator(runner, self.sampler, judge, settings), 0, steps
        self.batches: list[list[EpisodeGroup]] = []
        self.rejected: list[int] = []

    def start(self) -> Play:
        self.engine.version = self.step
        self.generator.resume(self.step)
        return self

    def train(self) -> None:
        groups, rejected = self.generator.take()
        self.batches.append(groups)
        self.rejected.append(rejected)
        self.generator.pause()
        self.step += 1
        self.engine.version = self.step
        self.generator.resume(self.step)

    def staleness(self) -> list[int]:
        """Of the oldest token of each batch."""
        return [
            step - min(version for group in groups for episode in group.episodes for version in episode.versions)
            for step, groups in enumerate(self.batches)
        ]


def _played(steps: int, **config: Any) -> Play:
    play = Play(steps, **config).start()
    for _ in range(steps):
        play.train()
    play.generator.close()
    return play


def _everything(play: Play) -> list[Any]:
    return [
        (group.index, group.problem.prompt, episode.tokens, episode.versions)
        for groups in play.batches
        for group in groups
        for episode in group.episodes
    ]


def test_synchronous_batches_are_of_the_newest_weights() -> None:
    play = _played(4)
    assert play.staleness() == [0] * 4
    assert [group.index for groups in play.batches for group in groups] == list(range(4 * EACH))
    assert _everything(play) == _everything(_played(4))
    assert all(len(group.verdicts) == len(group.episodes) == SIZE for groups in play.batches for group in groups)


def test_one_step_off_samples_the_next_batch_with_the_weights_before() -> None:
    play = _played(5, max_staleness=1)
    assert play.staleness() == [0, 1, 1, 1, 1]
    assert _everything(play) == _everything(_played(5, max_staleness=1))  # nothing depends on time
    assert all(len(set(versions)) == 1 for _, _, _, versions in _everything(play))


@pytest.mark.parametrize(("staleness", "segment"), [(1, 2), (2, 1), (3, 4)])
def test_asynchronous_batches_keep_to_the_bound_and_to_every_token(staleness: int, segment: int) -> None:
    play = _played(12, max_staleness=staleness, segment_tokens=segment)
    assert max(play.staleness()) <= staleness
    assert sorted(group.index for groups in play.batches for group in groups) == list(range(12 * EACH))
    for _, _, tokens, versions in _everything(play):
        assert versions == sorted(versions)
        assert len(versions) == len(tokens)
    # Every context that an engine got is the beginning of an episode.
    episodes = [[*episode.prompt, *episode.tokens] for groups in play.batches for group in groups for episode in group.episodes]
    assert all(context in [episode[: len(context)] for episode in episodes] for call in play.engine.calls for context in call)


def test_unfinished_episodes_go_on_across_an_update() -> None:
    play = Play(2, max_staleness=1, segment_tokens=1)
    gate, waiting = threading.Semaphore(0), threading.Semaphore(0)

    def before_call() -> None:
        waiting.release()
        gate.acquire()

    play.engine.before_call = before_call
    play.start()
    waiting.acquire()  # the first call is under way, with weights 0
    pausing = threading.Thread(target=play.generator.pause)
    pausing.start()
    gate.release()
    pausing.join()  # one token each
    assert all(len(episode.tokens) == 1 for group in play.generator._groups for episode in group.episodes)
    play.engine.version = 1
    play.generator.resume(1)
    for _ in range(100):
        gate.release()
    groups, _ = play.generator.take()
    versions = {tuple(sorted(set(episode.versions))) for group in groups for episode in group.episodes}
    assert (0, 1) in versions
    assert versions <= {(0,), (0, 1), (1,)}
    play.engine.before_call = lambda: None
    play.generator.close()


def test_groups_without_variance_are_thrown_away_and_replaced() -> None:
    play = Play(2, dynamic_sampling=True, reward=lambda problem, completion: float("1" in completion)).start()
    play.train()
    play.train()
    play.generator.close()
    rejected = sum(play.rejected)
    assert rejected > 0
    informative = [group.informative for groups in play.batches for group in groups]
    assert all(informative)
    constant = _played(2, dynamic_sampling=True, max_rejected=2, reward=lambda problem, completion: 1.0)
    assert constant.rejected == [2 * EACH] * 2  # then they are taken as they are
    assert [len(groups) for groups in constant.batches] == [EACH] * 2


@pytest.mark.parametrize("config", [{}, {"max_staleness": 1}], ids=["sync", "one-step-off"])
def test_a_lost_engine_changes_nothing_where_nothing_is_asynchronous(config: dict[str, Any]) -> None:
    play, calls = Play(4, **config), iter(range(1000))

    def fail_sometimes() -> None:
        if next(calls) in (1, 3, 4, 7):
            raise ConnectionError("engine lost")

    play.engine.before_call = fail_sometimes
    play.start()
    lost = 0
    while play.step < 4:
        try:
            groups, _ = play.generator.take()
            play.batches.append(groups)
        except ConnectionError:
            play.generator.retry()
            lost += 1
            continue
        while True:
            try:
                play.generator.pause()
                break
            except ConnectionError:
                play.generator.retry()
                lost += 1
        play.step += 1
        play.engine.version = play.step
        play.generator.resume(play.step)
    play.generator.close()
    assert lost >= 3
    assert _everything(play) == _everything(_played(4, **config))


@pytest.mark.parametrize("config", [{}, {"max_staleness": 1}, {"max_staleness": 2, "segment_tokens": 2}])
def test_a_generator_goes_on_in_another_process(config: dict[str, Any], tmp_path: Any) -> None:
    play = Play(5, **config).start()
    for step in range(5):
        groups, _ = play.generator.take()
        play.batches.append(groups)
        play.generator.pause()
        play.step = play.engine.version = step + 1
        if step == 1:
            torch.save(play.generator.state_dict(), tmp_path / "state.pt")
        play.generator.resume(step + 1)
    play.generator.close()
    resumed = Play(5, **config)
    resumed.generator.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    resumed.step = 2
    resumed.start()
    for _ in range(3):
        resumed.train()
    resumed.generator.close()
    taken = [group.index for groups in play.batches[:2] + resumed.batches for group in groups]
    assert sorted(taken) == list(range(5 * EACH))
    if "segment_tokens" not in config:
        resumed.batches = play.batches[:2] + resumed.batches
        assert _everything(resumed) == _everything(play)


def test_an_epoch_has_every_problem_once_and_resumes_anywhere() -> None:
    problems = toy.sums()[:7]
    sampler = EpochSampler(problems, seed=3)
    drawn = sampler.draw(10) + sampler.draw(11)
    for epoch in range(3):
        assert sorted(problems.index(problem) for problem in drawn[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert drawn[:7] != drawn[7:14]
    half = EpochSampler(problems, seed=3)
    half.draw(4)
    resumed = EpochSampler(problems, seed=3)
    resumed.load_state_dict(half.state_dict())
    assert resumed.draw(17) == drawn[4:]


def test_the_sampler_prefers_what_is_not_solved() -> None:
    problems = toy.sums()[:10]
    first, second = (UnsolvedFirstSampler(problems, seed=3, floor=0.01) for _ in range(2))
    drawn = first.draw(10)
    assert drawn == second.draw(10)
    assert sorted(drawn, key=problems.index) == problems  # without repetition
    for problem in problems:
        first.update(problem, 0.0 if problem in problems[:2] else 1.0)
    counts = [0] * 10
    second.load_state_dict(first.state_dict())
    for _ in range(200):
        drawn = first.draw(2)
        assert drawn == second.draw(2)
        for problem in drawn:
            counts[problems.index(problem)] += 1
    assert min(counts[:2]) > 150
    assert sum(counts[2:]) > 0
    assert len(first.draw(25)) == 25
