"""Streams of HF tensors out of and into live Megatron models, on real processes: what arrives, at what cost, and who fails."""

from __future__ import annotations

import gc
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import assert_same_state, hf_state, tiny_checkpoint, tiny_config
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View, compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.errors import ArenaError
from mbridge_rl.sync.schedule import clipped, schedule

TRANSPORTS = ("shared_memory", "collective")
MOE = ParallelLayout(tp=2, pp=2, ep=2, etp=1)


def live(layout: ParallelLayout, directory: Path, **options: Any) -> tuple[AutoBridge, list[nn.Module]]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, **options)
    bridge.load_weights(model)
    return bridge, model


def raised(function: Callable[[], Any]) -> str:
    """The error that `function` raises, as `Type: message`."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# The schedule: pure arithmetic.


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_clipping_cuts_a_rectangle_into_its_elements_of_a_range(data: st.DataObject) -> None:
    """Every element in the range once, at the place where the rectangle has it; none outside."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, size - 1)) for size in sizes]
    shape = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(sizes, starts, strict=True))
    order = data.draw(st.permutations(range(len(sizes))))
    whole = torch.arange(torch.Size(sizes).numel()).view(sizes)
    box = whole[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))].permute(order)
    target = View("hf", box.storage_offset(), tuple(box.stride()))
    packed = torch.arange(box.numel()).view(box.shape)
    first = data.draw(st.integers(0, whole.numel()))
    last = data.draw(st.integers(first, whole.numel()))
    found: dict[int, int] = {}
    for part, source, clip in clipped(tuple(box.shape), View("local", 0, tuple(packed.stride())), target, first, last):
        pairs = zip(clip.of(whole, part).flatten().tolist(), source.of(packed, part).flatten().tolist(), strict=True)
        for element, position in pairs:
            assert element not in found
            found[element] = position
    elements = dict(zip(box.flatten().tolist(), packed.flatten().tolist(), strict=True))
    assert found == {element: position for element, position in elements.items() if first <= element < last}


@pytest.mark.parametrize("bucket_bytes", [100, 1000, 1 << 14, 1 << 22])
def test_schedules_are_bounded_and_complete(bucket_bytes: int) -> None:
    """Buckets smaller than a row (128 bytes and more), than a tensor, and larger than all of them."""
    spec = AutoBridge.from_config(tiny_config("qwen3-moe", vocab_size=67, num_hidden_layers=2, num_experts=4)).spec
    plan = compile_plan(spec, megatron_side(spec, MOE), hf_side(spec))
    tensors = [HFTensor(hf_name, torch.bfloat16, shape) for hf_name, shape in spec.hf_shapes.items()]
    buckets = schedule(tensors, plan.by_hf_name, bucket_bytes)
    covered = dict.fromkeys(spec.hf_shapes, 0)
    for bucket in buckets:
        pieces = [piece for span in bucket.spans for piece in span.pieces]
        assert bucket.nbytes <= bucket_bytes + 63
        assert sum(bucket.packed_nbytes.values()) <= bucket_bytes + 64 * len(pieces)
        for span in bucket.spans:
            assert span.first == covered[span.tensor.hf_name]
            assert sum(piece.numel for piece in span.pieces) == span.last - span.first
            covered[span.tensor.hf_name] = span.last
    assert covered == {tensor.hf_name: torch.Size(tensor.shape).numel() for tensor in tensors}
    total = sum(tensor.nbytes for tensor in tensors)
    assert len(buckets) <= 2 * total / bucket_bytes + 2 + sum(tensor.nbytes > bucket_bytes for tensor in tensors)


# Exports.


def export_all_ways(rank: int, directory: Path, layout: ParallelLayout, bucket_bytes: int) -> dict[str, dict[str, Tensor]]:
    bridge, model = live(layout, directory)
    exported = {}
    for transport in TRANSPORTS:
        for ranks in (None, [0], [1, 3]):
            stream = bridge.export_weights(model, bucket_bytes=bucket_bytes, transport=transport, ranks=ranks)
            exported[f"{transport} to {ranks}"] = dict(stream)
    return exported


