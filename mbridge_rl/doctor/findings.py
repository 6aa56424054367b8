"""One finding: what was found, whether it is right, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How good a finding is.

    `ABSENT` is an optional part that is not there. `WARNING` is something that may fail, or fails for some uses only. `FAILURE`
    is something without which neither a checkpoint can be converted nor the demo run.
    """

    OK = "ok"
    ABSENT = "absent"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what it is about: a package, or a part of the machine.
        status: how good it is.
        found: what was found, for example a version.
        supported: the versions that this library admits; empty where it has no such bound.
        tested: what is known from this library's own tests about the version that was found.
        advice: what to do, or what follows; empty where nothing needs doing.
    """

    topic: str
    status: Status
    found: str
    supported: str = ""
    tested: str = ""
    advice: str = ""


def main_job_can_run(findings: Iterable[Finding]) -> bool:
    """Whether a checkpoint can be converted on the CPU and the demo can run."""
    return all(finding.status is not Status.FAILURE for finding in findings)


def readable_size(nbytes: float) -> str:
    """A number of bytes as text, in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"
