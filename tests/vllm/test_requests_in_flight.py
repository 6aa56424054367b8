"""Requests of a real vLLM engine that are more than one call: in flight when a version is committed (kept, waited for, or
aborted), and turns of an episode."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

import episode_scenarios as episodes
import request_scenarios as scenarios
from interpreter import Interpreter
from tolerance import assert_near, forward
from transformers import AutoModelForCausalLM

from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.collect import assemble
from mbridge_rl.training.rollout.episodes import NOT_SAMPLED, Episode

pytestmark = pytest.mark.slow
TOKENIZER = toy.tokenizer()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    started = Interpreter()
    yield started
    started.close()


def test_requests_in_flight_at_a_commit(interpreter: Interpreter, tmp_path: Path) -> None:
    results = interpreter.call(scenarios.commits_amid_requests, tmp_path)
    for mode in ("staged", "streaming"):
        before, after, continued, _ = results["keep", mode]
        assert continued.finish_reason == "length"
        assert set(continued.token_versions) == {before, after}
        assert list(continued.token_versions) == sorted(continued.token_versions)  # old ones, then new ones
        assert results["keep", mode, "as if prompted"]  # no key or value of the old weights was used again
        before, _, waited, _ = results["wait", mode]
        assert len(waited.tokens) == scenarios.LENGTH
        assert set(waited.token_versions) == {before}
        before, _, aborted, pause = results["abort", mode]
        assert aborted.finish_reason == "abort"
        assert 0 < len(aborted.tokens) < scenarios.LENGTH
        assert set(aborted.token_versions) == {before}
        assert pause > 0
    assert "requests did not finish within 0.3 s" in results["late"]
    assert results["serves on"]


@pytest.mark.nightly
@pytest.mark.alone
def test_a_pipeline_of_two_stages(tmp_path: Path) -> None:
    """Each stage is sent its own layers, and batches that are in the pipeline are finished before the weights change."""
    interpreter = Interpreter()
    try:
        results = interpreter.call(scenarios.a_pipeline_of_two, tmp_path, timeout=400)
    finally:
        interpreter.close()
    first, second = results["tensor_names"]
    assert not first & second
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0"}
    assert {name.split(".")[2] for name in second if ".layers." in name} == {"1"}
    report = results["report"]
    assert report.engine["digest"] == report.digest
    for received, needed in zip(report.engine["bytes_per_worker"], results["kept_bytes"], strict=True):
        assert needed <= received <= 1.05 * needed
    before, after, fresh = (
        [(answer.tokens, answer.logprobs) for answer in results[name]] for name in ("before", "after", "fresh")
    )
    assert before != after == fresh  # the same bits as an engine of one worker
    amid = results["amid"]
    assert set(amid.token_versions) == {1, 2}
    assert list(amid.token_versions) == sorted(amid.token_versions)
    assert results["old tokens"]  # the tokens that are reported as version 1's are
    assert results["as if prompted"]  # and so are version 2's


def _turns(episode: Episode) -> list[tuple[bool, list[int]]]:
    """Whether the policy wrote it, and its tokens."""
    written = groupby(zip(episode.tokens, episode.versions, strict=True), lambda pair: pair[1] != NOT_SAMPLED)
    return [(sampled, [token for token, _ in turn]) for sampled, turn in written]


def test_turns_are_sampled_given_everything_before_and_only_they_are_trained_on(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    episodes_of_engine = interpreter.call(episodes.examined, tmp_path)
    assert {episode.finish for episode in episodes_of_engine} == {"stop", "turns", "length"}
    batch = assemble(
        episodes_of_engine, [episode.verdict for episode in episodes_of_engine], pad_token_id=TOKENIZER.pad_token_id
    ).batch
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(batch.tokens).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
    counted, log_probs = batch.mask[:, :-1], batch.need("rollout_log_probs")[:, :-1]
    # Log-probabilities that are computed without the environment's tokens would differ by several nats.
    rounding = forward(model.config.num_hidden_layers, model.config.intermediate_size)
    assert_near(log_probs[counted], expected[counted], rounding, scale=logits.abs().max().item(), what="log-probabilities")
    assert not log_probs[~counted].any()

    for row, episode in zip(counted, episodes_of_engine, strict=True):
        turns = _turns(episode)
        written = [tokens for sampled, tokens in turns if sampled]
        texts = [TOKENIZER.decode(tokens).removesuffix("<eos>") for tokens in written]
        assert texts == episode.environment.turns
        answers = [tokens for sampled, tokens in turns if not sampled]
        assert answers == [TOKENIZER.encode(episodes.answer_to(turn)) for turn in texts[:-1]]
        assert int(row.sum()) == sum(map(len, written)) <= episodes.SAMPLING.max_tokens
        assert len(episode.prompt) + len(episode.tokens) <= episodes.SAMPLING.max_context
        assert episode.verdict.reward == len(texts)
        for text in map(TOKENIZER.decode, written[: episode.turns]):
            assert text.endswith(("+", "<eos>"))
            assert not {"+", "<eos>"} & set(TOKENIZER.tokenize(text)[:-1])
