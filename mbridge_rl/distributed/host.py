"""Identifies the processes that can share memory."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine_id() -> str:
    """A text that is equal for processes that can share memory: the host, the kernel's boot, and the `/dev/shm` of their
    container."""
    boot, shared_memory = Path("/proc/sys/kernel/random/boot_id"), Path("/dev/shm")
    booted = boot.read_text().strip() if boot.exists() else ""
    device = os.stat(shared_memory).st_dev if shared_memory.exists() else -1
    return f"{socket.gethostname()} {booted} {device}"
