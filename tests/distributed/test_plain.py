"""Messages between processes: what is plain comes out as it went in, and nothing else goes in or is believed."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mbridge_rl.core.errors import CheckpointError, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.plain import dumped, loaded


@dataclass(frozen=True)
class Pair:
    first: int
    second: Any


PLAIN = [
    None,
    [True, -1, 1 << 70, 0.1, float("inf"), "text \u2026 \ud800", b"\0\xff"],
    (1, [2, (3,)], {"a": {1: None, (2, "b"): frozenset({"c"})}}),
    {"dtype": torch.float8_e4m3fn, "layout": ParallelLayout(pp=2, stage_layers=(1, 2)), "pair": Pair(1, ["dict", "list", []])},
]


@pytest.mark.parametrize("value", PLAIN, ids=str)
def test_plain_values_come_out_as_they_went_in(value: Any) -> None:
    types = (ParallelLayout, Pair)
    received = loaded(dumped(value, types), types)
    assert received == value
    assert repr(received) == repr(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64], ids=str)
def test_tensors_keep_their_bits_and_their_order(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5).to(dtype).t(), torch.zeros(0, 4, dtype=dtype), torch.ones((), dtype=dtype)]
    for received, tensor in zip(loaded(dumped(tensors)), tensors, strict=True):
        assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
        assert received.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "value", [object(), Path("x"), Pair(1, 2), len, [ParallelLayout()]], ids=lambda value: type(value).__name__
)
def test_what_is_not_plain_is_not_sent(value: Any) -> None:
    with pytest.raises(SyncError, match="is not plain data"):
        dumped(value)


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def message(described: Any, rest: bytes = b"") -> bytes:
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\xff" * 8,
        message(["tensor", "float32", [2]], b"1234"),
        message(["tensor", "float32", [-1]]),
        message(["tensor", "float32", [1 << 60, 1 << 60]]),
        message(["tensor", "Tensor", [1]], b"1"),
        message(["Pair", {"first": 1}]),
        message(["Pair", {"first": 1, "second": 2, "third": 3}]),
        message(["Path", {}]),
        message({"a": 1}),
        message(["bytes", 3]),
        message([]),
        message(1, b"more"),
        message(["dict", [[["list", []], 1]]]),
        b"[" * 100_000,
        message(None)[:8] + b"[" * 100_000,
    ],
    ids=[str(number) for number in range(16)],
)
def test_what_is_no_message_is_refused(wrong: bytes) -> None:
    with pytest.raises(SyncError, match="is not what this version reads"):
        loaded(wrong, (Pair,))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "bomb"))
    for wrong in (bomb, message(["bytes", 1], bomb), len(bomb).to_bytes(8, "little") + bomb):
        with pytest.raises(SyncError):
            loaded(wrong)
    assert not (tmp_path / "bomb").exists()


class OwnError(CheckpointError):
    """Of a library that builds on this one."""


def of_a_group(rank: int) -> tuple[Any, Any, str]:
    import torch.distributed as dist

    def forbidden(*arguments: Any, **named: Any) -> None:
        raise AssertionError("objects are pickled by this")

    for name in ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list"):
        setattr(dist, name, forbidden)
    group = RankGroup()
    gathered = group.gather_plain({"rank": rank, "long": "x" * rank * 100})
    shared = group.share_plain(torch.arange(3) if rank == 0 else None)
    try:
        with group.fail_together():
            if rank == 1:
                raise OwnError("the cause")
    except CheckpointError as error:
        text = f"{type(error).__name__}: {error}"
    return gathered, shared, text


def test_ranks_tell_each_other_plain_data() -> None:
    for rank, (gathered, shared, text) in enumerate(run_ranks(of_a_group, 3)):
        assert gathered == [{"rank": other, "long": "x" * other * 100} for other in range(3)]
        assert shared.equal(torch.arange(3))
        assert text == ("OwnError: the cause" if rank == 1 else f"OwnError: rank {rank}: rank 1 failed: OwnError: the cause")
