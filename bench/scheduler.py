"""The driver alone: shards per second through the real `RayLoop` and its Scheduler, and the growth of its memory.

    python -m bench.scheduler                     100 000 shards of 64 videos, 8 and 1 000 workers; 20 000 over real Ray
    python -m bench.scheduler --only machine      one part of it: machine, run, ray

machine   the Scheduler without a loop: microseconds per event
run       the whole loop of `scheduler.loop` over workers that finish at once, one answer per round, and a null store
ray       the same loop over real Ray actors that do nothing: CPU time of the driver per shard

Each part runs in its own process. The plan is a real one of 1 000 shards, given out repeatedly.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from bench.rounds import REPO, Report, Spread, Table, parser_of
from p3d.jobs.job import Work, golden_key, look
from p3d.jobs.machine import Machines
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.scheduler.control import Epoch
from p3d.jobs.scheduler.state import Dispatch, Scheduler, ShardDone, StartWorker, WorkerReady
from p3d.jobs.worker.actor import Done, Ready, Refused, ShardError, ShardWorker, Spent
from p3d.jobs.worker.autoscale import Load
from p3d.pipeline.dataset.plans import Manifest, NewestPlans
from p3d.pipeline.dataset.summaries import Summaries
from p3d.pipeline.dataset.totals import Ended, ShardKey, ShardSet
from p3d.pipeline.extract import Progress
from p3d.pipeline.recipe import JobRecord, RunOptions
from p3d.pipeline.storage.store import ObjectInfo
from p3d.pipeline.types import ShardPlan
from tests.pipeline.rows import planned, recipe
from tests.sim.store import MemoryStore
from tests.sim.wiring import NoMetrics

NOTHING = Spent(Progress(), 0.0, 0.0, 0.0, 0.0, 0, 0)
PLANNED = 1000  # shards of the real plan
LOOKS = (0.1, 0.5, 1.0)  # shares of the job at which memory is measured


class NullStore(MemoryStore):
    """Keeps the given objects, and only the sizes of what the run writes."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__()
        self.objects, self.sizes = objects, dict[str, int]()

    def replace(self, key: str, content: bytes) -> None:
        name = key.split("/")[1]
        self.sizes[name] = max(len(content), self.sizes.get(name, 0))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(())


class FullStore(NullStore):
    """Lists every shard as committed."""

    names: Sequence[str] = ()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (ObjectInfo(prefix + name, 1, 0) for name in self.names)


class Repeated:
    """A real manifest that repeats its shards without end."""

    def __init__(self, manifest: Manifest, n_shards: int) -> None:
        self.manifest = manifest
        self.plan = replace(manifest.plan, n_shards=n_shards)
        self.each = manifest.plan.n_videos // manifest.plan.n_shards

    def shard(self, shard: int) -> ShardPlan:
        return self.manifest.shard(shard % PLANNED)

    def user_columns(self, shard: int) -> pa.Table:
        return self.manifest.user_columns(shard % PLANNED)

    def n_videos(self, shard: int) -> int:
        return self.each

    def span(self, shard: int) -> tuple[int, int]:
        return shard * self.each, (shard + 1) * self.each

    def moved(self, shard: ShardPlan) -> None:
        return None


class NullWorker(ShardWorker):
    """A worker that finishes each shard at once."""

    def __init__(self, spec: Any) -> None:
        self.spec, self.in_hand = spec, {}

    def setup(self) -> Ready | Refused:
        return Ready("none", platform.node(), os.getpid())

    def progress(self, most_decodes: int) -> tuple[dict[tuple[int, int], Progress], Load]:
        return {}, Load()

    def run_shard(self, shard: ShardPlan, user_columns: pa.Table, moved: None = None) -> Done | ShardError:
        return Done(tuple(Ended(video.video_id, 1, None) for video in shard.videos), NOTHING)


class Answer:
    """A result that is ready."""

    def __init__(self, value: Any) -> None:
        self.value = value


