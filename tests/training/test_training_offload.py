"""A trainer that was offloaded in between ends up with the very bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_model
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.checkpoint.saved_state import save_checkpoint
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig
from mbridge_rl.training.trainer.optimizer_state import parameter_states


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offload")
    tiny_model("qwen3-tied").save_pretrained(directory)
    return directory


def _trainer(source: Path, layout: Layout, dtype: torch.dtype, sharded: bool) -> MegatronTrainer:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(source)
    model = bridge.build_model(layout, dtype=dtype)
    bridge.load_weights(model)
    config = TrainerConfig(learning_rate=1e-3, micro_batch_size=2, distributed_optimizer=sharded)
    return MegatronTrainer(model, config)


def _batch(seed: int) -> Batch:
    rows = torch.randint(2, 515, (4, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return Batch.from_completions([row[:3] for row in rows], [row[3:] for row in rows], pad_token_id=0)


def _held(trainer: MegatronTrainer) -> list[Tensor]:
    states = parameter_states(trainer.optimizer).values()
    optimizer_tensors = [tensor for state in states for tensor in (state.master, *state.moments.values())]
    return [tensor.detach().clone() for tensor in (*trainer.model[0].parameters(), *optimizer_tensors)]


def _run(rank: int, source: Path, layout: Layout, dtype: torch.dtype, sharded: bool, directory: Path | None) -> Any:
    trainer = _trainer(source, layout, dtype, sharded)
    trainer.step(_batch(0), supervised_loss)
    freed = None
    if directory is not None:
        directory = directory / str(rank)  # what is counted below is this rank's own
        before = _held(trainer)
        grads = [buffer.grad_data for buffer in trainer.model[0].buffers]
        with trainer.offloaded(directory=directory) as freed:
            assert all(grad.untyped_storage().nbytes() == 0 for grad in grads)
            masters = [state.master for state in parameter_states(trainer.optimizer).values()]
            assert all(master.untyped_storage().nbytes() == 0 for master in masters)
            files = sum(file.stat().st_size for file in directory.rglob("*.bin"))
            with pytest.raises(RuntimeError, match="the trainer is offloaded"):
                trainer.step(_batch(1), supervised_loss)
            with pytest.raises(RuntimeError, match="the trainer is offloaded"):
                trainer.compute_log_probs(_batch(1))
            with pytest.raises(RuntimeError, match="the trainer is offloaded"):
                save_checkpoint(trainer, directory / "checkpoints", 1)
            with pytest.raises(StateMismatchError, match="has shape"):  # an export says so, too
                dict(AutoBridge.from_pretrained(source).export_weights(trainer.model))
            if layout.world_size == 1:
                assert files == freed.weights + freed.optimizer
        assert not list(directory.rglob("*.bin"))
        assert all(torch.equal(a, b) for a, b in zip(before, _held(trainer), strict=True))
        assert not any(grad.any() for grad in grads)
        element = dtype.itemsize
        count = sum(parameter.numel() for parameter in trainer.model[0].parameters())
        assert freed.weights >= count * element
        assert freed.gradients >= count * 4
        # Adam's two moments and, in half precision, the masters; shared among data-parallel ranks
        assert freed.optimizer >= count * (8 if element == 4 else 12) / (layout.dp if sharded else 1) * 0.9
    reports = [trainer.step(_batch(seed), supervised_loss) for seed in (1, 2)]
    return [(report.loss, report.grad_norm) for report in reports], _held(trainer)


@pytest.mark.parametrize(
    ("layout", "dtype", "sharded"),
    [(Layout(), torch.float32, False), (Layout(dp=2), torch.float32, True), (Layout(dp=2), torch.bfloat16, True)],
    ids=str,
)
def test_nothing_changes_by_having_been_away(
    source: Path, layout: Layout, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    expected = run_ranks(_run, layout.world_size, source, layout, dtype, sharded, None)
    offloaded = run_ranks(_run, layout.world_size, source, layout, dtype, sharded, tmp_path)
    for (curve, held), (curve_again, held_again) in zip(expected, offloaded, strict=True):
        assert curve_again == curve
        assert all(torch.equal(a, b) for a, b in zip(held, held_again, strict=True))


def _on_the_cpu(rank: int, source: Path, nowhere: Path) -> None:
    trainer = _trainer(source, Layout(), torch.float32, False)
    trainer.step(_batch(0), supervised_loss)
    with trainer.offloaded() as freed:  # weights and optimizer have nowhere to go
        assert (freed.weights, freed.optimizer) == (0, 0)
        assert freed.gradients > 0
        dict(AutoBridge.from_pretrained(source).export_weights(trainer.model))  # weights are where they were
    trainer.step(_batch(1), supervised_loss)
    nowhere.write_text("a file, no directory")
    before = _held(trainer)
    with pytest.raises(OSError, match="nowhere"), trainer.offloaded(directory=nowhere):
        raise AssertionError("not reached")
    assert all(torch.equal(a, b) for a, b in zip(before, _held(trainer), strict=True))
    trainer.step(_batch(1), supervised_loss)
    with trainer.offloaded(directory=nowhere.parent), pytest.raises(RuntimeError, match="offloaded"), trainer.offloaded():
        raise AssertionError("not reached")


def test_without_a_directory_a_cpu_drops_gradients_only(source: Path, tmp_path: Path) -> None:
    run_ranks(_on_the_cpu, 1, source, tmp_path / "nowhere")
