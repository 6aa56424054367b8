"""Which transports of weights can work on a machine, and why the others cannot (docs/sync.md describes them)."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.doctor.facts import Machine
from mbridge_rl.doctor.findings import readable_size
from mbridge_rl.doctor.machine import DEMO_SHARED_MEMORY, VERSIONS_PER_HOST

_BUCKETS_IN_A_RING = 3


@dataclass(frozen=True)
class TransportFinding:
    """Whether one transport can work here.

    Attributes:
        name: the value of the option `transport`.
        works: whether it can.
        reason: why it cannot, or what it needs.
    """

    name: str
    works: bool
    reason: str


def transport_findings(machine: Machine, model_bytes: int | None = None) -> list[TransportFinding]:
    """One finding for each transport."""
    return [
        _shared_memory(machine, model_bytes),
        _process_group(machine),
        TransportFinding("files", True, "between hosts that reach one directory or object store (url=...)"),
        _cuda_ipc(machine),
    ]


def _shared_memory(machine: Machine, model_bytes: int | None) -> TransportFinding:
    name, memory = "shared_memory", machine.shared_memory
    if memory is None or memory.free < DEMO_SHARED_MEMORY:
        return TransportFinding(name, False, "/dev/shm is missing or too small")
    if model_bytes is not None and VERSIONS_PER_HOST * model_bytes > memory.free:
        reason = (
            f"only mode='streaming' (three buckets per worker); staged needs {readable_size(VERSIONS_PER_HOST * model_bytes)}"
        )
        return TransportFinding(name, True, reason)
    return TransportFinding(name, True, "trainer and engines on one host; 'auto' takes it there")


def _process_group(machine: Machine) -> TransportFinding:
    name = "process_group"
    if machine.torch.error is not None:
        return TransportFinding(name, False, "torch cannot be imported")
    if not machine.torch.has_gloo and machine.torch.nccl is None:
        return TransportFinding(name, False, "torch was built without gloo and without NCCL")
    if machine.has_gpu and machine.torch.nccl is not None:
        return TransportFinding(name, True, "between hosts, by NCCL; by gloo where an end has no GPU")
    return TransportFinding(name, True, "between hosts, by gloo")


def _cuda_ipc(machine: Machine) -> TransportFinding:
    name = "cuda_ipc"
    if not machine.has_gpu:
        return TransportFinding(name, False, "needs a CUDA GPU that trainer and engine share; there is none")
    if machine.expandable_segments:
        reason = "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, and such memory cannot be shared by handle"
        return TransportFinding(name, False, reason)
    if not machine.torch.peers_reach_each_other:
        return TransportFinding(name, True, "only between processes of one GPU: some GPUs cannot read each other's memory")
    return TransportFinding(
        name, True, "trainer rank and engine worker on one GPU, in containers that share their IPC namespace"
    )
