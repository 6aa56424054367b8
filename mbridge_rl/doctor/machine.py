"""Findings about shared memory, limits, the network and GPUs."""

from __future__ import annotations

from mbridge_rl.doctor.facts import Machine
from mbridge_rl.doctor.findings import Finding, Status, readable_size

DEMO_SHARED_MEMORY = 32 << 20  # its highest use of /dev/shm, measured every 20 ms, was 8 MiB
FEW_FILES = 1024  # the usual default: each ring, image, lock and connection of a rank takes one
VERSIONS_PER_HOST = 2  # images of a version that a staged sync keeps on a host


def machine_findings(machine: Machine, model_bytes: int | None = None) -> list[Finding]:
    """Findings about the machine itself.

    Args:
        machine: what was found.
        model_bytes: size of the weights that are to be synced; `None` where no model was named.
    """
    findings = [_gpus(machine)]
    if machine.has_gpu:
        findings.append(_nccl(machine))
    findings += [_shared_memory(machine, model_bytes), _open_files(machine), _locked_memory(machine), _interfaces(machine)]
    return findings


def _gpus(machine: Machine) -> Finding:
    if machine.has_gpu:
        names = ", ".join(dict.fromkeys(machine.torch.gpus))
        return Finding("GPUs", Status.OK, f"{len(machine.torch.gpus)} x {names}, CUDA {machine.torch.cuda}")
    if not machine.has_nvidia_driver:
        return Finding("GPUs", Status.ABSENT, "none", advice="everything runs on the CPU, with gloo")
    if machine.torch.cuda is None:
        advice = "there is an NVIDIA driver, but torch is a build without CUDA: install torch from PyPI to use the GPU"
        return Finding("GPUs", Status.WARNING, "not usable", advice=advice)
    advice = f"torch was built for CUDA {machine.torch.cuda} and sees no GPU: compare with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    return Finding("GPUs", Status.WARNING, "not usable", advice=advice)


def _nccl(machine: Machine) -> Finding:
    if machine.torch.nccl is None:
        advice = "torch has no NCCL, which trainers on several GPUs need: install torch from PyPI"
        return Finding("NCCL", Status.WARNING, "missing", advice=advice)
    return Finding("NCCL", Status.OK, machine.torch.nccl)


def _shared_memory(machine: Machine, model_bytes: int | None) -> Finding:
    topic, memory = "/dev/shm", machine.shared_memory
    if memory is None:
        advice = "there is no /dev/shm: ranks and engines cannot share memory. Run on Linux, with /dev/shm mounted"
        return Finding(topic, Status.FAILURE, "missing", advice=advice)
    state = f"{readable_size(memory.free)} free of {readable_size(memory.total)}"
    if memory.free < DEMO_SHARED_MEMORY:
        advice = f"the demo needs {readable_size(DEMO_SHARED_MEMORY)}: {_enlarge(DEMO_SHARED_MEMORY)}"
        return Finding(topic, Status.FAILURE, state, advice=advice)
    if model_bytes is None:
        largest = readable_size(memory.free / VERSIONS_PER_HOST)
        return Finding(topic, Status.OK, state, advice=f"staged syncs of models of up to {largest} fit")
    needed = VERSIONS_PER_HOST * model_bytes
    if needed > memory.free:
        advice = (
            f"staged syncs keep two versions of the weights, {readable_size(needed)}: {_enlarge(needed)}, or sync with "
            "mode='streaming'"
        )
        return Finding(topic, Status.WARNING, state, advice=advice)
    return Finding(topic, Status.OK, state, advice=f"staged syncs of this model need {readable_size(needed)}")


def _enlarge(needed: int) -> str:
    gibibytes = -(-needed // (1 << 30))
    return f"docker run --shm-size={gibibytes}g, or mount -o remount,size={gibibytes}G /dev/shm"


def _open_files(machine: Machine) -> Finding:
    limit = machine.open_files
    if limit is not None and limit <= FEW_FILES:
        advice = "many ranks and engines on one host need more: ulimit -n 65536"
        return Finding("open files", Status.WARNING, str(limit), advice=advice)
    return Finding("open files", Status.OK, "unlimited" if limit is None else str(limit))


def _locked_memory(machine: Machine) -> Finding:
    limit = machine.locked_memory
    state = "unlimited" if limit is None else readable_size(limit)
    if machine.has_gpu and limit is not None:
        advice = "NCCL over InfiniBand needs more: ulimit -l unlimited, or docker run --ulimit memlock=-1"
        return Finding("locked memory", Status.WARNING, state, advice=advice)
    return Finding("locked memory", Status.OK, state)


def _interfaces(machine: Machine) -> Finding:
    topic = "gloo interfaces"
    state = ", ".join(f"{interface.name} {interface.address}" for interface in machine.interfaces) or "none"
    names = [interface.name for interface in machine.interfaces]
    wanted = machine.gloo_interface.partition(",")[0]
    if wanted and wanted not in names:
        advice = f"GLOO_SOCKET_IFNAME={wanted} names no interface with an address: unset it, or name one of these"
        return Finding(topic, Status.FAILURE, state, advice=advice)
    if not any(interface.is_loopback for interface in machine.interfaces):
        return Finding(topic, Status.FAILURE, state, advice="ranks of one host meet at 127.0.0.1: ip link set lo up")
    if not wanted and machine.host_address is None:
        advice = "this host's name has no address: with several hosts, set GLOO_SOCKET_IFNAME to the interface between them"
        return Finding(topic, Status.WARNING, state, advice=advice)
    if not wanted and machine.host_address is not None and machine.host_address.startswith("127.") and len(names) > 1:
        advice = (
            "this host's name leads to the loopback: with several hosts, set GLOO_SOCKET_IFNAME to the interface between them"
        )
        return Finding(topic, Status.WARNING, state, advice=advice)
    return Finding(topic, Status.OK, state)