class NullRay:
    """The part of Ray's interface that `scheduler.loop` uses, in this process; answers come one at a time, in order."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()

    def remote(self, *given: Any) -> Any:
        return self._actor(NullWorker(given[0])) if not isinstance(given[0], type) else self

    def options(self, **_: Any) -> NullRay:
        return self

    def _actor(self, worker: NullWorker) -> Any:
        def call(method: Callable[..., Any]) -> Any:
            def remote(*given: Any) -> Any:
                self.answers.append(Answer(method(*given)))
                return self.answers[-1]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(
            **{name: call(getattr(worker, name)) for name in ("setup", "run_shard", "progress", "drain")}
        )

    def wait(self, refs: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return ([], refs) if timeout else ([self.answers.popleft()], [])

    def get(self, ref: Answer) -> Any:
        return ref.value

    def kill(self, actor: Any, *, no_restart: bool) -> None: ...


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Replace Ray, and the metrics that it exports, in `scheduler.loop`. The store keeps nothing, so the check of it at
    the end of a run is left out.
    """
    unchecked = patch.object(scheduler.RayLoop, "_confirmed", lambda _, finish: finish)
    with patch.multiple(scheduler, ray=NullRay(), Metrics=NoMetrics, endpoint=str), unchecked:
        yield


def run_of(shards: int, workers: int, shard_videos: int, cluster: Any = None, **options: Any) -> scheduler.RayLoop:
    """A run of `shards` shards over a store that keeps nothing of what is written."""
    store, job = MemoryStore(), JobRecord(recipe(), "random:0", {})
    manifest = planned(store, [f"{n:032x}" for n in range(PLANNED * shard_videos)], shard_videos=shard_videos)
    store.objects[golden_key(job.recipe)] = b'{"features": [1.0]}'
    todo = [ShardKey(1, at) for at in range(shards)]
    manifests: Any = {1: Repeated(manifest, shards)}
    none = ShardSet({1: np.zeros(shards, bool)})
    summaries = Summaries(NullStore({}), manifests, none)
    work = Work(todo, [], none, shards * shard_videos, shards, NewestPlans([]), summaries)
    cluster = cluster or Cluster(Machines(2, 2, 0), Path("/nowhere"))
    epoch = Epoch(1, platform.node(), "", os.getpid(), "", {})
    return scheduler.RayLoop(
        NullStore(store.objects), job, manifests, work, cluster, epoch, RunOptions(workers, 2, 1, 1, **options)
    )


def watched(run: scheduler.RayLoop, shards: int) -> list[tuple[int, float]]:
    """Run to the end; (shards done, MB of this process) at each of LOOKS."""
    looks, seen, handle = deque(int(share * shards) for share in LOOKS), list[tuple[int, float]](), run.state.handle

    def looking(event: Any) -> Any:
        commands = handle(event)
        if looks and shards - len(run.state.open) >= looks[0]:
            seen.append((looks.popleft(), rss_mb()))
        return commands

    run.state.handle = looking  # type: ignore[method-assign]
    finish = run.loop()
    assert finish.exit_code == 0 and not run.state.open, finish
    return seen


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def part_machine(shards: int, workers: int, shard_videos: int) -> dict[str, Any]:
    """The Scheduler without a loop: every event of a job without failures."""
    manifests: Any = {1: SimpleNamespace(plan=SimpleNamespace(seq=1, plan8="0" * 8, n_shards=shards, n_videos=shards))}
    before = rss_mb()
    work = look(NullStore({}), manifests)
    machine = Scheduler(work.todo, n_workers=workers, n_videos=shards, shards_each=2)
    held = rss_mb() - before
    done = FullStore({})
    done.names = [f"{'0' * 8}-{at:09d}.parquet" for at in range(shards)]
    before = rss_mb()
    resumed = look(done, manifests)
    kept = rss_mb() - before
    assert not resumed.todo
    commands, flying, events = machine.start(), deque[Dispatch](), 0
    started = time.process_time()
    while machine.finished is None:
        for command in commands:
            if isinstance(command, StartWorker):
                flying.append(Dispatch(command.worker, ShardKey(0, 0)))
            elif isinstance(command, Dispatch):
                flying.append(command)
        next_ = flying.popleft()
        key = next_.shard
        event = ShardDone(next_.worker, key, shard_videos, shard_videos) if key.plan_seq else WorkerReady(next_.worker)
        commands, events = machine.handle(event), events + 1
    us = 1e6 * (time.process_time() - started) / events
    return {"us": us, "bytes": 1e6 * held / shards, "kept": 1e6 * kept / shards}


def part_run(shards: int, workers: int, shard_videos: int) -> dict[str, Any]:
    """The loop over workers and a store without cost."""
    with without_ray():
        run = run_of(shards, workers, shard_videos)
        started, cpu = time.perf_counter(), time.process_time()
        seen = watched(run, shards)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    sizes = run.store.sizes  # type: ignore[attr-defined]
    return {"per_s": shards / wall_s, "us": 1e6 * cpu_s / shards, "seen": seen, **sizes}


