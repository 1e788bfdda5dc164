"""Checks before a job: can every node run it? `scheduler.cluster.ask_nodes` runs `look_here` on each node.

A node must have the same code and packages, a decoder, disk space for downloads, and its own access to OUT and the
source: a folder of one machine cannot be the output of a cluster of two. With --decoder nvdec, `try_gpu` decodes a
sample file on each node that has a GPU.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from p3d.jobs.machine import code_digest, gpu_software, software, usable_cpus
from p3d.pipeline.decode.routes.nvdec import not_here, sample_problem
from p3d.pipeline.errors import JobError
from p3d.pipeline.storage.s3.uri import split_s3_uri
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store

SCRATCH_BYTES = 2 * 1024**3  # minimum free space for copies of videos from S3
DECODERS = ("decord", "av")
DECIDING = ("python", "torch", "decord", "av", "pyarrow", "numpy")  # packages that must not differ


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The report of one node. `out` and `source` say what is wrong with them there; empty if nothing is."""

    host: str
    cpus: int
    scratch: str
    scratch_bytes: int
    software: dict[str, str]
    code: str
    decoders: tuple[str, ...]
    out: str
    source: str


def look_here(out_url: str, key: str, source: str, options: StoreOptions) -> NodeReport:
    """The report of this machine. `key` is an object that exists in OUT. An empty `out_url` or `source` is skipped."""
    scratch = tempfile.gettempdir()
    return NodeReport(
        platform.node(),
        usable_cpus(),
        scratch,
        shutil.disk_usage(scratch).free,
        software() | gpu_software(),
        code_digest(),
        tuple(name for name in DECODERS if _imports(name)),
        _read(out_url, key, options) if out_url else "",
        _reach(source, options) if source else "",
    )


def try_gpu() -> str:
    """Why NVDEC on the GPU of this process cannot be used, with the name of the machine; empty if it can."""
    why = not_here() or sample_problem()
    return f"--decoder nvdec on {platform.node()}: {why}" if why else ""


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library is missing
        return False
    return True


def _read(out_url: str, key: str, options: StoreOptions) -> str:
    try:
        store = open_store(out_url, options)
        if store.head(key) is not None:
            return ""
    except JobError as error:
        return str(error)
    remedy = "" if out_url.startswith("s3://") else "; use s3:// or a folder that all nodes share"
    return f"this node does not see what is in {store.url}{remedy}"


def _reach(source: str, options: StoreOptions) -> str:
    if not source.startswith("s3://"):
        return "" if os.path.exists(source) else f"{source} is not on this node"  # noqa: PTH110 - may hold any bytes
    bucket, prefix = split_s3_uri(source)
    try:
        next(open_store(f"s3://{bucket}", options).list(prefix), None)
    except JobError as error:
        return str(error)
    return ""


def objections(reports: Sequence[NodeReport], *, downloads: bool) -> list[str]:
    """The reasons not to start the job, one message each. `reports[0]` is the driver's own machine."""
    here, found = reports[0], list[str]()
    for node in reports:
        if node.code != here.code:
            found.append(f"{node.host} imports other code of p3d, pipeline or jobs; install the same version there")
        others = [name for name in DECIDING if node.software.get(name) != here.software.get(name)]
        if others:
            which = ", ".join(f"{name} {node.software.get(name)} (here {here.software.get(name)})" for name in others)
            found.append(f"{node.host} has other packages: {which}")
        if "av" not in node.decoders:
            found.append(f"{node.host} cannot import PyAV; install `av` there")
        if downloads and node.scratch_bytes < SCRATCH_BYTES:
            free = f"{node.scratch_bytes / 1e9:.1f} GB free in {node.scratch}"
            found.append(f"{node.host} has {free}, where videos from S3 are copied to; free some space, or set TMPDIR")
        found += [f"{node.host}: {problem}" for problem in (node.out, node.source) if problem]
    return list(dict.fromkeys(found))
