"""Syncs that carry changes: over every mode and transport, exact, small, and whole where there is nothing to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_samples import SCHEME, grpo, quantized_state
from fused_engine import EngineLayout
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights, served, set_weights
from tiny import hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import DeltaRefused, DigestMismatch, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.payload.messages import DeltaBase, UpdateRequest
from mbridge_rl.sync.payload.wires import FilesWire
from mbridge_rl.sync.trainer.engines import Engines
from mbridge_rl.sync.transports.shared_memory import RingOutlet
from mbridge_rl.sync.weight_sync import SyncOptions, SyncReport, WeightSync
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

pytest.importorskip("zstandard")

WAYS = [("staged", "shared_memory"), ("streaming", "shared_memory"), ("streaming", "process_group"), ("staged", "files")]
ALONE, TP2 = ParallelLayout(), ParallelLayout(tp=2)


def initial() -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in random_weights("qwen3", 1).items()}


def stepped(state: Mapping[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """The state with other values in this share of all elements."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in state.items():
        moved = torch.rand(tensor.shape, generator=generator) < share
        other = (tensor.float() * (1 + torch.randn(tensor.shape, generator=generator) * 2**-6)).to(tensor.dtype)
        changed[name] = torch.where(moved, other, tensor)
    return changed


def random_bits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    bits = {name: torch.randint(-(1 << 15), 1 << 15, tensor.shape, generator=generator) for name, tensor in state.items()}
    return {name: values.to(torch.int16).view(torch.bfloat16) for name, values in bits.items()}


class Run:
    """One trainer rank, and on rank 0 its engines."""

    def __init__(self, rank: int = 0, layout: ParallelLayout = ALONE, engines: int = 1, **fields: Any) -> None:
        self.rank, self.state = rank, initial()
        self.bridge, self.model = light_model("qwen3", layout, rank, self.state)
        self.engines = [StandInEngine(state=self.state) for _ in range(engines)] if rank == 0 else []
        options = SyncOptions(**{"delta": True, "bucket_bytes": 1 << 13, "timeout": 20.0, **fields})
        self.sync_of = WeightSync(self.bridge, self.model, self.engines or None, options=options)
        self.version = 0

    def step(self, share: float) -> None:
        self.state = stepped(self.state, share, seed=self.version)
        set_weights(self.bridge, self.model, self.rank, self.state)

    def sync(self) -> SyncReport:
        self.version += 1
        report = self.sync_of.sync(self.version)
        for engine in self.engines:
            assert engine.generate() == (self.version, served(self.state))
        return report

    def close(self) -> None:
        self.sync_of.close()
        for engine in self.engines:
            engine.close()


def over_every_way(rank: int, url: str) -> None:
    for mode, transport in WAYS:
        run = Run(rank, TP2, engines=2, mode=mode, transport=transport, url=url, nonfinite="pass")
        first = run.sync()
        assert (first.base, first.share) == (None, 1.0)
        run.step(0.01)
        second = run.sync()
        assert (second.base, second.attempts) == (1, 1)
        assert second.share < 0.1
        assert second.digest != first.digest
        third = run.sync()  # nothing changed
        assert third.base == 2
        assert third.share < 0.05
        assert third.digest == second.digest
        run.state = random_bits(run.state)
        set_weights(run.bridge, run.model, rank, run.state)
        assert run.sync().base is None  # the changes would not be smaller than the full weights
        run.step(0.01)
        assert run.sync().base == 4
        if rank == 0:
            digests = sum(worker.buckets[-1].nbytes for worker in run.sync_of.route.workers)
            assert [engine_report["bytes"] for engine_report in second.engines] == [second.nbytes + digests] * 2
        run.close()


def test_every_mode_and_transport_carries_deltas(tmp_path: Path) -> None:
    run_ranks(over_every_way, 2, str(tmp_path), timeout=240)


def test_engines_with_another_baseline_get_everything(name: str) -> None:
    run = Run(engines=2, store=name)
    run.sync()
    run.step(0.01)
    assert run.sync().base == 1
    run.engines[1].__init__(state=initial())  # started again, and caught up with what the delta led to
    run.engines[1].catch_up(f"{name}.1", "/dev/shm")
    run.step(0.01)
    assert run.sync().base == 2

    other = WeightSync(run.bridge, run.model, run.engines[1:] or None, bucket_bytes=1 << 13)
    run.step(0.01)
    other.sync(30)  # one of the engines has other weights now
    other.close()
    run.step(0.01)
    assert run.sync().base is None
    run.step(0.01)
    assert run.sync().base == run.version - 1
    before = run.engines[0].generate()
    receiver = run.engines[0].receivers[0]
    delta = DeltaBase(proofs=("another", "another"), sizes=())
    request = UpdateRequest(6, "a fill", receiver.fingerprint, "staged", FilesWire(url="nowhere"), timeout=1.0, delta=delta)
    with pytest.raises(DeltaRefused, match=r"do not start from what worker 0 holds \(version 5\): a full sync has to come"):
        receiver.begin(request)
    assert run.engines[0].generate() == before
    run.close()


