"""Deltas: exact for every dtype, small after a real step, chained, and refused whole where anything is wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import tiny_checkpoint, tiny_config
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core import delta, virtual
from mbridge_rl.core.delta import Difference, Kind
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.plan import Plan, View, compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.parameters import live_side
from mbridge_rl.sync.delta import DeltaReceiver, DeltaSender, unframed
from mbridge_rl.sync.delta_log import DeltaLog
from mbridge_rl.sync.errors import DeltaRefused, SyncError
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.logprobs import TokenStatistics
from mbridge_rl.training.trainer import MegatronTrainer, TrainerConfig

pytest.importorskip("zstandard")

DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaNs and infinities among them."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(delta.integers(a.contiguous()), delta.integers(b.contiguous()))


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 7), min_size=0, max_size=4),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(0, 1 << 20),
)
def test_differences_lead_there_and_back(dtype: torch.dtype, sizes: list[int], share: float, seed: int) -> None:
    shape = tuple(sizes)
    old, other = _random(shape, dtype, seed), _random(shape, dtype, seed + 1)
    changed = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    new = torch.where(changed, delta.integers(other), delta.integers(old)).view(dtype)
    found = delta.difference(old, new)
    assert (found.kind is Kind.SAME) == _same_bits(old, new)
    # in a larger tensor, as a view of any strides: what lies between stays
    order = random.Random(seed).sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), 2
    for dim in order:
        strides[dim] = step
        step *= shape[dim] + 1
    view, whole = View("", 3, tuple(strides)), _random((step + 8,), dtype, seed + 2)
    before = whole.clone()
    delta.integers(view.of(whole, shape)).copy_(delta.integers(old))
    start = whole.clone()
    delta.apply(found, view, shape, whole)
    assert _same_bits(view.of(whole, shape), new)
    delta.apply(found, view, shape, whole)
    assert _same_bits(whole, start)
    delta.integers(view.of(whole, shape)).copy_(delta.integers(view.of(before, shape)))
    assert _same_bits(whole, before)


def test_differences_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match="kind SPARSE has 5 bytes, expected 6"):
        Difference(Kind.SPARSE, 1, b"\0" * 5).values((4,), torch.bfloat16)
    with pytest.raises(ValueError, match="positions reach 9 in a rectangle of 4"):
        Difference(Kind.SPARSE, 1, b"\x09\0\0\0" + b"\0\0").values((4,), torch.bfloat16)
    with pytest.raises(ValueError, match="kind XOR has 7 bytes, expected 8"):
        Difference(Kind.XOR, 4, b"\0" * 7).values((4,), torch.bfloat16)


# Between layouts, on virtual ranks.

TRAINER, ENGINE = ParallelLayout(tp=2, pp=2), ParallelLayout(tp=4)


class Ends:
    """All senders and receivers of a plan between two layouts, and their tensors."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.spec = model_spec(tiny_config("qwen3", num_hidden_layers=2))
        self.dtypes = self.spec.hf_dtypes(dtype)
        self._imports: dict[ParallelLayout, tuple[Plan, Side]] = {}
        self.source, self.target = megatron_side(self.spec, TRAINER), megatron_side(self.spec, ENGINE)
        self.plan: Plan = compile_plan(self.spec, self.source, self.target)
        self.senders = {rank: DeltaSender(self.plan, rank, self.dtypes) for rank in range(TRAINER.world_size)}
        self.receivers = {rank: DeltaReceiver(self.plan, rank, self.dtypes) for rank in range(ENGINE.world_size)}
        self.live = {rank: virtual.allocate(self.target.on(rank), self.dtypes) for rank in self.receivers}
        for tensors in self.live.values():
            for tensor in tensors.values():
                tensor.zero_()
        self.state = {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
            for name, shape in self.spec.hf_shapes.items()
        }

    def shards(self) -> dict[int, dict[str, Tensor]]:
        return self._sharded(TRAINER)

    def expected(self) -> dict[int, dict[str, Tensor]]:
        return self._sharded(ENGINE)

    def encode(self, version: int, **options: Any) -> dict[int, list[bytes]]:
        """Messages by target rank."""
        messages: dict[int, list[bytes]] = {rank: [] for rank in self.receivers}
        shards = self.shards()
        for rank, sender in self.senders.items():
            for target, message in sender.encode(shards[rank], version, **options).items():
                messages[target].append(message)
        return messages

    def sync(self, version: int, **options: Any) -> int:
        """Encodes, applies and commits; returns the bytes of all messages."""
        messages = self.encode(version, **options)
        for rank, receiver in self.receivers.items():
            assert receiver.apply(messages[rank], self.live[rank]) == version
        for sender in self.senders.values():
            sender.commit(version)
        return sum(len(message) for of_rank in messages.values() for message in of_rank)

    def step(self, share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in self.state.items():
            moved = torch.rand(tensor.shape, generator=generator) < share
            factor = 1 + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 2**-7
            self.state[name] = torch.where(moved, tensor * factor, tensor)

    def assert_equal(self) -> None:
        for rank, tensors in self.expected().items():
            for name, tensor in tensors.items():
                assert _same_bits(self.live[rank][name], tensor), (rank, name)

    def _sharded(self, layout: ParallelLayout) -> dict[int, dict[str, Tensor]]:
        plan, side = self._import(layout)
        shards = {rank: virtual.allocate(side.on(rank), self.dtypes) for rank in range(layout.world_size)}
        virtual.run(plan, {0: self.state}, shards)
        return shards

    def _import(self, layout: ParallelLayout) -> tuple[Plan, Side]:
        if layout not in self._imports:
            side = megatron_side(self.spec, layout)
            self._imports[layout] = compile_plan(self.spec, hf_side(self.spec), side), side
        return self._imports[layout]


@pytest.mark.slow
def test_a_hundred_chained_deltas_end_where_a_full_sync_does() -> None:
    ends = Ends()
    full = ends.sync(0)
    ends.assert_equal()
    for version in range(1, 101):
        ends.step(share=(0.0, 0.001, 0.02, 0.6)[version % 4], seed=version)
        sent = ends.sync(version)
        assert sent < full
        if version % 4 == 1:
            assert sent < 0.05 * full
    ends.assert_equal()
    other = Ends()
    other.state = ends.state
    other.sync(100)
    for rank, tensors in other.live.items():
        assert all(_same_bits(ends.live[rank][name], tensor) for name, tensor in tensors.items())


def test_what_would_not_be_smaller_goes_whole() -> None:
    ends = Ends(torch.float32)
    full = ends.sync(0)
    ends.state = {name: _random(tuple(tensor.shape), torch.float32, 7) for name, tensor in ends.state.items()}
    assert ends.sync(1) < 1.01 * full  # headers alone
    ends.assert_equal()


def test_baselines_advance_on_commit_alone() -> None:
    ends = Ends()
    ends.sync(0)
    ends.step(0.01, seed=1)
    lost = ends.encode(1)
    with pytest.raises(SyncError, match="version 1 was neither committed nor aborted"):
        ends.encode(2)
    with pytest.raises(SyncError, match="version 2 cannot be committed: encoded last was 1"):
        ends.senders[0].commit(2)
    for sender in ends.senders.values():
        sender.abort()
    ends.step(0.01, seed=2)
    ends.sync(2)  # from version 0
    ends.assert_equal()
    before = {rank: {name: tensor.clone() for name, tensor in tensors.items()} for rank, tensors in ends.live.items()}
    with pytest.raises(DeltaRefused, match="leads from version 0 to 1, and version 2 is here: ask for a full sync"):
        ends.receivers[0].apply(lost[0], ends.live[0])
    assert all(_same_bits(ends.live[0][name], tensor) for name, tensor in before[0].items())


def test_whatever_is_wrong_is_refused_before_anything_changes() -> None:
    ends = Ends()
    ends.sync(0)
    ends.step(0.02, seed=1)
    messages = ends.encode(1)[0]
    receiver, live = ends.receivers[0], ends.live[0]
    before = {name: tensor.clone() for name, tensor in live.items()}

    def refused(given: list[bytes], message: str) -> None:
        with pytest.raises(DeltaRefused, match=message):
            receiver.apply(given, live)
        assert receiver.version == 0
        assert all(_same_bits(live[name], tensor) for name, tensor in before.items())

    generator = random.Random(0)
    for _ in range(200):  # any flipped bit, anywhere
        torn = bytearray(messages[0])
        torn[generator.randrange(len(torn))] ^= 1 << generator.randrange(8)
        refused([bytes(torn), *messages[1:]], "damaged")
    for length in (0, 3, 7, 50, len(messages[0]) // 2, len(messages[0]) - 1):
        refused([messages[0][:length], *messages[1:]], "damaged")
    refused(messages[1:], r"expected messages from source ranks \[0, 1, 2, 3\] to 0, found \[\(1, 0\), \(2, 0\), \(3, 0\)\]")
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    live[name].view(torch.int16)[3, 3] ^= 1  # the weights here drifted
    before[name] = live[name].clone()
    refused(messages, r"the weights here are not version 0 as rank \d knows it: ask for a full sync")
    live[name].view(torch.int16)[3, 3] ^= 1
    assert receiver.apply(messages, live) == 1
    with pytest.raises(DeltaRefused, match="leads from version 0 to 1, and version 1 is here"):
        receiver.apply(messages, live)


def test_another_history_and_another_plan_are_refused() -> None:
    ends, others = Ends(), Ends()
    ends.sync(0)
    others.state = {name: tensor * 2 for name, tensor in others.state.items()}
    others.sync(0)
    others.step(0.01, seed=1)
    with pytest.raises(DeltaRefused, match="to version 1 continues another history: ask for a full sync"):
        ends.receivers[0].apply(others.encode(1)[0], ends.live[0])
    newcomer = DeltaReceiver(ends.plan, 0, ends.dtypes)
    ends.step(0.01, seed=1)
    with pytest.raises(DeltaRefused, match="leads from version 0 to 1, and version None is here"):
        newcomer.apply(ends.encode(1)[0], ends.live[0])
    for sender in ends.senders.values():
        sender.abort()
    ends.sync(1, full=True)
    ends.assert_equal()
    ends.step(0.01, seed=2)
    ends.sync(2)
    ends.assert_equal()
    backwards = compile_plan(ends.spec, ends.target, ends.source)
    stranger = DeltaReceiver(backwards, 0, ends.dtypes)
    with pytest.raises(DeltaRefused, match=r"expected messages from|is of plan"):
        stranger.apply(ends.encode(3)[0], ends.shards()[0])


def _publish(ends: Ends, log: DeltaLog, version: int, **options: Any) -> None:
    base = None if options else ends.senders[0].version
    shards = ends.shards()
    for rank, sender in ends.senders.items():
        log.write(version, rank, sender.encode(shards[rank], version, **options))
    assert version not in log.markers()  # not sealed yet
    log.seal(version, base)
    for sender in ends.senders.values():
        sender.commit(version)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_engines_follow_a_log_come_late_and_come_back(scheme: str, tmp_path: Path) -> None:
    ends, log = Ends(), DeltaLog(f"{scheme}://{tmp_path}/log")
    receiver, live = ends.receivers[0], ends.live[0]
    assert log.catch_up(receiver, live) is None
    _publish(ends, log, 0)
    assert log.catch_up(receiver, live) == 0
    for version in (1, 2, 3):
        ends.step(0.01, seed=version)
        _publish(ends, log, version)
    assert [marker.base for marker in log.path_to(3, receiver.version)] == [0, 1, 2]
    assert log.markers()[3].nbytes < 0.1 * log.markers()[0].nbytes
    assert log.catch_up(receiver, live) == 3
    assert log.catch_up(receiver, live) == 3  # nothing to do
    _publish(ends, log, 4, full=True)
    ends.step(0.01, seed=5)
    _publish(ends, log, 5)
    log.forget_before(4)
    assert list(log.markers()) == [4, 5]
    assert log.catch_up(receiver, live) == 5
    late, fresh = DeltaReceiver(ends.plan, 0, ends.dtypes), virtual.allocate(ends.target.on(0), ends.dtypes)
    assert log.catch_up(late, fresh) == 5
    expected = ends.expected()[0]
    assert all(_same_bits(fresh[name], tensor) and _same_bits(live[name], tensor) for name, tensor in expected.items())
    log.forget_before(5)
    lost = DeltaReceiver(ends.plan, 0, ends.dtypes)
    with pytest.raises(SyncError, match=r"leads from version None to 5 only through version 4, which it lacks"):
        log.catch_up(lost, fresh)


# After real steps.


def _train_and_encode(rank: int, checkpoint: Path, steps: int, learning_rate: float) -> tuple[list[bytes], dict[str, Tensor]]:
    """This rank's message after every step, and the weights at the end."""
    layout = initialize_parallel(TRAINED)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, dtype=torch.bfloat16)
    bridge.load_weights(model)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=learning_rate, micro_batch_size=4))
    sender = DeltaSender(_to_one_rank(bridge), rank, bridge.spec.hf_dtypes(torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    messages = []
    for version in range(steps + 1):
        if version:
            tokens = torch.randint(2, 515, (4, 12), generator=generator)
            trainer.step(Batch.from_completions(tokens[:, :5].tolist(), tokens[:, 5:].tolist(), pad_token_id=0), _grpo)
        live, _ = live_side(trainer.model, bridge.spec, layout, rank)
        messages += sender.encode(live, version).values()
        sender.commit(version)
    return messages, {name: live[name].clone() for name in live}


def _grpo(policy: TokenStatistics, micro: Batch) -> Tensor:
    """The clipped objective with advantages 1 and -1, at ratio 1."""
    advantages = torch.where(micro.tokens[:, :1] % 2 == 0, 1.0, -1.0)
    ratio = (policy.log_probs - policy.log_probs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


TRAINED = ParallelLayout(tp=2)


def _to_one_rank(bridge: AutoBridge) -> Plan:
    return compile_plan(bridge.spec, megatron_side(bridge.spec, TRAINED), megatron_side(bridge.spec, ParallelLayout()))


def test_real_steps_in_bf16_move_a_small_share_and_end_exact(tmp_path: Path) -> None:
    """Adam at 1e-6: a weight moves by about 1e-6, and a bf16 number changes if that crosses a rounding boundary."""
    checkpoint, _ = tiny_checkpoint(tmp_path, "qwen3")
    bridge, steps = AutoBridge.from_pretrained(checkpoint), 6
    ranks = run_ranks(_train_and_encode, 2, checkpoint, steps, 1e-6)
    dtypes = bridge.spec.hf_dtypes(torch.bfloat16)
    plan, side = _to_one_rank(bridge), megatron_side(bridge.spec, ParallelLayout())
    receiver, engine = DeltaReceiver(plan, 0, dtypes), virtual.allocate(side, dtypes)
    for version in range(steps + 1):
        messages = [messages[version] for messages, _ in ranks]
        assert receiver.apply(messages, engine) == version
        headers = [unframed(message)[0] for message in messages]
        if version:
            share = sum(map(len, messages)) / sum(header.full_nbytes for header in headers)
            assert share < 0.05, f"step {version}: {share:.2%}"
            assert all(header.before != header.after for header in headers)
    expected = virtual.allocate(side, dtypes)
    virtual.run(plan, dict(enumerate(live for _, live in ranks)), {0: expected})
    assert all(_same_bits(engine[name], tensor) for name, tensor in expected.items())
