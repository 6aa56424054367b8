"""Fixtures of the tests of syncs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mbridge_rl.sync.store.weight_store import WeightStore


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a weight store of this process; it is removed afterwards, and so are those of two replicas."""
    name = f"test.{os.getpid()}"
    yield name
    for replica in ("", ".0", ".1"):
        WeightStore(name + replica).remove()
