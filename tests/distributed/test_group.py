"""What ranks raise together."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from mbridge_rl.core.errors import (
    BridgeError,
    DigestMismatch,
    EngineMismatch,
    PeerFailed,
    StateMismatchError,
    SyncError,
    TransferTimeout,
)
from mbridge_rl.distributed.group import RankGroup

# By rank, what it fails of; and whose error all raise, as which type.
CASES: list[tuple[dict[int, type[Exception]], int, type[BridgeError]]] = [
    ({1: EngineMismatch}, 1, EngineMismatch),
    ({1: ValueError}, 1, SyncError),
    ({0: ValueError, 2: EngineMismatch}, 0, SyncError),
    ({1: StateMismatchError, 2: SyncError}, 1, StateMismatchError),
    ({0: PeerFailed, 1: TransferTimeout, 2: EngineMismatch}, 2, EngineMismatch),
    ({0: TransferTimeout, 1: TransferTimeout, 2: DigestMismatch}, 2, DigestMismatch),
    ({0: PeerFailed, 2: TransferTimeout}, 2, TransferTimeout),
    ({1: PeerFailed, 2: PeerFailed}, 1, PeerFailed),
]


def fail(rank: int) -> None:
    group = RankGroup()
    for failing, of, expected in CASES:
        own = failing[rank](f"trouble of {rank}") if rank in failing else None
        with pytest.raises(BridgeError) as raised:
            group.agree(own)
        assert raised.type is expected, failing
        if rank == of and isinstance(own, BridgeError):
            assert raised.value is own
        else:
            assert str(raised.value) == f"rank {rank}: rank {of} failed: {failing[of].__name__}: trouble of {of}"
            assert raised.value.__cause__ is own
    group.agree()


def test_all_ranks_raise_one_failure_as_one_type() -> None:
    run_ranks(fail, 3)


def test_a_rank_that_is_alone_raises_as_many_do() -> None:
    with pytest.raises(SyncError, match="rank 0 failed: ValueError: trouble") as raised, RankGroup().fail_together():
        raise ValueError("trouble")
    assert isinstance(raised.value.__cause__, ValueError)
