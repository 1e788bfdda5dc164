"""Connects real code with the simulated world: clocks, threads, process numbers, signals, Ray, Arrow."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import main_thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

import p3d.jobs.scheduler.cluster
from p3d.jobs import job
from p3d.jobs.machine import Machines
from p3d.jobs.planning import prepare as planning
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.worker import actor as workers
from p3d.pipeline.dataset import commit, schema, summaries, verify
from p3d.pipeline.dataset import plans as manifest
from p3d.pipeline.recipe import JobRecord, PlanRecord, Recipe
from p3d.pipeline.storage import local as local_module
from p3d.pipeline.storage import store as store_module
from tests.sim import memory
from tests.sim.cluster import shard_error_of
from tests.sim.life import Life
from tests.sim.world import patched

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory, if available


def write(life: Life, path: Path, table: pa.Table, footer: dict[str, str]) -> None:
    """Write a file; other processes may run before it is read again."""
    life.step(f"has written {memory.written(path, table, footer)} bytes")


def thread(life: Life, *, target: Any, name: str, daemon: bool) -> Any:
    """Run a thread of the current process as a simulated process that ends with it."""
    return SimpleNamespace(start=lambda: life.spawn("thread", f"{life.current.name} {name}", target))


class OneThread:
    """Replaces ThreadPoolExecutor."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> OneThread:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@contextlib.contextmanager
def real_code_of(life: Life) -> Iterator[None]:
    """Replace clocks, process numbers, threads and Ray by the world's."""
    time = SimpleNamespace(monotonic=lambda: life.clock, sleep=life.wait)
    uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{life.rng.getrandbits(128):032x}"))
    again = lambda _: contextlib.nullcontext(life.store.scratch)  # noqa: E731
    quiet = lambda *_, **__: None  # noqa: E731
    cluster = SimpleNamespace(machines=Machines(2, 2, 0), scratch=life.store.scratch, dead=str, answers=lambda: True)
    with patched(
        (commit, "time", time),
        (schema, "write_parquet", partial(write, life)),
        (schema, "open_parquet", memory.opened),
        (schema, "outcomes_json", memory.outcomes_json),
        (schema, "parse_outcomes", memory.parse_outcomes),
        (manifest, "write_parquet", partial(write, life)),
        (verify, "scratch_folder", again),
        (Recipe, "digest", memory.recipe_digest),
        (JobRecord, "from_json", memory.job_record),
        (PlanRecord, "from_json", memory.plan_record),
        (store_module, "uuid", uuid),
        (local_module, "uuid", uuid),
        (control, "uuid", uuid),
        (control, "os", SimpleNamespace(getpid=lambda: life.current.number)),
        (control, "platform", SimpleNamespace(node=lambda: life.current.host)),
        (control, "boot_id", lambda: life.current.host),
        (control, "is_alive", lambda pid: any(p.number == pid and p.alive for p in life.processes)),
        (control.is_live, "__kwdefaults__", {"sleep": life.wait}),
        (job, "ThreadPoolExecutor", OneThread),
        (verify, "ThreadPoolExecutor", OneThread),
        (summaries, "BLOCK", 2),
        (planning, "golden_features", lambda _: np.zeros(8, np.float32)),
        (planning, "software", dict),
        (planning, "new_job_id", lambda: "0" * 32),
        (planning, "look_again", lambda table, *_, **__: table),
        (scheduler, "ray", life.ray),
        (scheduler, "time", time),
        (
            scheduler,
            "threading",
            SimpleNamespace(Thread=partial(thread, life), current_thread=main_thread, main_thread=main_thread),
        ),
        (scheduler, "code_digest", lambda: "code"),
        (scheduler, "RunLog", NoLog),
        (scheduler, "Metrics", NoMetrics),
        (scheduler, "endpoint", str),
        (scheduler, "signal", Signals(life)),
        (workers, "shard_error_of", partial(shard_error_of, life)),
        (p3d.jobs.scheduler.cluster, "local_cluster", lambda **_: contextlib.nullcontext(cluster)),
        (p3d.jobs.scheduler.cluster, "refuse_unfit", quiet),
    ):
        yield


class NoLog:
    """Replaces the log of a run, because its writes would only shift the faults of known seeds."""

    def __init__(self, *_: object) -> None: ...
    def add(self, sentence: str) -> None: ...
    def hear(self, event: object) -> None: ...
    def write(self, *, now: bool = False) -> None: ...


class NoMetrics:
    """Replaces the metrics that Ray would export."""

    def __init__(self, *_: object) -> None: ...
    def begin(self, *_: object) -> None: ...
    def look(self, *_: object) -> None: ...
    def hear(self, *_: object) -> None: ...
    def done(self, *_: object) -> None: ...
    def show(self, *_: object) -> None: ...


class Signals:
    """Replaces the module `signal` in a driver; only the main thread of a real process may use that module."""

    SIGINT, SIGTERM, Signals = signal.SIGINT, signal.SIGTERM, signal.Signals

    def __init__(self, life: Life) -> None:
        self.life = life

    def signal(self, number: int, handler: Any) -> None:
        if number == signal.SIGTERM:
            self.life.current.signals[:] = [lambda signum, frame: handler(signum, frame)] if handler else []
