"""Checkpoints: the run goes on as if nothing had happened, on the same layout bit for bit, on any other up to rounding."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run_ranks
from tiny import DENSE as SIZES
from tiny import hf_state, saved_model
from tolerance import assert_near, assert_trained_near, backward, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.hf.publish import Replacement
from mbridge_rl.megatron.lora.attach import LoRAConfig, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.checkpoint.saved_state import latest_checkpoint, load_checkpoint, save_checkpoint
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

DENSE, TIED, MOE = "qwen3", "qwen3-tied", "qwen3-moe"
SCHEDULE = {"schedule": "cosine", "warmup_steps": 2, "decay_steps": 9, "min_learning_rate": 1e-4}
SHARDED = {"distributed_optimizer": True}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training_checkpoint")


STEPS = 5
FORWARD, BACKWARD = (of(SIZES["num_hidden_layers"], SIZES["intermediate_size"]) for of in (forward, backward))


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, 515, (4, 9), generator=generator).tolist()
    return Batch.from_completions([row[:3] for row in rows], [row[3:] for row in rows], pad_token_id=0)


def _trainer(
    source: Path, layout: Layout, config: dict[str, Any], build: dict[str, Any] | None = None, lora: LoRAConfig | None = None
) -> MegatronTrainer:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(source)
    model = bridge.build_model(layout, **(build or {}))
    bridge.load_weights(model)
    if lora is not None:
        add_lora(model, lora)
    # An epsilon far above the rounding of gradients, so that weights depend on them smoothly.
    settings = {"learning_rate": 1e-3, "epsilon": 1e-3, "micro_batch_size": 2, **SCHEDULE, **config}
    return MegatronTrainer(model, TrainerConfig(**settings))


def _steps(trainer: MegatronTrainer, first: int, last: int) -> list[tuple[float, float]]:
    reports = [trainer.step(_batch(seed), supervised_loss) for seed in range(first, last)]
    return [(report.loss, report.learning_rate) for report in reports]


def _weights(trainer: MegatronTrainer, source: Path) -> dict[str, Tensor]:
    return dict(AutoBridge.from_pretrained(source).export_weights(trainer.model))


Case = tuple[Layout, dict[str, Any], dict[str, Any]]


def _save(rank: int, source: Path, case: Case, directory: Path, lora: LoRAConfig | None) -> Any:
    """Three steps, a checkpoint, and two steps more without it."""
    layout, config, build = case
    trainer = _trainer(source, layout, config, build, lora)
    _steps(trainer, 0, 3)
    save_checkpoint(trainer, directory, 3, state={"drawn": torch.arange(3), "epoch": 1})
    draws = torch.rand(3)
    curve = _steps(trainer, 3, 5)
    return curve, _weights(trainer, source), draws


def _resume(rank: int, source: Path, case: Case, directory: Path, lora: LoRAConfig | None) -> Any:
    layout, config, build = case
    trainer = _trainer(source, layout, config, build, lora)
    loaded = load_checkpoint(trainer, directory)
    assert loaded.step == 3
    assert loaded.state["drawn"].tolist() == [0, 1, 2]
    assert loaded.state["epoch"] == 1
    draws = torch.rand(3)
    curve = _steps(trainer, 3, 5)
    return curve, _weights(trainer, source), draws


ONE: Case = (Layout(), {}, {})
SAME: list[tuple[str, Case]] = [
    (TIED, ONE),
    (TIED, (Layout(pp=2, vpp=2), {}, {})),
    (TIED, (Layout(dp=2), SHARDED, {"dtype": torch.bfloat16})),
    (TIED, (Layout(tp=2), {}, {"dtype": torch.bfloat16})),
    (MOE, (Layout(dp=2, ep=2), SHARDED, {})),
]
OTHER: list[tuple[str, Case, Case]] = [
    (DENSE, ONE, (Layout(tp=2), {}, {})),  # the vocabulary is padded to another size
    (TIED, (Layout(pp=2, vpp=2), {}, {}), (Layout(dp=2), SHARDED, {})),
    (TIED, (Layout(dp=2), SHARDED, {}), (Layout(tp=2, cp=2), {}, {"sequence_parallel": True})),
    (MOE, (Layout(dp=2, ep=2), SHARDED, {}), (Layout(tp=2, ep=2, etp=1), {}, {})),
    (MOE, (Layout(tp=2, etp=1), {}, {"grouped_experts": False}), (Layout(pp=2), {}, {})),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "case"), SAME, ids=str)
def test_the_same_layout_goes_on_bit_for_bit(variant: str, case: Case, scratch: Path, tmp_path: Path) -> None:
    source = saved_model(variant, scratch)
    saved = run_ranks(_save, case[0].world_size, source, case, tmp_path, None)
    resumed = run_ranks(_resume, case[0].world_size, source, case, tmp_path, None)
    for (curve, _, draws), (curve_again, _, draws_again) in zip(saved, resumed, strict=True):
        assert curve_again == curve
        assert torch.equal(draws_again, draws)  # random states, too
    assert saved[0][1].keys() == resumed[0][1].keys()
    assert all(torch.equal(resumed[0][1][name], weight) for name, weight in saved[0][1].items())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "before", "after"), OTHER, ids=str)
def test_another_layout_goes_on(variant: str, before: Case, after: Case, scratch: Path, tmp_path: Path) -> None:
    source = saved_model(variant, scratch)
    curve, weights, _ = run_ranks(_save, before[0].world_size, source, before, tmp_path, None)[0]
    resumed, resumed_weights, _ = run_ranks(_resume, after[0].world_size, source, after, tmp_path, None)[0]
    assert [rate for _, rate in resumed] == [rate for _, rate in curve]
    # Without Adam's moments the second loss is off by percents.
    assert_near([loss for loss, _ in resumed], [loss for loss, _ in curve], FORWARD, what="losses")
    start = hf_state(source)
    for name, weight in weights.items():
        assert_trained_near(resumed_weights[name], weight, start[name], BACKWARD, updates=STEPS, what=name)


def test_another_layout_draws_what_follows_from_seed_and_step(scratch: Path, tmp_path: Path) -> None:
    """Dropout goes on: the same whenever the run is continued, and not as it began."""
    source, lora, case = saved_model(DENSE, scratch), LoRAConfig(rank=4, dropout=0.5), (Layout(tp=2), {}, {})
    run_ranks(_save, 1, source, ONE, tmp_path, lora)
    first = run_ranks(_resume, 2, source, case, tmp_path, lora)
    again = run_ranks(_resume, 2, source, case, tmp_path, lora)
    for (curve, _, draws), (curve_again, _, draws_again) in zip(first, again, strict=True):
        assert curve_again == curve
        assert torch.equal(draws_again, draws)
    unbroken = run_ranks(_drawn_at_the_start, 2, source, lora)
    assert not torch.equal(unbroken[0], first[0][2])


def _drawn_at_the_start(rank: int, source: Path, lora: LoRAConfig) -> Tensor:
    _trainer(source, Layout(tp=2), {}, None, lora)
    return torch.rand(3)


def test_adapters_alone_are_saved(scratch: Path, tmp_path: Path) -> None:
    """With what some adapters have beside their factors: magnitudes, which train, and first factors, which don't."""
    source, lora = saved_model(DENSE, scratch), LoRAConfig(rank=4, dora=True, start="olora")
    case, other = (Layout(tp=2), {}, {}), (Layout(dp=2), SHARDED, {})
    saved = run_ranks(_save, 2, source, case, tmp_path, lora)
    resumed = run_ranks(_resume, 2, source, case, tmp_path, lora)
    assert resumed[0][0] == saved[0][0]
    assert all(torch.equal(resumed[0][1][name], weight) for name, weight in saved[0][1].items())
    moved = run_ranks(_resume, 2, source, other, tmp_path, lora)
    assert_near([loss for loss, _ in moved[0][0]], [loss for loss, _ in saved[0][0]], FORWARD, what="losses")
    size = sum(file.stat().st_size for file in (tmp_path / "step_00000003").iterdir())
    assert size < 3 * sum(weight.nbytes for weight in saved[0][1].values())  # which would have moments, too
    with pytest.raises(RankError, match="holds the adapters of another model, or of other adapters"):
        run_ranks(_resume, 2, source, case, tmp_path, LoRAConfig(rank=8))
    with pytest.raises(RankError, match="holds the adapters of another model"):
        run_ranks(_resume, 2, source, case, tmp_path, None)


