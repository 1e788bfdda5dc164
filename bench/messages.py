"""What Ray asks for a message of a decode and for its task: processor time of all processes, by size of the message.

python -m bench.messages
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.family import cpu_s
from bench.rounds import REPO, Report, Table
from p3d.jobs.scheduler.cluster import local_cluster

STREAMS = 2  # at a time


@dataclass(frozen=True, slots=True)
class Case:
    """`count` messages of `size_bytes` each, so many of them by one task."""

    name: str
    count: int
    size_bytes: int
    a_task: int


CASES = (
    Case("small messages", 600, 0, 300),
    Case("0.8 MB, 64 frames of 64x64", 600, 800_000, 300),
    Case("5 MB, 64 frames of 160x160", 200, 4_915_200, 100),
    Case("tasks of one small message", 300, 0, 1),
)


def stream(count: int, size_bytes: int) -> Iterator[Any]:
    import numpy as np

    frames = np.zeros(size_bytes, np.uint8)
    for _ in range(count):
        yield frames if size_bytes else None


class Reader:
    """An actor that submits streams and reads them, as a ShardWorker does."""

    def read(self, case: Case) -> None:
        import ray

        task = ray.remote(num_cpus=1, num_returns="streaming", _generator_backpressure_num_objects=2)(stream)
        left, live = case.count, []
        while left or live:
            while left and len(live) < STREAMS:
                live.append(task.remote(case.a_task, case.size_bytes))
                left -= case.a_task
            for one in ray.wait(live, num_returns=1)[0]:
                try:
                    ray.get(next(one))
                except StopIteration:
                    live.remove(one)


def everybody() -> dict[int, float]:
    """CPU seconds so far of this process and all that Ray started for it."""
    me = psutil.Process()
    return {pid: cpu_s(pid) for pid in [os.getpid(), *(child.pid for child in me.children(recursive=True))]}


def main() -> int:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    report, rows = Report("messages", "Ray's messages"), []
    with local_cluster():
        reader = ray.remote(num_cpus=0)(Reader).remote()
        ray.get(reader.read.remote(Case("warm", 20, 0, 10)))
        for case in CASES:
            before = everybody()
            ray.get(reader.read.remote(case))
            took = sum(now - before.get(pid, 0.0) for pid, now in everybody().items())
            rows.append((case.name, str(case.count), f"{1e3 * took / case.count:.2f}"))
    report.add(Table("Processor time of all processes", ("what", "count", "ms each"), tuple(rows)))
    print(report.write(Path(REPO / "bench" / "out")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
