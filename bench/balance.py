"""What it brings that decodes go where they are needed: two workers, of which one has a network that is much slower.

    python -m bench.balance [--rounds 3]

Eight processors are declared, and a decode sleeps instead of computing, so that two real cores are enough. One arm lets
each worker have as many decodes as seem best; the other gives both four for ever. The network of one worker takes 7
clips a second, that of the other as many as come. Then the same with two slow ones and with none, and what
`p3d status` names as the limit meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import p3d.jobs.scheduler.cluster
from bench import corpus, weights
from bench.launching import launch
from bench.null import NullWorker
from bench.rounds import REPO, Report, take_turns
from p3d.jobs.cli import main
from p3d.jobs.job import read_job
from p3d.jobs.monitor.status import Status, read_status
from p3d.jobs.planning import prepare as planning
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.worker import decode_task, decoding
from p3d.jobs.worker.balance import Balance
from p3d.jobs.worker.message_batches import MessageBatch
from p3d.pipeline.errors import JobError
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FLOAT32, INT64, UINT8, FrameBlock

CPUS = 8
BLOCK_S = 0.5  # that a decode sleeps for a block of 64 frames
SLOW_S = 0.15  # that the slow network takes for a clip
# environment: no change of slots; the files that slow workers make, by the start of their names; how many are slow
FIXED, CLAIMS, SLOW = "P3D_BENCH_FIXED", "P3D_BENCH_CLAIMS", "P3D_BENCH_SLOW"
KINDS = {"bound by decoding": 0, "bound by the network": 2, "one worker of each": 1}  # and how many are slow


def sleepy(*given: Any) -> Iterator[MessageBatch]:
    """`decode_video`, whose time is slept."""
    for message in decode_task.decode_video(*given):
        if isinstance(message, FrameBlock):
            time.sleep(BLOCK_S)
        yield (message,)


def _claimed(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Uneven(NullWorker):
    """The first that start have the slow network."""

    def setup(self) -> Any:
        import ray

        ready = super().setup()
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": decode_task.BLOCKS_AHEAD}
        decoding._decode_video = ray.remote(num_cpus=1, max_retries=0, **options)(sleepy)
        decoding.GROUP_VIDEOS = 1
        if os.environ.get(FIXED):
            Balance.sample = lambda balance, *_: balance.concurrency  # type: ignore[method-assign]
        if not any(_claimed(f"{os.environ[CLAIMS]}{n}") for n in range(int(os.environ[SLOW]))):
            return ready
        quick = self.encoder.encode

        def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
            time.sleep(SLOW_S * len(index_BT))
            return quick(frames_NHWC, index_BT)

        self.encoder.encode = encode
        return ready


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        source = corpus.make(folder / "videos", given.videos, (120, 160), 160, 16)
        longer = corpus.make(folder / "longer", 48, (120, 160), 640, 16)
        path = weights.make(folder, "p3d63", 64)
        outs = (folder / f"out{n}" for n in count())

        def job(out: Path, slow: int, fixed: str = "", videos: Path = source, shard: int = 4) -> float:
            os.environ |= {FIXED: fixed, CLAIMS: str(out) + "-claim", SLOW: str(slow)}
            words = ("--weights", path, "--workers", 2, "--shard-videos", shard, "--decoder", "pyav")
            return launch(videos, str(out), *words, module="bench.balance").clips_per_s

        report = Report("balance", "Decodes where they are needed")
        arms = {"four decodes each": lambda: job(next(outs), 1, "1"), "as many as needed": lambda: job(next(outs), 1)}
        found = take_turns(arms, given.rounds, "clips/s", warm=False)
        report.add(found.table("A worker with a slow network beside one with a fast one", "four decodes each"))
        report.add(looks({name: partial(job, slow=slow, videos=longer, shard=6) for name, slow in KINDS.items()}, outs))
        print(report.write(given.out))


def looks(kinds: dict[str, Callable[[Path], float]], outs: Iterator[Path]) -> str:
    """What `p3d status` says of each kind of job while it runs."""
    lines = [
        "### What `p3d status` says",
        "",
        "| the job | named as the limit, in so many of the looks | decode slots of a worker, at first | at last |",
        "| --- | --- | --- | --- |",
    ]
    for kind, job in kinds.items():
        seen = watch(next(outs), job)
        limits = ", ".join(f"{limit} {n}" for limit, n in Counter(one.limit for one in seen).most_common())
        concurrency = [
            " and ".join(str(worker["load"]["concurrency"]) for worker in at.workers) for at in (seen[0], seen[-1])
        ]
        lines.append(f"| {kind} | {limits} of {len(seen)} | {concurrency[0]} | {concurrency[1]} |")
    return "\n".join(lines)


def watch(out: Path, job: Callable[[Path], float]) -> list[Status]:
    """Look at a job every second, as `p3d status --watch` does, while both of its workers are busy."""
    seen: list[Status] = []
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(job, out)
        while not running.done():
            time.sleep(1)
            try:
                store = open_store(str(out))
                status = read_status(store, read_job(store))
            except JobError:  # there is no job yet
                continue
            if sum(worker["limit"] is not None and worker["state"] == "busy" for worker in status.workers) == 2:
                seen.append(status)
        running.result()
    return seen


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules["__main__"])
        cloudpickle.register_pickle_by_value(sys.modules["bench.null"])
        scheduler.ShardWorker = Uneven  # type: ignore[misc]
        p3d.jobs.scheduler.cluster.usable_cpus = planning.usable_cpus = lambda: CPUS
        main()
    else:
        measure()
