"""A job over up to 10^8 made videos with one driver: memory and time of plan, second plan, kill, resume and status.

    python -m bench.archive --videos 1e6           a minute
    python -m bench.archive --videos 1e8           about an hour, and up to 20 GB of disk

plan      rows enter as Arrow batches, as those of a listing do, and become a plan in OUT
again     the same rows and one in a hundred more: a second plan
launch    the real loop of a run, with workers that finish at once, until half of the shards are done; then SIGKILL
resume    the same in a new process: until its first shard is given out, and until another hundredth is done
status    what `p3d status` reads

The data files of shards are keys in memory, but for those of the shards that are done last before the kill: they are
real files, because a resume reads what no summary covers. Each step is a process of its own, whose memory is the most
that was resident. What a step has done is kept in --out, so a bench that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.rounds import REPO, Report, Table, parser_of
from bench.scheduler import NullRay, NullWorker
from p3d.jobs.job import glance, golden_key, look, manifests, read_job
from p3d.jobs.machine import Machines
from p3d.jobs.monitor.status import read_status
from p3d.jobs.planning.prepare import add_plan
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.worker.actor import Done, ShardError
from p3d.pipeline.dataset import summaries
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.files import FOLDERS
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.recipe import JobRecord, RunOptions, ShardSizing
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.sources.listing_buffer import FIELDS
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import ObjectInfo
from p3d.pipeline.types import ShardPlan, shard_name
from tests.pipeline.rows import recipe, shard_rows
from tests.sim.wiring import NoMetrics

SHARD_VIDEOS, WORKERS = 64, 8
REAL = 5  # blocks of a summary whose shards have real files, before and after the kill
BATCH = 1 << 16
STEPS = ("plan", "again", "launch", "resume", "status")
DONE = "done"  # of a plan: a file with one byte for each shard


class MadeVideos:
    """The rows of a listing, made when they are read: ids and versions look random and are a function of the row."""

    def __init__(self, n: int) -> None:
        self.num_rows = n

    def to_batches(self, max_chunksize: int | None = None) -> Iterator[pa.RecordBatch]:
        step = min(max_chunksize or BATCH, BATCH)
        for first in range(0, self.num_rows, step):
            yield self._batch(np.arange(first, min(first + step, self.num_rows), dtype=np.uint64))

    def _batch(self, row_N: np.ndarray) -> pa.RecordBatch:
        names = pa.array(row_N).cast(pa.string())
        paths = pa.compute.binary_join_element_wise(names, "mp4", ".")
        uris = pa.compute.binary_join_element_wise("s3://archive", paths, "/")
        ids = np.stack([_mixed(row_N), _mixed(row_N + np.uint64(1 << 40))], axis=1)
        n = len(row_N)
        columns: dict[str, pa.Array] = {
            "video_id": _hex(ids, 32),
            "path": paths,
            "uri": uris,
            "version": _hex(_mixed(row_N + np.uint64(1 << 41)), 16),
            "size_bytes": pa.array(np.full(n, 2_000_000)),
            "mtime_ns": pa.array(np.full(n, 1_700_000_000_000_000_000)),
            "etag": pa.nulls(n, pa.string()),
        }
        return pa.record_batch([columns[field.name] for field in FIELDS], schema=pa.schema(FIELDS))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Steele's splitmix64 of each value."""
    with np.errstate(over="ignore"):
        mixed = values * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _hex(values: np.ndarray, digits: int) -> pa.Array:
    """64-bit values as texts of hex digits."""
    text = np.ascontiguousarray(values.astype(">u8")).tobytes().hex().encode()
    offsets = np.arange(0, len(text) + 1, digits, dtype=np.int32)
    return pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))


class KeyStore(LocalStore):
    """A folder whose finished shards are one byte each in `done` files. Their data files are listed with made sizes."""

    def done(self, plan8: str, n_shards: int) -> np.memmap:
        path = self.root.parent / f"{DONE}-{plan8}"
        if not path.exists():
            path.write_bytes(bytes(n_shards))
        return np.memmap(path, np.uint8, "r+")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix.rstrip("/") not in FOLDERS:
            yield from super().list(prefix)
            return
        for path in sorted(self.root.parent.glob(f"{DONE}-*")):
            plan8 = path.name.removeprefix(f"{DONE}-")
            for shard in np.flatnonzero(np.memmap(path, np.uint8, "r")).tolist():
                yield ObjectInfo(f"{prefix}{shard_name(plan8, shard)}.parquet", 1, 0)


class KeyWorker(NullWorker):
    """A worker that finishes each shard at once, and really commits those in `real`."""

    store: KeyStore
    plans: dict[str, Manifest]
    real = range(0)

    def run_shard(self, shard: ShardPlan, user_columns: pa.Table, moved: None = None) -> Done | ShardError:
        manifest = self.plans[shard.plan8]
        if shard.plan_seq == 1 and shard.shard in self.real:
            rows = shard_rows(manifest, shard.shard, frames=(16,))
            commit_shard(self.store, rows, recipe(), user_columns)
        self.store.done(shard.plan8, manifest.plan.n_shards)[shard.shard] = 1
        return super().run_shard(shard, user_columns)


