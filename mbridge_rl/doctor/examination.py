"""All findings about one machine together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mbridge_rl.doctor.facts import Machine
from mbridge_rl.doctor.findings import Finding, main_job_can_run
from mbridge_rl.doctor.machine import machine_findings
from mbridge_rl.doctor.packages import package_findings
from mbridge_rl.doctor.requirements import RecordedVersions, Supported
from mbridge_rl.doctor.transports import TransportFinding, transport_findings


@dataclass(frozen=True)
class Examination:
    """What is right and wrong on one machine.

    Attributes:
        findings: about packages and the machine, in the order in which they are shown.
        transports: about each transport of weights.
    """

    findings: tuple[Finding, ...]
    transports: tuple[TransportFinding, ...]

    @property
    def main_job_can_run(self) -> bool:
        """Whether a checkpoint can be converted on the CPU and the demo can run."""
        return main_job_can_run(self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "main_job_can_run": self.main_job_can_run,
            "findings": [asdict(finding) for finding in self.findings],
            "transports": [asdict(transport) for transport in self.transports],
        }


def examine(machine: Machine, supported: Supported, tested: RecordedVersions, model_bytes: int | None = None) -> Examination:
    """Compares what a machine has with what this library needs.

    Args:
        machine: what was found.
        supported: the bounds of this library's metadata.
        tested: the versions that its tests ran with.
        model_bytes: size of the weights that are to be synced; `None` where no model was named.
    """
    findings = [*package_findings(machine, supported, tested), *machine_findings(machine, model_bytes)]
    return Examination(tuple(findings), tuple(transport_findings(machine, model_bytes)))