@pytest.mark.parametrize("bucket_bytes", [5000, 1 << 16, 1 << 20])
def test_whole_tensors_reach_the_ranks_that_asked_and_no_others(bucket_bytes: int, tmp_path: Path) -> None:
    """Buckets that cut most tensors, few, and none; order is the checkpoint's."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe", num_experts=4)
    order = list(AutoBridge.from_pretrained(directory).spec.hf_shapes)
    expected = hf_state(directory)
    for rank, exported in enumerate(run_ranks(export_all_ways, 4, directory, MOE, bucket_bytes)):
        for way, state in exported.items():
            if way.endswith("None") or str(rank) in way:
                assert list(state) == order, way
                assert_same_state(state, expected)
            else:
                assert state == {}, way


def export_and_keep(rank: int, directory: Path) -> bool:
    bridge, model = live(ParallelLayout(tp=2), directory)
    kept = list(bridge.export_weights(model, bucket_bytes=1 << 13))
    copies = [(name, tensor.clone()) for name, tensor in kept]
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    zeros = dict(bridge.export_weights(model, bucket_bytes=1 << 13))
    assert not any(tensor.any() for tensor in zeros.values())
    return all(torch.equal(tensor, copy) for (_, tensor), (_, copy) in zip(kept, copies, strict=True))


def test_tensors_are_the_consumers_to_keep(tmp_path: Path) -> None:
    """Later buckets and later exports leave them alone; later exports see the weights of then."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    assert run_ranks(export_and_keep, 2, directory) == [True, True]


def count_collectives(rank: int, directory: Path, transport: str, bucket_bytes: int) -> tuple[dict[str, int], int]:
    bridge, model = live(ParallelLayout(tp=2, pp=2), directory)
    stream = {"transport": transport, "bucket_bytes": bucket_bytes}
    nbytes = sum(tensor.nbytes for _, tensor in bridge.export_weights(model, **stream))
    counts: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)

        return call

    for name in ("all_gather_object", "all_reduce", "broadcast", "all_gather", "barrier", "scatter", "broadcast_object_list"):
        setattr(dist, name, counted(name))
    for _ in bridge.export_weights(model, **stream):
        pass
    return counts, nbytes


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bucket_bytes", [1 << 16, 1 << 18])
def test_collectives_grow_with_bytes_and_objects_travel_once(transport: str, bucket_bytes: int, tmp_path: Path) -> None:
    """At most 2 x (contributing ranks + 1 flag) per bucket's worth of bytes, and then only bytes and flags."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for counts, nbytes in run_ranks(count_collectives, 4, directory, transport, bucket_bytes):
        assert set(counts) <= {"all_reduce", "broadcast"}
        parts = 2 if transport == "collective" else 1
        per_bucket = 2 * parts * (1 + (4 if transport == "collective" else 0))
        assert sum(counts.values()) <= per_bucket * (nbytes / bucket_bytes + 1)
        assert counts.get("broadcast", 0) > 0 or transport == "shared_memory"
        assert counts["all_reduce"] >= nbytes // bucket_bytes


def resident(field: str) -> int:
    """Bytes of memory of this process, by the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def peak_of_export(rank: int, directory: Path, transport: str, bucket_bytes: int) -> tuple[int, int]:
    """Growth of resident memory during an export, and bytes of the largest tensor."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, largest = resident("VmRSS"), 0
    for _, tensor in bridge.export_weights(model, transport=transport, bucket_bytes=bucket_bytes):
        largest = max(largest, tensor.nbytes)
        del tensor
    return resident("VmHWM") - before, largest


# What Python, gloo and malloc take on the way, whatever the model: 3 to 9 MB here.
SLACK = 16 << 20


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("vocab_size", "layers"), [(70_000, 2), (260_000, 2), (70_000, 40)])
def test_memory_is_two_buckets_and_the_tensor(transport: str, vocab_size: int, layers: int, tmp_path: Path) -> None:
    """Neither a tensor of many buckets nor a model of many tensors makes a difference.

    The largest tensors are above 32 MiB, which malloc returns to the kernel; of smaller ones it keeps some.
    """
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 1536}
    directory, _ = tiny_checkpoint(tmp_path, "llama", **sizes)
    bucket_bytes = 4 << 20
    for grown, largest in run_ranks(peak_of_export, 2, directory, transport, bucket_bytes):
        assert largest == vocab_size * 128 * 4
        assert grown <= 2 * bucket_bytes + largest + SLACK


# Failures: on every rank, with the cause, and nothing hangs.


class Broken(Mapping[str, Tensor]):
    """Parameters of which one cannot be read, as where merging an adapter runs out of memory."""

    def __init__(self, tensors: Mapping[str, Tensor], broken: str) -> None:
        self._tensors, self._broken = tensors, broken

    def __getitem__(self, name: str) -> Tensor:
        if name == self._broken:
            raise MemoryError(f"no memory to merge {name}")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def fail_to_read(rank: int, directory: Path, transport: str) -> tuple[str, bool]:
    bridge, model = live(ParallelLayout(tp=2, pp=2), directory)
    arguments = {"transport": transport, "bucket_bytes": 1 << 14}
    good = dict(bridge.export_weights(model, **arguments))
    stream = next(iter(bridge._streams.values()))
    from mbridge_rl.megatron.parameters import live_side

    tensors, _ = live_side(model, bridge.spec, ParallelLayout(tp=2, pp=2), rank)
    broken = "decoder.layers.2.mlp.linear_fc1.weight" if rank == 3 else ""
    error = raised(lambda: dict(stream.run(Broken(tensors, broken))))
    again = dict(bridge.export_weights(model, **arguments))
    return error, all(torch.equal(good[name], again[name]) for name in good)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_one_rank_cannot_read_all_ranks_hear_of(transport: str, tmp_path: Path) -> None:
    """And the process group is in step afterwards: the next export works."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    ranks = run_ranks(fail_to_read, 4, directory, transport)
    assert ranks[3][0] == "MemoryError: no memory to merge decoder.layers.2.mlp.linear_fc1.weight"
    for error, _ in ranks[:3]:
        assert "rank 3 failed: MemoryError: no memory to merge decoder.layers.2.mlp.linear_fc1.weight" in error
    assert all(works for _, works in ranks)