def step_plan(store: KeyStore, n: int) -> dict[str, float]:
    job = JobRecord(recipe(), "random:0", {})
    store.create("job.json", job.to_json())
    store.create(golden_key(job.recipe), b'{"features": [1.0]}')
    return _planned(store, n)


def step_again(store: KeyStore, n: int) -> dict[str, float]:
    return _planned(store, n + n // 100)


def _planned(store: KeyStore, n: int) -> dict[str, float]:
    found: Any = SourceListing(MadeVideos(n), ())  # type: ignore[arg-type] # what planning needs of a table
    plan = add_plan(store, read_job(store), found, sizing=ShardSizing(SHARD_VIDEOS), limit=None)
    assert plan is not None
    store.done(plan.plan8, plan.n_shards)
    return {"videos": plan.n_videos, "MB in OUT": sum(p.stat().st_size for p in store.root.glob("plans/*/*")) / 1e6}


def _loop(store: KeyStore, until: Callable[[int], bool], real: range) -> tuple[int, float]:
    """Run until `until` says so of the number of shards that were done; that number, and seconds to the first."""
    job, began = read_job(store), time.monotonic()
    plans = manifests(store, job)
    work = glance(store, plans) or look(store, plans)
    epoch = control.claim(store, {}, takeover=True, say=lambda _: None)
    KeyWorker.store, KeyWorker.plans, KeyWorker.real = store, {m.plan.plan8: m for m in plans.values()}, real

    class Ray(NullRay):
        def remote(self, *given: Any) -> Any:
            return self._actor(KeyWorker(given[0])) if not isinstance(given[0], type) else self

    scheduler.ray, scheduler.Metrics, scheduler.endpoint = Ray(), NoMetrics, str  # type: ignore[assignment,misc]
    cluster = Cluster(Machines(2, 2, 0), Path("/nowhere"))
    run = scheduler.RayLoop(store, job, plans, work, cluster, epoch, RunOptions(WORKERS, 2, 1, 1))
    handle, done, first = run.state.handle, 0, 0.0

    def looking(event: Any) -> Any:
        nonlocal done, first
        commands = handle(event)
        first = first or (time.monotonic() - began if any(map(_is_dispatch, commands)) else 0.0)
        done += isinstance(event, scheduler.ShardDone)
        if until(done) and not run.state.counting:
            raise StopIteration
        return commands

    run.state.handle = looking  # type: ignore[method-assign]
    with contextlib.suppress(StopIteration):
        run.loop()
    return done, first


def _real(n: int) -> range:
    half, around = n // SHARD_VIDEOS // 2, REAL * summaries.BLOCK
    return range(max(0, half - around), half + around)


def _is_dispatch(command: object) -> bool:
    return isinstance(command, scheduler.Dispatch)


def step_launch(store: KeyStore, n: int) -> dict[str, float]:
    half = n // SHARD_VIDEOS // 2
    done, first = _loop(store, lambda done: done >= half, _real(n))
    return {"shards done": done, "s to the first shard": first}


def step_resume(store: KeyStore, n: int) -> dict[str, float]:
    more = max(1, n // SHARD_VIDEOS // 100)
    done, first = _loop(store, lambda done: done >= more, _real(n))
    return {"shards done": done, "s to the first shard": first}


def step_status(store: KeyStore, n: int) -> dict[str, float]:
    status = read_status(store, read_job(store), over=True)
    return {"videos done": status.videos_done, "videos": status.videos_all}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--videos", type=lambda text: int(float(text)), default=1_000_000)
    parser.add_argument("--block", type=int, default=summaries.BLOCK, help="shards of a summary")
    parser.add_argument("--keep", action="store_true", help="keep the output")
    parser.add_argument("--step", choices=STEPS, help="run one step in this process")
    given = parser.parse_args()
    summaries.BLOCK = given.block
    folder = given.out / f"archive-{given.videos}"
    store = KeyStore(str((folder / "OUT").absolute()))
    if given.step:
        began = time.monotonic()
        found = globals()[f"step_{given.step}"](store, given.videos)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        (folder / f"{given.step}.json").write_text(json.dumps({"s": time.monotonic() - began, "MB": peak, **found}))
        if given.step == "launch":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in STEPS:
        path = folder / f"{step}.json"
        if not path.exists():
            options = {"step": step, "videos": given.videos, "out": given.out, "block": given.block}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            code = subprocess.run([sys.executable, "-m", "bench.archive", *words], cwd=REPO).returncode
            if code != (-signal.SIGKILL if step == "launch" else 0):
                raise SystemExit(f"{step} ended with exit code {code}")
        got = json.loads(path.read_text())
        more = (f"{name}: {value:,.1f}".removesuffix(".0") for name, value in got.items() if name not in ("s", "MB"))
        rows.append((step, f"{got['s']:.1f}", f"{got['MB']:.0f}", ", ".join(more)))
        print(rows[-1], file=sys.stderr, flush=True)
    report = Report("archive", f"A job of {given.videos:,} videos")
    report.add(Table("One driver", ("step", "s", "MB resident, at most", ""), tuple(rows)))
    print(report)
    report.write(given.out)
    if not given.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
