"""Streams that fail: on every rank, with the cause, and nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live import live, raised
from ranks import run_ranks
from tiny import hf_state, tiny_checkpoint
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import ArenaError
from mbridge_rl.core.layout import ParallelLayout

TRANSPORTS = ("shared_memory", "collective")


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
    for error, _ in ranks:
        assert error.startswith("SyncError: ")
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
    assert "rank 1 failed: PeerFailed: it stopped reading before the end of the stream" in first[0]
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


def never_come(rank: int, directory: Path, name: str, seconds: float, timeout: float) -> str:
    """Rank 1 sleeps for `seconds` and ends without taking part; the time-out of all ranks is `timeout`."""
    dist.barrier()  # a rank that is still connecting would find a peer that is gone
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/again", rank=rank, world_size=3, timeout=timedelta(seconds=timeout)
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
    assert not any(directory.glob(".saved.*"))


def without_room(rank: int, directory: Path) -> tuple[str, str, int]:
    """Shared memory for a bucket that no machine has."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    import mbridge_rl.distributed.host_memory as host_memory
    from mbridge_rl.distributed.arena import Arena

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
