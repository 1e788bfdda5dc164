"""Facts of this machine: cores, processes, boot."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus() -> int:
    """Cores this process may use; `taskset` and cgroups count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boot_id() -> str:
    """What Linux calls this boot; empty where there is no such thing."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def is_alive(pid: int) -> bool:
    """Is there a process of this number here?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
