"""Facts of this machine: cores, processes, boot, software, our own code."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PACKAGES = ("p3d-embeddings", "torch", "ray", "decord", "av", "pyarrow", "numpy", "boto3")


@dataclass(frozen=True, slots=True)
class Machines:
    """What a run has to work with: all cores, those of the smallest machine, and all GPUs."""

    cpus: int
    node_cpus: int
    gpus: int


def usable_cpus() -> int:
    """Cores this process may use; `taskset` and cgroups count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def inference_threads_of(device: str, cpus: int, threads: int) -> int:
    """Batches that a network computes at once: on a CPU as many as use its `cpus`, each with `threads` of its own.

    Two lanes of one thread do not wait for each other, where two threads of one batch do, and for longer when a decode
    has taken a core from one of them. On a GPU two: the frames of one travel while the other is computed.
    """
    if device == "cpu":
        return max(1, cpus // threads)
    return 2 if device.startswith("cuda") else 1


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


def code_digest() -> str:
    """sha256 over the source of `p3d` as this process imports it.

    Each file is hashed once under its dotted name, so a checkout, where `p3d/jobs` is a link, and an installed wheel
    give the same digest. Another version of p3d on a worker's path gives another one.
    """
    import p3d

    root = Path(str(p3d.__file__)).parent
    modules = dict[str, Path]()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            modules[".".join(("p3d", *path.relative_to(root).with_suffix("").parts))] = path
    hasher = hashlib.sha256()
    for name, path in sorted(modules.items()):
        hasher.update(f"{name}\0".encode() + path.read_bytes())
    return hasher.hexdigest()