def _before_the_first_step(rank: int, source: Path, directory: Path) -> list[Any]:
    trainer = _trainer(source, Layout(), {})
    save_checkpoint(trainer, directory, 0)
    assert load_checkpoint(trainer, directory).step == 0
    return _steps(trainer, 0, 2)


def test_a_run_can_be_saved_before_it_begins(scratch: Path, tmp_path: Path) -> None:
    source = saved_model(DENSE, scratch)
    expected = run_ranks(lambda rank: _steps(_trainer(source, Layout(), {}), 0, 2), 1)
    assert run_ranks(_before_the_first_step, 1, source, tmp_path) == expected


def _die_in_the_middle(rank: int, source: Path, directory: Path) -> None:
    import os
    import signal

    from mbridge_rl.training.checkpoint import saved_state as checkpoint

    trainer = _trainer(source, Layout(tp=2), {})
    save_checkpoint(trainer, directory, 1)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Replacement.publish = killed  # all bytes are there, the name is not
    save_checkpoint(trainer, directory, 2)


def test_an_interrupted_save_is_no_checkpoint(scratch: Path, tmp_path: Path) -> None:
    source = saved_model(DENSE, scratch)
    with pytest.raises(RankError, match="died with status 9"):
        run_ranks(_die_in_the_middle, 2, source, tmp_path)
    assert len(list(tmp_path.glob(".step_00000002.*.incomplete"))) == 1
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"

    def go_on(rank: int) -> int:
        trainer = _trainer(source, Layout(tp=2), {})
        step = load_checkpoint(trainer, tmp_path).step
        for later in (2, 3, 4):
            save_checkpoint(trainer, tmp_path, later, keep=2)
        return step

    assert run_ranks(go_on, 2) == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def _damage(rank: int, source: Path, directory: Path, what: str) -> str:
    """Rank 1 damages what it wrote, before it is read back."""
    from mbridge_rl.training.checkpoint import saved_state as checkpoint

    trainer = _trainer(source, Layout(tp=2), {})
    save_checkpoint(trainer, directory, 1)
    real = checkpoint._save

    def damaged(content: dict[str, Any], partial: Path) -> None:
        real(content, partial)
        if rank == 1:
            (file,) = partial.glob("__1_*.distcp")
            bytes_of = bytearray(file.read_bytes())
            tensor = next(iter(content["tensors"].values()))[0].data
            if what == "a bit":
                bytes_of[bytes_of.index(tensor.numpy().tobytes())] ^= 1
            file.write_bytes(bytes_of if what == "a bit" else bytes_of[:-1000])

    checkpoint._save = damaged
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(trainer, directory, 2, keep=1)
    return str(refused.value)


