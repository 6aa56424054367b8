"""Every mode of a sync with every transport that a CPU has."""

from __future__ import annotations

WAYS = [("staged", "shared_memory"), ("streaming", "shared_memory"), ("staged", "process_group"),
        ("streaming", "process_group"), ("staged", "files"), ("streaming", "files")]  # fmt: skip