def stop_reading(rank: int, directory: Path, transport: str, after: int) -> tuple[str, str, int]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    arguments = {"transport": transport, "bucket_bytes": 1 << 14}

    def read() -> None:
        for index, _ in enumerate(bridge.export_weights(model, **arguments)):
            if rank == 1 and index == after:
                break

    def read_some_everywhere() -> None:
        for index, _ in enumerate(bridge.export_weights(model, **arguments)):
            if index == after:
                break

    return raised(read), raised(read_some_everywhere), len(dict(bridge.export_weights(model, **arguments)))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("after", [0, 7, 20])
def test_a_rank_that_stops_reading_stops_the_others(transport: str, after: int, tmp_path: Path) -> None:
    """All ranks stopping together is no error."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(stop_reading, 2, directory, transport, after)
    assert "rank 1 failed: SyncError: it stopped reading before the end of the stream" in first[0]
    assert second[0] == "nothing"
    assert [first[1:], second[1:]] == [("nothing", 39)] * 2


def disagree(rank: int, directory: Path, other: Path) -> list[str]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    errors = [
        raised(lambda: dict(bridge.export_weights(model, bucket_bytes=1000 + rank))),
        raised(lambda: dict(bridge.export_weights(model, ranks=[0, 2]))),
        raised(lambda: dict(bridge.export_weights(model, bucket_bytes=0))),
        raised(lambda: dict(bridge.export_weights(model, transport="pigeon"))),
    ]
    if rank == 1:
        bridge._export_plans[ParallelLayout(tp=2)] = AutoBridge.from_pretrained(other).export_plan(ParallelLayout(tp=2))
    errors.append(raised(lambda: dict(bridge.export_weights(model))))
    wrong = AutoBridge.from_pretrained(other if rank == 0 else directory)
    errors.append(raised(lambda: dict(wrong.export_weights(model))))
    twice = ParallelLayout(tp=2, dp=2)
    errors.append(raised(lambda: dict(bridge.export_weights(model, layout=twice))))
    errors.append(raised(lambda: bridge.save_pretrained(model, directory / "saved", layout=twice)))
    return errors


def test_disagreements_are_found_before_anything_travels(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path / "one", "llama")
    other, _ = tiny_checkpoint(tmp_path / "other", "llama", intermediate_size=144)
    ranks = run_ranks(disagree, 2, directory, other)
    for bucket, receivers, empty, transport, plan, model, exported, saved in ranks:
        assert "SyncError: ranks disagree about the export: rank 1 has" in bucket
        assert "(1001, [0, 1], 'auto'); rank 0 has" in bucket
        assert "ranks must be some of 0..1, found [0, 2]" in receivers
        assert "bucket_bytes must be positive, found 0" in empty
        assert "transport must be one of ('auto', 'shared_memory', 'collective'), found 'pigeon'" in transport
        assert "ranks disagree about the export: rank 1 has plan" in plan
        assert model.startswith("StateMismatchError")
        assert "has shape" in model
        assert "layout(tp=2, dp=2) has 4 ranks, 2 are running" in exported
        assert "layout(tp=2, dp=2) has 4 ranks, 2 are running" in saved
    assert "rank 0 failed" in ranks[1][5]
    assert not (directory / "saved").exists()


def change_the_mind(rank: int, directory: Path) -> tuple[list[str], int]:
    """Both ways are prepared on both ranks when the ranks part ways; and then one rank has a new bridge."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    ways: list[dict[str, Any]] = [{"bucket_bytes": 1 << 14}, {"bucket_bytes": 1 << 16, "transport": "collective"}]
    for way in ways:
        dict(bridge.export_weights(model, **way))
    errors = [raised(lambda: dict(bridge.export_weights(model, **ways[rank])))]
    errors.append(raised(lambda: dict(bridge.export_weights(model, bucket_bytes=1 << (14 + rank)))))
    if rank == 1:
        bridge = AutoBridge.from_pretrained(directory)
    return errors, len(dict(bridge.export_weights(model, **ways[0])))


