"""Before a job starts: can every node do its part? Asked of each node by `scheduler.cluster.ask_nodes`, judged here.

A node must run this very code with the same packages, have a decoder, room for what it downloads, and read OUT and the
source through stores of its own: a folder of one machine is no output for a cluster of two.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from p3d.jobs.machine import code_digest, software, usable_cpus
from p3d.pipeline.errors import JobError
from p3d.pipeline.storage.s3.uri import split_s3_uri
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store

SCRATCH_BYTES = 2 * 1024**3  # free, at least, where videos from S3 are copied to
DECODERS = ("decord", "av")
DECIDING = ("python", "torch", "decord", "av", "pyarrow", "numpy")  # packages that must not differ


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node says of itself; `out` and `source` say what is wrong with them there, empty if nothing."""

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
    """The report of this machine. `key` is an object that is in OUT; an empty `out_url` or `source` is left out."""
    scratch = tempfile.gettempdir()
    return NodeReport(
        platform.node(),
        usable_cpus(),
        scratch,
        shutil.disk_usage(scratch).free,
        software(),
        code_digest(),
        tuple(name for name in DECODERS if _imports(name)),
        _read(out_url, key, options) if out_url else "",
        _reach(source, options) if source else "",
    )


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a library that it needs is not here
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
        return "" if os.path.exists(source) else f"{source} is not on this node"  # noqa: PTH110 - may be odd bytes
    bucket, prefix = split_s3_uri(source)
    try:
        next(open_store(f"s3://{bucket}", options).list(prefix), None)
    except JobError as error:
        return str(error)
    return ""


def objections(reports: Sequence[NodeReport], *, downloads: bool) -> list[str]:
    """Why the job should not start there, one sentence each; `reports[0]` is the driver's own machine."""
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
            found.append(f"{node.host} has {free}, where videos from S3 are copied to; make room, or set TMPDIR")
        found += [f"{node.host}: {problem}" for problem in (node.out, node.source) if problem]
    return list(dict.fromkeys(found))
