"""The training loop with a trainer that makes room while engines sample: nothing changes, also where an engine is lost then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from scripted_engine import WritingEngine, hashed

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import EngineProcessError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.vllm.engines.in_process import Completion
from mbridge_rl.training.loop import GRPO, LoopHooks, train
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.batches import RolloutSource
from mbridge_rl.training.rollout.episodes import EpisodeRunner, SamplingConfig
from mbridge_rl.training.rollout.generator import Generator, GeneratorConfig
from mbridge_rl.training.rollout.rewards import InProcessJudge, Problem
from mbridge_rl.training.rollout.sampler import EpochSampler
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

STEPS, TOKENIZER = 3, toy.tokenizer()
PROBLEMS = [Problem(f"{a}+{b}=", str(a + b)) for a in range(4) for b in range(3)]
CURVE = ("step", "reward", "loss", "grad_norm", "accuracy", "digest")


class WatchingFleet:
    """In the place of engines: writes what a script says, notes whether the trainer is there, is lost at every other call."""

    def __init__(self, trainer: MegatronTrainer, bridge: AutoBridge, *, fails: bool) -> None:
        self._trainer, self._bridge, self._fails = trainer, bridge, fails
        self._writer = WritingEngine(hashed(12, TOKENIZER.eos_token_id, 6), version=0)
        self.lost = 0
        self.held: list[int] = []  # bytes of the trainer, whenever an engine samples

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        tensors = [*self._trainer.model[0].parameters(), *(buffer.grad_data for buffer in self._trainer.model[0].buffers)]
        self.held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        if self._fails and len(self.held) % 2:
            raise EngineProcessError("the engine died")
        return self._writer.generate(prompts, **options)

    def sync(self, version: int) -> Any:
        weights = dict(self._bridge.export_weights(self._trainer.model))  # only a trainer that is there has them
        self._writer.version = version
        total = sum(tensor.double().sum().item() for tensor in weights.values())
        return SimpleNamespace(seconds=0.0, digest=total, verified=True, share=1.0, failed={})

    def replace_lost(self, version: int, error: Exception) -> Any:
        self.lost += 1
        return self.sync(version)


def _run(rank: int, checkpoint: Path, offload: str, fails: bool) -> tuple[list[Any], list[int], int]:
    layout = initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-3, micro_batch_size=4, offload=offload))
    fleet = WatchingFleet(trainer, bridge, fails=fails)
    runner = generator = None
    if rank == 0:
        runner = EpisodeRunner(fleet, TOKENIZER, SamplingConfig(max_tokens=5))
        judge = InProcessJudge(lambda problem, completion: float(len(completion)))
        generator = Generator(runner, EpochSampler(PROBLEMS, seed=1), judge, GeneratorConfig(3, 4, STEPS))
    source = RolloutSource(
        fleet,  # type: ignore[arg-type]
        generator=generator,
        runner=runner,
        pad_token_id=TOKENIZER.pad_token_id,
        out_of_the_way=trainer.out_of_the_way,
    )
    history: list[Any] = []

    def evaluate(step: int) -> float:
        return sum(reward for _, reward in source.evaluate(PROBLEMS[:2])) / 2

    hooks = LoopHooks(
        evaluate, lambda step: None, lambda metrics, _: history.append([metrics[name] for name in CURVE]), lambda _: False
    )
    train(GRPO(trainer, GRPOConfig(group_size=4)), source, fleet, hooks, first_step=1, last_step=STEPS)  # type: ignore[arg-type]
    source.close()
    return history, fleet.held, fleet.lost


@pytest.mark.parametrize(
    ("offload", "fails"),
    [("{folder}", False), ("{folder}", True), ("host", False)],
    ids=["into-files", "into-files-and-engines-lost", "into-host-memory"],
)
def test_a_trainer_out_of_the_way_learns_the_same(offload: str, fails: bool, tmp_path: Path) -> None:
    checkpoint = toy.make_checkpoint(tmp_path / "qwen3")
    torch.set_num_threads(1)
    expected = run_ranks(_run, 2, checkpoint, "none", False)
    offloaded = run_ranks(_run, 2, checkpoint, offload.format(folder=tmp_path / "away"), fails)
    assert [history for history, _, _ in offloaded] == [history for history, _, _ in expected]
    assert len(expected[0][0]) == STEPS
    assert min(expected[0][1]) > 100_000
    assert (offloaded[0][2] > 3) == fails
    # With "host" the weights stay in host memory and only the gradients, which are as large here, are freed. Sampling may begin
    # a moment before that.
    left = expected[0][1][0] // 2 if offload == "host" else 0
    assert offloaded[0][1].count(left) >= len(offloaded[0][1]) // 2
    assert not list((tmp_path / "away").rglob("*.bin"))
