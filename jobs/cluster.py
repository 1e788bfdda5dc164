"""A Ray cluster to run on. Today: one of our own on this machine, started for the run and gone with it.

Ray puts the driver's working directory first on its workers' path, so a user's own `jobs/` or `pipeline.py` there
would shadow ours (measured). Hence paths are made absolute first, and Ray starts from a private empty folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.machine import is_alive, usable_cpus
from jobs.preflight import NodeReport, look_here, objections
from pipeline.errors import ClusterError
from pipeline.store import StoreOptions

Answer = TypeVar("Answer")
ASK_S = 60.0  # for a node to answer
RUN_PREFIX = "p3d-run-"
OBJECT_STORE_BYTES = 512 * 1024**2  # frames on their way: 2 blocks of 5 MB ahead per decode


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to run on; `scratch` is the private folder of this run."""

    cpus: int
    gpus: int
    scratch: Path
    node: Any  # Ray's record of the processes that it started for us

    def dead(self) -> str:
        """Which of the two processes that Ray cannot do without has ended; empty while both run.

        Ray itself would not say: calls that are under way simply never come back.
        """
        ended = {name for name, _ in self.node.dead_processes()}
        return " and ".join(name for name in ("raylet", "gcs_server") if name in ended)


@contextlib.contextmanager
def local_cluster(*, cpus: int | None = None) -> Iterator[Cluster]:
    """Start Ray here, on loopback, without a dashboard; stop it at the end, and remove the private folder."""
    _sweep_dead_runs()
    before = Path.cwd()
    scratch = Path(tempfile.mkdtemp(prefix=f"{RUN_PREFIX}{os.getpid()}-"))
    (scratch / "empty").mkdir()
    os.chdir(scratch / "empty")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report home
    _loopback_only()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
    try:
        try:
            ray.init(
                address="local",
                num_cpus=cpus or usable_cpus(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                namespace="p3d",
            )
        except Exception as error:  # Ray has no class for it
            raise ClusterError(
                f"Ray could not start on this machine ({' '.join(str(error).split())}). Usual reasons: little memory, "
                "a full /tmp or /dev/shm, a small `ulimit -n`; its logs are in /tmp/ray/session_latest/logs"
            ) from error
        resources, node = ray.cluster_resources(), ray._private.worker._global_node
        yield Cluster(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), scratch, node)
    finally:
        ray.shutdown()
        os.chdir(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _loopback_only() -> None:
    """Ray on Linux listens on all interfaces; told that clusters are not wanted, as on a Mac, on 127.0.0.1 alone."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when ray was imported


def _sweep_dead_runs() -> None:
    """Remove the private folders of runs on this machine whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*-*"):
        pid = folder.name.removeprefix(RUN_PREFIX).partition("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_unfit(out_url: str, key: str, source: str, options: StoreOptions) -> None:
    """ClusterError with a sentence for each node that cannot do its part."""
    if problems := inspect_nodes(out_url, key, source, options)[1]:
        raise ClusterError("; ".join(problems))


def inspect_nodes(out_url: str, key: str, source: str, options: StoreOptions) -> tuple[list[NodeReport], list[str]]:
    """What each node reports, and what stands against the job there."""
    question = (out_url, key, source, options)
    reports, silent = ask_nodes(look_here, *question)
    return reports, silent + objections([look_here(*question), *reports], downloads=source.startswith("s3://"))


def ask_nodes(question: Callable[..., Answer], *about: object) -> tuple[list[Answer], list[str]]:
    """The answers of all nodes that are alive, and a sentence for each one that did not answer."""
    asked = {
        ray.remote(num_cpus=0, max_retries=0)(question)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(*about): node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"]
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    answers, silent = list[Answer](), list[str]()
    for reference, host in asked.items():
        try:
            answers.append(ray.get(reference, timeout=0))
        except GetTimeoutError:
            silent.append(f"{host} did not answer within {ASK_S:g} s")
        except RayError as error:
            silent.append(f"{host} could not answer: {' '.join(str(error).split())[:300]}")
    return answers, silent
