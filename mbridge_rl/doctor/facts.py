"""What was found on a machine, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Interface:
    """A network interface that has an IPv4 address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return self.address.startswith("127.")


@dataclass(frozen=True)
class Torch:
    """What the installed torch says about itself and about the GPUs.

    Attributes:
        error: why `import torch` failed; `None` where it succeeded.
        cuda: the release of CUDA that it was built for; `None` for a build without CUDA.
        nccl: the release of NCCL that it brings; `None` where it has none.
        has_gloo: whether it can make process groups on gloo.
        gpus: the names of the CUDA devices that it can use.
        peers_reach_each_other: whether every GPU can read the memory of every other one.
    """

    error: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    has_gloo: bool = True
    gpus: tuple[str, ...] = ()
    peers_reach_each_other: bool = True


@dataclass(frozen=True)
class SharedMemory:
    """The size of `/dev/shm` and what is free of it, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """The facts about one machine and one environment.

    Attributes:
        python: the running release of Python, such as "3.12.1".
        packages: the version of every installed distribution, by normalized name.
        torch_builds: of those packages that were built for one release of torch, which release they ask for.
        torch: what torch says.
        has_nvidia_driver: whether the kernel has NVIDIA's driver, whatever torch says.
        shared_memory: `None` where there is no `/dev/shm`.
        open_files: the limit of open files of this process (`ulimit -n`); `None` where there is none.
        locked_memory: the limit of locked memory in bytes (`ulimit -l`); `None` where there is none.
        interfaces: the network interfaces that have an IPv4 address.
        gloo_interface: the value of GLOO_SOCKET_IFNAME; empty where it is not set.
        host_address: the address of this host's name; `None` where the name has no address.
        expandable_segments: whether torch's allocator of GPU memory was told to use them, which cannot be shared by handle.
        import_errors: which packages fail to import, and how. Empty where no import was tried.
    """

    python: str
    packages: Mapping[str, str]
    torch_builds: Mapping[str, str] = field(default_factory=dict)
    torch: Torch = Torch()
    has_nvidia_driver: bool = False
    shared_memory: SharedMemory | None = None
    open_files: int | None = None
    locked_memory: int | None = None
    interfaces: tuple[Interface, ...] = ()
    gloo_interface: str = ""
    host_address: str | None = None
    expandable_segments: bool = False
    import_errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_gpu(self) -> bool:
        """Whether torch can use a GPU."""
        return bool(self.torch.gpus)
