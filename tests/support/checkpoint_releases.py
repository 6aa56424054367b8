"""A training checkpoint that one interpreter writes and another resumes: what each of them holds, as plain tensors.

    python checkpoint_releases.py save|resume CASE MODEL_DIRECTORY CHECKPOINT_DIRECTORY RESULT_FILE

Run as a program, because the two interpreters have different releases of Megatron-core (`test_checkpoint_releases.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.checkpoint.saved_state import load_checkpoint, save_checkpoint
from mbridge_rl.training.checkpoint.tensors import TrainerTensors
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

# The layout, the trainer's options and those of `build_model`.
CASES: dict[str, tuple[ParallelLayout, dict[str, Any], dict[str, Any]]] = {
    "one-rank": (ParallelLayout(), {}, {}),
    "sharded-bf16": (ParallelLayout(dp=2), {"distributed_optimizer": True}, {"dtype": torch.bfloat16}),
}


def _batch(seed: int) -> Batch:
    rows = torch.randint(2, 515, (4, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return Batch.from_completions([row[:3] for row in rows], [row[3:] for row in rows], pad_token_id=0)


def _trainer(source: Path, case: str) -> MegatronTrainer:
    layout, options, build = CASES[case]
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(source)
    model = bridge.build_model(layout, **build)
    bridge.load_weights(model)
    return MegatronTrainer(model, TrainerConfig(learning_rate=1e-3, epsilon=1e-3, micro_batch_size=2, **options))


def _state(trainer: MegatronTrainer, source: Path) -> dict[str, Tensor]:
    """The weights, masters and moments of this rank, by name."""
    state = {f"weight.{name}": weight for name, weight in AutoBridge.from_pretrained(source).export_weights(trainer.model)}
    with megatron_runtime():
        shards = TrainerTensors(trainer).shards()
    for key, pieces in shards.items():
        state |= {f"{key}.{index}": piece.data.clone() for index, piece in enumerate(pieces)}
    return state


def _steps(trainer: MegatronTrainer, first: int, last: int) -> list[float]:
    return [trainer.step(_batch(seed), supervised_loss).loss for seed in range(first, last)]


def save(rank: int, case: str, source: Path, directory: Path) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Three steps and a checkpoint; what it holds, the next random numbers, and the losses of two further steps."""
    trainer = _trainer(source, case)
    _steps(trainer, 0, 3)
    save_checkpoint(trainer, directory, 3, state={"drawn": torch.arange(3), "epoch": 1})
    return _state(trainer, source), torch.rand(3), _steps(trainer, 3, 5)


def resume(rank: int, case: str, source: Path, directory: Path) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """The same values, from the checkpoint."""
    trainer = _trainer(source, case)
    loaded = load_checkpoint(trainer, directory)
    assert loaded.step == 3
    assert loaded.state["epoch"] == 1
    assert loaded.state["drawn"].tolist() == [0, 1, 2]
    return _state(trainer, source), torch.rand(3), _steps(trainer, 3, 5)


if __name__ == "__main__":
    action, case, source, directory, result = sys.argv[1:]
    function = {"save": save, "resume": resume}[action]
    torch.save(run_ranks(function, CASES[case][0].world_size, case, Path(source), Path(directory)), result)
