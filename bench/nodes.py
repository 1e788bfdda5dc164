"""How much of 8 nodes a job uses: clips/s on 1, 2, 4 and 8 nodes whose GPUs and decodes sleep, over one of them.

    python -m bench.nodes                   3 rounds of 1, 2, 4 and 8 nodes, some ten minutes
    python -m bench.nodes --nodes 1 2       fewer
    P3D_ADAPT=1 python -m bench.nodes       workers may give decode slots back, as they do (`p3d.jobs.worker.balance`)

Every node is a raylet of its own with 2 CPUs and 1 GPU declared. Run, Scheduler, ShardWorker, decodes as Ray tasks and
the commit to a folder are real; the network sleeps a second for a batch of 4 clips, a decode 0.3 s for a video.
Sleeping needs no core, so the nodes do not compete for the two that are here, but for what P3D and Ray do. All workers
begin at once, and the time is from there to the verdict. Each worker has so many shards, whatever their number.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import bench.nodes as me  # by name: functions of a main module could not be told to Ray by value
from bench.dispatch import shard
from bench.rounds import REPO, Report, Table, take_turns
from p3d.jobs.job import golden_key, look
from p3d.jobs.machine import Machines
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.scheduler.control import Epoch
from p3d.jobs.scheduler.state import WorkerReady
from p3d.jobs.worker.actor import Ready, ShardWorker
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD, DecodeSpec
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.pipeline.extract import InferenceThreads
from p3d.pipeline.recipe import JobRecord, RunOptions
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types import FLOAT32, INT64, UINT8, FrameBlock, VideoEnd, VideoInfo, VideoRef, VideoStart
from tests.pipeline.rows import DIM, planned, recipe

BATCH, BATCH_S = 4, 1.0
DECODE_S = 0.3  # of a video; one decode at a time is enough for the network, with something to spare
CLIPS = 2  # of a video
SHARD_VIDEOS = 8
CONCURRENCY = 2  # decodes at a time of each worker
ADAPT = bool(os.environ.get("P3D_ADAPT"))


def sleep_and_send(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Any = None
) -> Iterator[MessageBatch]:
    """A decode that takes its time, and no core."""
    yield (VideoStart(os.getpid()),)
    time.sleep(DECODE_S)
    n = 16 * CLIPS
    times = np.arange(n) / 25
    info = VideoInfo(n, 8, 8, 0, 25.0, n / 25, "mp4", "h264", 0, "none")
    block = FrameBlock(np.arange(n), times, times + 0.04, np.zeros((n, 8, 8, 3), np.uint8))
    yield from message_batches(iter([info, block, VideoEnd(n, n / 25)]))


class Sleeper:
    """A network that takes its time, and no core."""

    device, batch_size = "sleep", BATCH

    def encode(self, frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        time.sleep(BATCH_S)
        return np.ones((len(index_BT), DIM), np.float32)


class SleepingWorker(ShardWorker):
    """A ShardWorker with such a network and such decodes, whose processes are there; it is ready when all are."""

    def setup(self) -> Ready:
        import ray

        from p3d.jobs.worker import decoding

        decoding._decode_video = ray.remote(
            num_cpus=1, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=BLOCKS_AHEAD
        )(sleep_and_send)
        decoding.GROUP_VIDEOS = 1  # a task a video, as for videos that are not short
        self.encoder: Any = Sleeper()
        self.inference_threads = InferenceThreads(1)
        if not ADAPT:
            self.balance.least = CONCURRENCY
        for _ in decoding.Decoding(shard(0, 2 * CONCURRENCY), self.spec.decoding, self.scratch).messages():
            pass  # the processes that decode are there
        here = Path(self.spec.scratch) / "ready"
        here.mkdir(exist_ok=True)
        (here / str(os.getpid())).touch()
        while len(list(here.iterdir())) < self.spec.options.workers:
            time.sleep(0.05)
        return Ready("sleep", platform.node(), os.getpid())


def clips_per_s(nodes: int, shards_each: int) -> float:
    """One job on the nodes that are there, a worker on each."""
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as folder:
        store, job = LocalStore(f"{folder}/out"), JobRecord(recipe(), "random:0", {})
        n_videos = nodes * shards_each * SHARD_VIDEOS
        manifest = planned(store, [f"{at:032x}" for at in range(n_videos)], shard_videos=SHARD_VIDEOS)
        store.create(golden_key(job.recipe), b'{"features": [1.0]}')
        cluster: Any = Cluster(Machines(CONCURRENCY * nodes, CONCURRENCY, nodes), Path(folder))
        options = RunOptions(nodes, BATCH, 1, CONCURRENCY, device="cuda")
        epoch = Epoch(1, platform.node(), "", os.getpid(), "", {})
        with patch.object(scheduler, "ShardWorker", me.SleepingWorker):
            run = scheduler.RayLoop(store, job, {1: manifest}, look(store, {1: manifest}), cluster, epoch, options)
            began, handle = list[float](), run.state.handle

            def looking(event: Any) -> Any:
                if isinstance(event, WorkerReady):
                    began.append(time.perf_counter())
                return handle(event)

            run.state.handle = looking  # type: ignore[method-assign]
            finish = run.loop()
        seconds = time.perf_counter() - began[0]
        assert finish.exit_code == 0 and run.state.totals.clips == CLIPS * n_videos, finish
        print(f"{nodes} nodes: {seconds:.1f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        return CLIPS * n_videos / seconds


class Nodes:
    """As many raylets as one asks for."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.of = {"num_cpus": CONCURRENCY, "num_gpus": 1, "object_store_memory": 100 * 1024**2}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=self.of)
        self.more: list[Any] = []

    def set(self, n: int) -> None:
        while len(self.more) + 1 < n:
            self.more.append(self.cluster.add_node(**self.of))
        while len(self.more) + 1 > n:
            self.cluster.remove_node(self.more.pop())
        self.cluster.wait_for_nodes()

    def stop(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def main() -> int:
    from ray import cloudpickle

    from p3d.jobs.scheduler.cluster import _loopback_only

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--shards-each", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _loopback_only()
    cloudpickle.register_pickle_by_value(me)
    nodes = Nodes()

    def arm(n: int) -> float:
        nodes.set(n)
        return clips_per_s(n, given.shards_each) / n

    try:
        arms = {f"{n} nodes": lambda n=n: arm(n) for n in given.nodes}
        found = take_turns(arms, given.rounds, "clips/s a node", warm=False)
    finally:
        nodes.stop()
    report = Report("nodes", "Nodes that sleep")
    report.add(found.table("Clips/s a node", f"{given.nodes[0]} nodes"))
    ideal = BATCH / BATCH_S
    shares = ((arm, f"{100 * found.spread(arm).median / ideal:.1f}%") for arm in found.of)
    report.add(Table(f"Of the {ideal:g} clips/s that a network asleep allows", ("arm", "share"), tuple(shares)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