def _unreachable(*_: Any) -> None:
    raise SyncError("not today")


def test_what_fails_is_followed_by_everything_and_advances_nothing() -> None:
    run = Run()
    run.sync()
    run.step(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engines, "begin", _unreachable)
        with pytest.raises(SyncError, match="not today"):
            run.sync()
    run.step(0.01)
    assert run.sync().base == 1  # version 2 never was

    drifted = next(iter(run.engines[0].workers[0].parameters_by_name().values()))
    drifted.view(torch.int16).view(-1)[3] ^= 1  # under their proof
    run.step(0.01)
    report = run.sync()
    assert (report.attempts, report.base) == (2, None)

    send, tears = RingOutlet.send, 0

    def tear(outlet: Any, worker: int, index: int, part: Any) -> None:
        nonlocal tears
        if index == 1 and worker == 0 and tears > 0:
            tears -= 1
            outlet.place(worker, index, part)[20:21].bitwise_xor_(4)
        send(outlet, worker, index, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RingOutlet, "send", tear)
        run.step(0.01)
        tears = 1
        report = run.sync()
        assert (report.attempts, report.base) == (2, None)
        run.step(0.01)
        tears = 2
        with pytest.raises(DigestMismatch):
            run.sync()
    run.step(0.01)
    assert run.sync().base is None  # the torn attempt went whole, and what was held before it is gone
    run.step(0.01)
    assert run.sync().base == run.version - 1
    run.close()
    with pytest.raises(SyncError, match="delta=True needs verify=True"):
        SyncOptions(delta=True, verify=False)


def test_a_hundred_chained_deltas_end_where_a_full_sync_does() -> None:
    run = Run(mode="streaming", bucket_bytes=1 << 20)
    run.sync()
    for version in range(1, 101):
        run.step((0.0, 0.001, 0.02, 0.6)[version % 4])
        run.version = version
        report = (
            run.sync() if version % 10 == 0 else run.sync_of.sync(version + 1)
        )  # the first compares the engine with the state
        assert report.base == version
        assert report.share < (0.01, 0.05, 0.15, 1.0)[version % 4]
    run.close()


def fp8(rank: int) -> None:
    state = initial()
    bridge, model = light_model("qwen3", TP2, rank, state)
    engine = StandInEngine(state=quantized_state(state), layout=EngineLayout(tp=2)) if rank == 0 else None
    sync = WeightSync(bridge, model, engine, quantization=SCHEME, delta=True, bucket_bytes=1 << 13)
    plain = sum(tensor.nbytes for tensor in state.values())
    for version in (1, 2, 3):
        state = stepped(state, 0.002, seed=version)
        set_weights(bridge, model, rank, state)
        report = sync.sync(version)
        assert report.full_nbytes < 0.75 * plain
        assert (report.base, report.share < 0.25) == ((None, False) if version == 1 else (version - 1, True))
        if engine is not None:
            assert engine.generate() == (version, served(quantized_state(state)))
            assert report.engine["digest"] == report.digest
    with pytest.raises(SyncError, match="the engines hold quantized weights"):
        sync.pull()
    sync.close()


def test_weights_are_quantized_before_the_wire() -> None:
    run_ranks(fp8, 2)


def real_steps(rank: int, checkpoint: Path) -> list[SyncReport]:
    """Adam at 1e-6: a weight moves by about 1e-6, and a bf16 number changes if that crosses a rounding boundary."""
    layout = initialize_parallel(TP2)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, dtype=torch.bfloat16)
    bridge.load_weights(model)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-6, micro_batch_size=4))
    state = {name: tensor.bfloat16() for name, tensor in hf_state(checkpoint).items()}
    engine = StandInEngine(state=state, sizes={}) if rank == 0 else None
    sync = WeightSync(bridge, trainer.model, engine, delta=True)
    generator = torch.Generator().manual_seed(0)
    reports = [sync.sync(0)]
    for version in range(1, 5):
        tokens = torch.randint(2, 515, (4, 12), generator=generator)
        trainer.step(Batch.from_completions(tokens[:, :5].tolist(), tokens[:, 5:].tolist(), pad_token_id=0), grpo)
        reports.append(sync.sync(version))
    sync.close()
    return reports


def test_real_steps_in_bf16_move_a_small_share(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint(tmp_path, "qwen3")
    first, *others = run_ranks(real_steps, 2, checkpoint)[0]
    assert first.share == 1.0
    for version, report in enumerate(others):
        assert report.base == version
        assert report.share < 0.05
        assert report.engine["digest"] == report.digest
    assert len({report.digest for report in (first, *others)}) == 5
