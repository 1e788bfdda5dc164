"""Verify an output on the nodes of a Ray cluster: each of its CPUs checks some shards at a time.

audit ──pieces of 256 shards──> a task on any node, which reads their files ──> an Audit of each, in order
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import RayError

from p3d.jobs.scheduler.cluster import Cluster, joined_cluster, refuse_unfit
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.dataset.verify import Audit, CheckPieces, Piece, audit_piece
from p3d.pipeline.errors import ClusterError, JobError, counted
from p3d.pipeline.recipe import PlanRecord, Recipe
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.storage.urls import open_store

AHEAD = 2  # pieces for each CPU that are sent, or whose result waits for those before it
LOOK_S = 5.0  # between two looks whether the cluster is still there
RETRIES = 3  # of a piece whose node was lost


@contextlib.contextmanager
def checked_on(
    address: str, url: str, recipe: Recipe, s3: StoreOptions, *, deep: bool, say: Callable[[str], None]
) -> Iterator[CheckPieces]:
    """What checks the shards of the output at `url` on a running cluster.

    ClusterError if the cluster cannot be joined or is lost, or if a node cannot read the output.
    """
    with joined_cluster(address) as cluster:
        say(f"joined {address}: {counted(cluster.machines.cpus, 'core')}")
        refuse_unfit(url, "job.json", "", s3)

        def check(pieces: Iterator[Piece]) -> Iterator[Audit]:
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(_check)
            pending = deque[Any]()
            for piece in pieces:
                pending.append(task.remote(url, s3, recipe, piece, deep))
                if len(pending) >= AHEAD * max(1, cluster.machines.cpus):
                    yield _answer(pending.popleft(), cluster)
            while pending:
                yield _answer(pending.popleft(), cluster)

        yield check


def _answer(reference: Any, cluster: Cluster) -> Audit:
    try:
        while not ray.wait([reference], timeout=LOOK_S)[0]:
            if lost := cluster.dead():  # a call to Ray would then block, and end this process
                raise ClusterError(f"the {lost} of the cluster no longer answers; verify again")
        found: Audit | JobError = ray.get(reference)
    except RayError as error:
        raise ClusterError(f"a node could not check its shards: {' '.join(str(error).split())[:300]}") from None
    if isinstance(found, JobError):
        raise found
    return found


def _check(url: str, s3: StoreOptions, recipe: Recipe, piece: Piece, deep: bool) -> Audit | JobError:
    """On a node: the audit of a piece, or the error for which it could not be made."""
    try:
        return audit_piece(open_store(url, s3), recipe, _manifest(url, s3, piece.plan), piece, deep=deep)
    except JobError as error:
        return error


@lru_cache(maxsize=1)
def _manifest(url: str, s3: StoreOptions, plan: PlanRecord) -> Manifest:
    """The manifest of a plan, which a process keeps for its next piece."""
    return Manifest(open_store(url, s3), plan)
