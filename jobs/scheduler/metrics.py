"""The Prometheus metrics of a run: a table of their names, and the class that counts.

    events of the scheduler ──hear──────────┐
    progress of shards ──look, done─────────┤ Metrics, in the driver ──every 10 s──> Ray's agent on its node
    the heartbeat's snapshot ──show─────────┘                                          http://NODE:PORT/metrics

Everything is counted in the driver, which receives all events anyway. Workers are killed when a run ends, and Ray sends
metrics every 10 s only, so their last values would be lost. Each worker would also add a series of its own.

Names follow Prometheus (base units last, `_total` for counters), and Ray puts `ray_` before them. Tags are closed sets
(output, failure reasons, stages, states), so a run has fewer than a hundred series for any archive. The path of a video
is never a tag.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from p3d.jobs.scheduler.control import RUNNING
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.scheduler.state import Checked, Event, ShardDone, ShardTrouble, WorkerDied
from p3d.jobs.worker.autoscale import LIMITS
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.extract import Progress

if TYPE_CHECKING:
    from p3d.jobs.worker.actor import Spent

PREFIX = "ray_"  # which Ray puts before every name
OUTPUT = "output"  # a tag of every metric; `job` is reserved by Prometheus


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric. `tags` are in addition to `output`; `buckets` are the upper bounds of a histogram, in its unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


VIDEOS = Metric("p3d_videos_total", "counter", "videos in shards that were committed, failed ones included")
CLIPS = Metric("p3d_clips_total", "counter", "clips in shards that were committed")
SHARDS = Metric("p3d_shards_total", "counter", "shards that were committed")
FAILED = Metric("p3d_failed_videos_total", "counter", "videos without rows in shards that were committed", ("reason",))
ENCODED = Metric(
    "p3d_encoded_clips_total", "counter", "clips that the network computed, also for shards in progress or lost"
)
READ = Metric("p3d_read_bytes_total", "counter", "size of the videos in shards that were committed")
WRITTEN = Metric("p3d_written_bytes_total", "counter", "size of the clips files that were committed")
STAGES = Metric(
    "p3d_stage_seconds_total",
    "counter",
    "`fetch` and `decode`: decodes that ended. `decode` includes waiting for the reader, and fetching if a video is "
    "shared. `encode`: inference, averaged over the inference threads. `commit`: writing and deriving. Each is summed "
    "over what runs concurrently",
    ("stage",),
)
WAIT = Metric(
    "p3d_wait_seconds_total",
    "counter",
    "waiting time of the shards in progress. `frames`: no frames for the next batch, so decoding is the bottleneck. "
    "`device`: a batch was ready and the network was busy, so the network is the bottleneck",
    ("kind",),
)
COMMIT = Metric(
    "p3d_commit_seconds",
    "histogram",
    "time per shard from its last feature to its three files",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0),
)
SHARD = Metric(
    "p3d_shard_seconds",
    "histogram",
    "time per shard from its first decode to its commit",
    buckets=(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0),
)
TROUBLE = Metric(
    "p3d_troubles_total",
    "counter",
    "`died`: a worker died; `outage`, `store`, `internal`, `job`: a shard was not done, for this kind of reason",
    ("kind",),
)
SHARDS_QUEUED = Metric("p3d_queued_shards", "gauge", "shards that are not assigned to a worker yet")
SHARDS_AT_WORK = Metric("p3d_working_shards", "gauge", "shards that workers are processing")
VIDEOS_LEFT = Metric("p3d_left_videos", "gauge", "videos of the job that are not done yet")
WORKERS = Metric("p3d_workers", "gauge", "workers by state: starting, idle, busy", ("state",))
LIMITED = Metric("p3d_limited_workers", "gauge", "busy workers by what limits them, as in `p3d status`", ("limit",))
ETA = Metric("p3d_eta_seconds", "gauge", "estimated time that is left, at the rate of this run so far")
PAUSED = Metric("p3d_paused", "gauge", "1 while the job waits for a store that does not answer")

METRICS = (
    *(VIDEOS, CLIPS, SHARDS, FAILED, ENCODED, READ, WRITTEN, STAGES, WAIT, COMMIT, SHARD, TROUBLE),
    *(SHARDS_QUEUED, SHARDS_AT_WORK, VIDEOS_LEFT, WORKERS, LIMITED, ETA, PAUSED),
)
WORKER_STATES = ("starting", "idle", "busy")


class Metrics:
    """The metrics of one run. An update takes about 2 microseconds. Without a Ray agent they are not exported."""

    def __init__(self, out_url: str) -> None:
        from ray.util import metrics as of_ray

        def of(metric: Metric) -> Any:
            tags = (OUTPUT, *metric.tags)
            if metric.kind == "histogram":
                return of_ray.Histogram(metric.name, metric.meaning, list(metric.buckets), tags)
            return (of_ray.Counter if metric.kind == "counter" else of_ray.Gauge)(metric.name, metric.meaning, tags)

        self.output = output_tag(out_url)
        self.series = {metric.name: of(metric) for metric in METRICS}
        self.seen: dict[ShardKey, Progress] = {}  # shards in progress -> their counters at the last update

    def hear(self, event: Event) -> None:
        """What an event of the scheduler adds to the totals."""
        match event:
            case ShardDone(_, _, n_videos, n_clips, failures):
                self._committed(n_videos, n_clips, failures)
            case Checked(shard, True, n_videos, n_clips, failures):
                self.seen.pop(shard, None)
                self._committed(n_videos, n_clips, failures)
            case WorkerDied():
                self._add(TROUBLE, 1, kind="died")
            case ShardTrouble(kind=kind) if kind != "withdrawn":  # a drain withdraws shards, which is not an error
                self._add(TROUBLE, 1, kind=kind)

    def _committed(self, n_videos: int, n_clips: int, failures: Iterable[tuple[str, int]]) -> None:
        self._add(SHARDS, 1)
        self._add(VIDEOS, n_videos)
        self._add(CLIPS, n_clips)
        for reason, n_failed in failures:
            self._add(FAILED, n_failed, reason=reason)

    def begin(self, shard: ShardKey) -> None:
        """A shard is given to a worker, perhaps not for the first time. Its counters start at 0."""
        self.seen[shard] = Progress()

    def look(self, in_hand: Mapping[ShardKey, Progress]) -> None:
        """Add the growth of the counters of shards in progress. Shards that have ended meanwhile are ignored."""
        for shard, now in in_hand.items():
            if shard in self.seen:
                self._grow(self.seen[shard], now)
                self.seen[shard] = now

    def _grow(self, before: Progress, now: Progress) -> None:
        grown = Progress(*(getattr(now, field.name) - getattr(before, field.name) for field in fields(Progress)))
        self._add(ENCODED, grown.clips)
        self._add(STAGES, grown.encode_s, stage="encode")
        self._add(WAIT, grown.wait_s, kind="frames")
        self._add(WAIT, grown.full_s, kind="device")

    def done(self, shard: ShardKey, spent: Spent) -> None:
        """A worker has committed a shard."""
        self.look({shard: spent.progress})
        self.seen.pop(shard, None)
        for stage, seconds in (("fetch", spent.fetch_s), ("decode", spent.decode_s), ("commit", spent.commit_s)):
            self._add(STAGES, seconds, stage=stage)
        self._add(READ, spent.read_bytes)
        self._add(WRITTEN, spent.written_bytes)
        self.series[COMMIT.name].observe(spent.commit_s, {OUTPUT: self.output})
        self.series[SHARD.name].observe(spent.shard_s, {OUTPUT: self.output})

    def show(self, snapshot: RunSnapshot) -> None:
        """Set the gauges from a heartbeat. All are zero after the end of the run."""
        states = Counter(worker.state for worker in snapshot.workers)
        limits = Counter(worker.limit for worker in snapshot.workers if worker.state == "busy")
        at_work = sum(len(worker.shards) for worker in snapshot.workers)
        left, over = snapshot.shards.all - snapshot.shards.done, snapshot.state != RUNNING
        now: dict[Metric, float | None] = {
            SHARDS_QUEUED: left - at_work,
            SHARDS_AT_WORK: at_work,
            VIDEOS_LEFT: snapshot.videos.all - snapshot.videos.done,
            PAUSED: bool(snapshot.outage),
        }
        if over or snapshot.eta_s is not None:  # not set until it is known
            now[ETA] = snapshot.eta_s
        for metric, value in now.items():
            self.series[metric.name].set(0 if over else value, {OUTPUT: self.output})
        for state in WORKER_STATES:
            self.series[WORKERS.name].set(0 if over else states[state], {OUTPUT: self.output, "state": state})
        for limit in LIMITS:
            self.series[LIMITED.name].set(0 if over else limits[limit], {OUTPUT: self.output, "limit": limit})

    def _add(self, metric: Metric, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses an increment of 0
            self.series[metric.name].inc(value, {OUTPUT: self.output, **tags})


def output_tag(out_url: str) -> str:
    """The last part of the output's URL, for people, and 8 hex digits of the URL's SHA-256, which make it unique.

    Ray takes ASCII alone in a tag.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out_url.rstrip("/").rpartition("/")[2])[:40]
    return f"{name}-{hashlib.sha256(out_url.encode(errors='surrogatepass')).hexdigest()[:8]}"


def endpoint() -> str:
    """The URL of this driver's metrics; empty without a Ray agent, or if the driver is not on a node (ray://)."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return ""
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return ""