def part_ray(shards: int, workers: int, shard_videos: int) -> dict[str, Any]:
    """The loop over real actors, which share its cores."""
    from ray import cloudpickle

    import bench.scheduler as me
    from p3d.jobs.scheduler.cluster import local_cluster

    cloudpickle.register_pickle_by_value(me)
    with local_cluster() as cluster, patch.object(scheduler, "ShardWorker", me.NullWorker):
        run = run_of(shards, workers, shard_videos, cluster)
        started, cpu = time.perf_counter(), time.process_time()
        seen = watched(run, shards)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        return {"per_s": shards / wall_s, "us": 1e6 * cpu_s / shards, "seen": seen, **calls_of_ray()}


def calls_of_ray(n: int = 2000, times: int = 100) -> dict[str, float]:
    """CPU us of two costs that grow with the workers: a small call, and a poll of n pending results per round."""
    import ray

    never = ray.remote(resources={"nowhere": 1})(rss_mb)
    actor = ray.remote(num_cpus=0)(NullWorker).remote(None)
    ready = actor.progress.remote(1)
    pending = [ready, *(never.remote() for _ in range(n))]
    ray.get(ready)
    started = time.process_time()
    for _ in range(times):
        ray.wait(pending, num_returns=1, timeout=scheduler.POLL_S)
        ray.wait(pending, num_returns=len(pending), timeout=0)
    looked = time.process_time()
    for _ in range(times):
        ray.get([actor.progress.remote(1) for _ in range(16)])
    called = time.process_time()
    return {"look_us": 1e6 * (looked - started) / times, "call_us": 1e6 * (called - looked) / times / 16}


PARTS = {"machine": part_machine, "run": part_run, "ray": part_ray}


def measure(part: str, shards: int, workers: int, shard_videos: int) -> dict[str, Any]:
    """Measure one part in its own process."""
    words = ["--part", part, "--shards", str(shards), "--workers", str(workers), "--shard-videos", str(shard_videos)]
    done = subprocess.run([sys.executable, "-m", "bench.scheduler", *words], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with exit code {done.returncode}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help="run one part in this process")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 1000])
    parser.add_argument("--shard-videos", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.shards, given.workers[0], given.shard_videos)))
        return 0
    report, found = Report("scheduler", "The driver alone"), dict[tuple[str, int], list[dict[str, Any]]]()
    cases = [(part, n) for part in ("machine", "run") for n in given.workers] + [("ray", min(given.workers))]
    for number in range(given.rounds):
        for part, workers in cases:
            if given.only in (None, part):
                shards = given.shards // 5 if part == "ray" else given.shards
                got = measure(part, shards, workers, given.shard_videos)
                found.setdefault((part, workers), []).append(got)
                print(f"round {number + 1}, {part}, {workers} workers: {got}", file=sys.stderr, flush=True)
    rows = []
    for (part, workers), rounds in found.items():
        rate = str(Spread.of(got["per_s"] for got in rounds)) if part != "machine" else ""
        a_core = str(Spread.of(1e6 / got["us"] for got in rounds))
        rows.append((part, str(workers), str(Spread.of(got["us"] for got in rounds)), a_core, rate))
    columns = ("part", "workers", "CPU us per shard", "shards/s of one core", "shards/s here, elapsed")
    report.add(Table(f"Shards of {given.shard_videos} videos; of the machine, per event", columns, tuple(rows)))
    rows = [
        (part, str(workers), ", ".join(f"{mb:.0f} MB at {n}" for n, mb in rounds[0]["seen"]))
        for (part, workers), rounds in found.items()
        if part != "machine"
    ]
    report.add(Table("Memory of the driver", ("part", "workers", "resident after n shards"), tuple(rows)))
    for (part, _), rounds in found.items():
        if part == "ray":
            rows = [
                ("a small call of an actor", str(Spread.of(got["call_us"] for got in rounds))),
                ("a poll of 2 000 pending results", str(Spread.of(got["look_us"] for got in rounds))),
            ]
            report.add(Table("Ray, CPU us of the driver", ("what", "us"), tuple(rows)))
    rows = []
    for (part, workers), rounds in found.items():
        if part == "machine" and workers == min(given.workers):
            rows += [("memory, an open shard", f"{rounds[0]['bytes']:.0f}")]
            rows += [("memory, a shard that was done before the resume", f"{rounds[0]['kept']:.0f}")]
    for (part, workers), rounds in found.items():
        if part == "run":
            rows += [(f"largest of {name}, {workers} workers", str(rounds[0][name])) for name in ("heartbeats", "logs")]
    if rows:
        report.add(Table("Bytes", ("what", "bytes"), tuple(rows)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
