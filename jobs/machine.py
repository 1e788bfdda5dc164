"""Facts about this machine: cores, processes, boot id, software, our own code."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PACKAGES = ("p3d-embeddings", "torch", "torchcodec", "ray", "decord", "av", "pyarrow", "numpy", "boto3")
SMI_S = 20.0  # timeout of nvidia-smi, which loads the driver first
CORES_TO_RESERVE = 4  # of a machine, per worker on a GPU, from which on each worker has one for itself


@dataclass(frozen=True, slots=True)
class Machines:
    """The resources of a run: all cores, the cores of the smallest machine, and all GPUs.

    `gpu_nodes` has the cores and GPUs of each machine with a GPU.
    """

    cpus: int
    node_cpus: int
    gpus: int
    gpu_nodes: tuple[tuple[int, int], ...] = ()


def usable_cpus() -> int:
    """The number of cores that this process may use, with the affinity of `taskset` and cpusets applied."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpus_of_a_gpu_worker(machines: Machines, workers: int, workers_per_gpu: int) -> int:
    """The CPUs that a worker on a GPU reserves in Ray: one, to read and gather frames, or none.

    It needs a whole core at some 1 000 clips per second, which a few cores do not decode. So one is reserved if every
    machine with GPUs has CORES_TO_RESERVE cores for each of its workers. On a small machine a worker shares the cores
    with its decodes, since a reserved core would halve the decodes of two. On one core no decode could start at all.
    """
    enough = [cpus >= CORES_TO_RESERVE * min(workers, gpus * workers_per_gpu) for cpus, gpus in machines.gpu_nodes]
    return int(bool(enough) and all(enough))


def inference_threads_of(device: str, cpus: int, threads: int) -> int:
    """The number of inference threads (on a GPU, CUDA streams): batches that a network computes at once.

    On a CPU there are enough to use its `cpus`, each with `threads` of torch. Two inference threads with one torch
    thread each do not wait for each other. Two torch threads of one batch do, and longer when a decode takes a core
    from one of them. On a GPU there are two: the frames of one batch are copied while the other is computed.
    """
    if device == "cpu":
        return max(1, cpus // threads)
    return 2 if device.startswith("cuda") else 1


def user_name() -> str:
    """The name of this process's user, or its number where it has no name, as in a container."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # KeyError before Python 3.13
        return str(os.getuid())


def boot_id() -> str:
    """Identifies this boot and this PID namespace; empty if Linux does not say."""
    return f"{BOOT_ID.read_text().strip()} {PID_NAMESPACE.readlink()}" if BOOT_ID.exists() else ""


def is_alive(pid: int) -> bool:
    """Does a process with this pid exist on this machine? False for what is no pid: to `kill`, 0 and -1 mean many."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def software() -> dict[str, str]:
    """The versions of Python and of the packages that affect the embeddings, and the CPU architecture."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def gpu_software(gpu: str = "") -> dict[str, str]:
    """The name of the GPU, its driver, CUDA, cuDNN, and the FFmpeg of torchcodec. Does not initialise CUDA.

    Without a name, those of all NVIDIA GPUs of this machine; empty without one. What is unknown is "absent".
    """
    found = _nvidia_smi()
    gpu = gpu or ", ".join(sorted({name for name, _ in found}))
    if not gpu:
        return {}
    import torch

    from p3d.pipeline.decode.routes.nvdec import ffmpeg_here

    # not `torch.backends.cudnn.version`, which asks every GPU, and raises if one is too old for this build
    cudnn = torch._C._cudnn.getVersionInt() if torch._C._has_cudnn else ""
    known = {"gpu": gpu, "driver": found[0][1] if found else "", "cuda": torch.version.cuda or ""}
    known |= {"cudnn": str(cudnn or ""), "ffmpeg": ffmpeg_here()}
    return {name: value or "absent" for name, value in known.items()}


def _nvidia_smi() -> list[tuple[str, str]]:
    """(name, driver version) of each NVIDIA GPU of this machine; empty if nvidia-smi is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.rpartition(",") for line in said.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, _, driver in lines]


def code_digest() -> str:
    """sha256 over the source of `p3d` as this process imports it.

    Each file is hashed once under its dotted name. A checkout, where `p3d/jobs` is a link, and an installed wheel
    therefore give the same digest. Another version of p3d on a worker's path gives another one.
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
