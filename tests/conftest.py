"""Environment of all tests. It must be set before torch and vLLM are imported, so it comes before every import of them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from pathlib import Path

import pytest
import suite_watch

# Two threads cut sums in other places than one does: `tools/kernels.py` runs the tests that compare numbers with both.
_THREADS = os.environ.setdefault("MBRIDGE_TEST_THREADS", "1")

for _name, _value in {
    "OMP_NUM_THREADS": _THREADS,
    "MKL_NUM_THREADS": _THREADS,
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

torch.set_num_threads(int(_THREADS))

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # whose own suite has begun already
        suite_watch.begin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `nightly` are for `make nightly`, which says with which seeds."""
    if "MBRIDGE_SEEDS" not in os.environ:
        for item in items:
            if item.get_closest_marker("nightly") is not None:
                item.add_marker(pytest.mark.skip(reason="part of `make nightly`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    """What a test logged may hold halves of surrogate pairs, which xdist cannot send to the process that prints."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests marked `alone` have the machine to themselves: vLLM's workers wait for each other by spinning, and where they have
    to share cores with other tests, every token takes some slices of the scheduler."""
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(alone: bool) -> Iterator[None]:
    """Of one test among the processes of a run. Whoever waits to be alone holds the door, so that nobody else comes in."""
    if _RUN is None:
        yield
        return
    folder = Path(tempfile.gettempdir())
    with (folder / f"mbridge-tests-{_RUN}.door").open("w") as door, (folder / f"mbridge-tests-{_RUN}.room").open("w") as room:
        flock(door, LOCK_EX)
        flock(room, LOCK_EX if alone else LOCK_SH)
        flock(door, LOCK_UN)
        try:
            yield
        finally:
            flock(room, LOCK_UN)
