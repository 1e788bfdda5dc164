"""Facts of this machine: cores, processes, boot, software."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PACKAGES = ("p3d-embeddings", "torch", "ray", "decord", "av", "pyarrow", "numpy", "boto3")


def usable_cpus() -> int:
    """Cores this process may use; `taskset` and cgroups count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boot_id() -> str:
    """This boot, and this container's own numbering of processes; empty where Linux does not say."""
    return f"{BOOT_ID.read_text().strip()} {PID_NAMESPACE.readlink()}" if BOOT_ID.exists() else ""


def is_alive(pid: int) -> bool:
    """Is there a process of this number here?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def software() -> dict[str, str]:
    """The versions of the packages that decide the numbers, of Python, and the processor kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