@pytest.mark.parametrize("what", ["a bit", "the end"])
def test_what_reads_back_as_something_else_is_no_checkpoint(what: str, scratch: Path, tmp_path: Path) -> None:
    for text in run_ranks(_damage, 2, saved_model(DENSE, scratch), tmp_path, what):
        assert ("reads back as something else than was written" if what == "a bit" else "cannot be read back") in text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def _wait_in_vain(rank: int, source: Path, directory: Path) -> str:
    from mbridge_rl.hf import lock

    lock.LOCK_SECONDS = 0.2
    trainer = _trainer(source, Layout(tp=2), {})
    with pytest.raises(CheckpointError) as refused:
        save_checkpoint(trainer, directory, 1)
    return str(refused.value)


def test_two_runs_that_save_into_one_directory(scratch: Path, tmp_path: Path) -> None:
    """Whatever step the other one saves."""
    other = Replacement(tmp_path / "step_00000007", lock=tmp_path / ".saving.lock")
    other.begin()
    for text in run_ranks(_wait_in_vain, 2, saved_model(DENSE, scratch), tmp_path):
        assert f"process {os.getpid()} on" in text
    assert other.path.is_dir()
    other.end()
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_say_what_is_wrong(scratch: Path, tmp_path: Path) -> None:
    source, other = saved_model(DENSE, scratch), saved_model(TIED, scratch)
    with pytest.raises(RankError, match="is no training checkpoint and holds none"):
        run_ranks(_resume, 1, source, ONE, tmp_path, None)
    assert latest_checkpoint(tmp_path / "nowhere") is None
    run_ranks(_save, 1, source, ONE, tmp_path, None)
    with pytest.raises(RankError, match="holds the weights of another model"):
        run_ranks(_resume, 1, other, ONE, tmp_path, None)
    with pytest.raises(RankError, match="exists already"):
        run_ranks(_save, 1, source, ONE, tmp_path, None)
    for file in (tmp_path / "step_00000003").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RankError, match="cannot load"):
        run_ranks(_resume, 1, source, ONE, tmp_path, None)


def _fill_the_disk(rank: int, source: Path, directory: Path, full_on: tuple[int, ...]) -> Any:
    """Writes beyond a few hundred bytes of a file fail, as on a full disk."""
    trainer = _trainer(source, Layout(dp=2), SHARDED)
    _steps(trainer, 0, 1)
    save_checkpoint(trainer, directory, 1)
    curve = _steps(trainer, 1, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank in full_on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*step_00000002"):
            save_checkpoint(trainer, directory, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest_checkpoint(directory) == directory / "step_00000001"
    load_checkpoint(trainer, directory)
    assert _steps(trainer, 1, 2) == curve
    return save_checkpoint(trainer, directory, 2, keep=1)


@pytest.mark.parametrize("full_on", [(0, 1), (1,)], ids=["everywhere", "on-one-rank"])
def test_a_full_disk_leaves_the_checkpoint_before_valid(full_on: tuple[int, ...], scratch: Path, tmp_path: Path) -> None:
    run_ranks(_fill_the_disk, 2, saved_model(TIED, scratch), tmp_path, full_on)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
