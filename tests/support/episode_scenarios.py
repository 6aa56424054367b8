"""Episodes with an environment on a real vLLM engine, in an interpreter of its own (see `interpreter.py`)."""

from __future__ import annotations

from pathlib import Path

from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.episodes import Episode, EpisodeRunner, SamplingConfig
from mbridge_rl.training.rollout.rewards import Problem

SAMPLING = SamplingConfig(max_tokens=20, seed=1, stop=("+",), max_turns=3, max_context=28)


class Examiner:
    """Says how long the turn was, and is content with a nine."""

    def __init__(self, problem: Problem) -> None:
        self.turns: list[str] = []

    def respond(self, turn: str) -> str | None:
        self.turns.append(turn)
        return None if "9" in turn else answer_to(turn)

    def reward(self) -> float:
        return float(len(self.turns))


def answer_to(turn: str) -> str:
    return f"+{len(turn)}="


def examined(directory: Path) -> list[Episode]:
    """Of a random model."""
    toy.make_checkpoint(directory)
    with InProcessEngine(directory, max_model_len=64, max_num_seqs=32) as engine:
        runner = EpisodeRunner(engine, toy.tokenizer(), SAMPLING, Examiner)
        episodes = [runner.start(Problem("3+4=", "7"), sample) for sample in range(32)]
        runner.run(episodes)
    return episodes