def test_disagreements_between_prepared_exports_are_found(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for errors, count in run_ranks(change_the_mind, 2, directory, timeout=30):
        assert all("ranks disagree about the export: rank 1 has" in error for error in errors)
        assert count == 39


def twice_at_once(rank: int, directory: Path) -> str:
    bridge, model = live(ParallelLayout(tp=2), directory)
    first = bridge.export_weights(model)
    next(first)
    error = raised(lambda: next(bridge.export_weights(model)))
    assert len(list(first)) == 38
    return error


def test_one_export_at_a_time(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for error in run_ranks(twice_at_once, 2, directory):
        assert "this export is being read already" in error


CALLS: dict[str, Callable[[AutoBridge, list[nn.Module], Path], Any]] = {
    "export by shared memory": lambda bridge, model, _: dict(bridge.export_weights(model, transport="shared_memory")),
    "export by collectives": lambda bridge, model, _: dict(bridge.export_weights(model, transport="collective")),
    "import": lambda bridge, model, directory: bridge.import_weights(model, hf_state(directory).items()),
    "load": lambda bridge, model, directory: bridge.load_weights(model, directory),
    "save": lambda bridge, model, directory: bridge.save_pretrained(model, directory / "saved"),
}


def never_come(rank: int, directory: Path, name: str, seconds: float, patience: float) -> str:
    """Rank 1 does something else for `seconds`, and ends; the others' time-out is `patience`."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/again", rank=rank, world_size=3, timeout=timedelta(seconds=patience)
    )
    bridge, model = live(ParallelLayout(dp=3), directory)
    CALLS[name](bridge, model, directory)
    if rank == 1:
        time.sleep(seconds)
        return ""
    return raised(lambda: CALLS[name](bridge, model, directory))


@pytest.mark.slow
def test_a_missing_rank_is_named_when_the_time_is_out(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, _, third = run_ranks(never_come, 3, directory, "export by collectives", 9.0, 3.0, timeout=60)
    for rank, error in ((0, first), (2, third)):
        assert error.startswith(f"RanksUnreachable: rank {rank} of 3 cannot reach all others: ranks [1] did not come"), error


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_that_ended_is_noticed_at_once(name: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, _, third = run_ranks(never_come, 3, directory, name, 0.0, 40.0, timeout=60)
    for rank, error in ((0, first), (2, third)):
        assert error.startswith(f"RanksUnreachable: rank {rank} of 3 cannot reach all others: one of them died"), error
    assert not (directory / ".saved.incomplete").exists()


def without_room(rank: int, directory: Path) -> tuple[str, str, int]:
    """Shared memory for a bucket that no machine has."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    import mbridge_rl.sync.host_memory as host_memory
    from mbridge_rl.sync.arena import Arena

    if rank == 0:
        real = Arena.create
        host_memory.Arena.create = lambda nbytes: real(1 << 50)
    error = raised(lambda: dict(bridge.export_weights(model, transport="shared_memory")))
    count = len(dict(bridge.export_weights(model)))
    return error, next(reversed(bridge._streams.values())).transport, count


def test_where_shared_memory_is_too_small_the_collectives_do(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for error, transport, count in run_ranks(without_room, 2, directory):
        assert error.startswith(ArenaError.__name__)
        assert (transport, count) == ("collective", 39)


# Imports.


def import_in_any_order(rank: int, directory: Path, in_place: bool) -> dict[str, Tensor]:
    initialize_parallel(MOE)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(MOE)
    tensors = list(hf_state(directory).items())
    random.Random(rank).shuffle(tensors)
    strided = ((name, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor) for name, tensor in tensors)
    bridge.import_weights(model, strided, in_place=in_place)
    return dict(bridge.export_weights(model))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("variant", ["qwen3-moe", "qwen3-moe-tied"])
def test_import_takes_any_order(variant: str, in_place: bool, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, variant)
    for exported in run_ranks(import_in_any_order, 4, directory, in_place):
        assert_same_state(exported, hf_state(directory))


def export_into_another_model(rank: int, directory: Path) -> dict[str, Tensor]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    twin = bridge.build_model()
    bridge.load_weights(twin, bridge.export_weights(model, bucket_bytes=1 << 14))
    return dict(bridge.export_weights(twin))


def test_an_export_feeds_an_import(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3")
    for exported in run_ranks(export_into_another_model, 2, directory):
        assert_same_state(exported, hf_state(directory))


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]], str]] = {
    "early end": (lambda stream: stream[:-1], r"the stream ended after 38 of 39 tensors: missing "),
    "repeated": (lambda stream: [*stream[:5], stream[2], *stream[5:]], r"the stream holds .* twice"),
    "unknown": (lambda stream: [*stream[:5], ("lm_hat.weight", stream[0][1])], "the stream holds lm_hat.weight, which "),
    "shape": (lambda stream: [(n, t[1:] if n == Q else t) for n, t in stream], rf"{Q} has shape \[63, 64\], the config says"),
    "dtype": (lambda stream: [(n, t.int() if n == Q else t) for n, t in stream], rf"{Q} is torch.int32"),
}


