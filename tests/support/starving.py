"""How long the machine kept processes waiting: what may be said of time where other programs want the same processors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def starved(pid: int) -> float:
    """Seconds in which a process's threads were ready to run and had no processor, since it began. 0 where the kernel does not
    count them, or the process is gone."""
    return sum(_delay(path) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def starved_together(pids: Iterable[int]) -> dict[int, float]:
    return {pid: starved(pid) for pid in pids}


def _delay(path: Path) -> float:
    try:
        return int(path.read_text().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0