def import_faulty(rank: int, directory: Path, name: str, in_place: bool) -> tuple[str, bool]:
    """Rank 1's stream has the fault, rank 0's has none."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    stream = [(name, tensor + 1) for name, tensor in hf_state(directory).items()]
    if rank == 1:
        stream = FAULTS[name][0](stream)
    error = raised(lambda: bridge.import_weights(model, iter(stream), in_place=in_place))
    after = [parameter for chunk in model for parameter in chunk.parameters()]
    return error, all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_stream_changes_no_rank(name: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_faulty, 2, directory, name, False)
    for error, untouched in (first, second):
        assert error.startswith(StateMismatchError.__name__)
        assert re.search(FAULTS[name][1], error)
        assert untouched
    assert "rank 1 failed: StateMismatchError" in first[0]


def test_an_import_in_place_says_that_it_leaves_a_mixture(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_faulty, 2, directory, "early end", True)
    assert "The import was in place: 38 of 39 tensors are the stream's, the others are what they were" in second[0]
    assert "rank 1 failed" in first[0]
    assert not first[1]
    assert not second[1]


def import_a_broken_export(rank: int, directory: Path) -> tuple[str, bool]:
    """A stream that all ranks feed together; rank 1 takes a tensor of it for another's."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    twin = bridge.build_model()
    before = [parameter.detach().clone() for chunk in twin for parameter in chunk.parameters()]

    def confused() -> Iterator[tuple[str, Tensor]]:
        stream = bridge.export_weights(model, bucket_bytes=1 << 14)
        try:
            for index, (name, tensor) in enumerate(stream):
                yield (Q if rank == 1 and index == 3 else name), tensor
        finally:
            stream.close()

    error = raised(lambda: bridge.import_weights(twin, confused()))
    return error, all(map(torch.equal, before, (parameter for chunk in twin for parameter in chunk.parameters())))


def test_a_fault_in_a_common_stream_reaches_all(tmp_path: Path) -> None:
    """Rank 0 waits inside the export that rank 1 has left: it hears of it there, not by a time-out."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    first, second = run_ranks(import_a_broken_export, 2, directory, timeout=60)
    assert "has shape" in second[0]
    assert "it stopped reading" in first[0]
    assert first[1]
    assert second[1]
