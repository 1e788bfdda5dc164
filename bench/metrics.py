"""What the numbers for Prometheus cost the driver of a run: microseconds a shard, a look at a worker, and all gauges.

    python -m bench.metrics              from the repository's root; a Ray of its own, whose agent really is sent them

The driver alone counts (`scheduler/metrics.py`), so this is all that a job pays, besides Ray's own sending every 10 s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from p3d.jobs.scheduler.cluster import local_cluster
from p3d.jobs.scheduler.metrics import Metrics
from p3d.jobs.scheduler.state import ShardDone
from p3d.jobs.shards import ShardKey
from p3d.jobs.worker.actor import Spent
from p3d.pipeline.extract import Progress

ROUNDS, TIMES = 20, 200
ONE, OTHER = ShardKey(1, 0), ShardKey(1, 1)
SNAPSHOT = {
    "state": "running",
    "workers": [{"state": "busy", "limit": "network", "shards": ["1/0", "1/1"]}] * 8,
    "shards": {"all": 900, "done": 100},
    "videos": {"all": 9000, "done": 1000},
    "eta_s": 3.0,
    "outage": "",
}


def main() -> None:
    with local_cluster():
        metrics = Metrics("s3://results/run1")

        def shard(at: int) -> None:
            metrics.begin(ONE)
            metrics.done(ONE, Spent(Progress(64, 1, 800, 9999, 3.0, 1.0, 1.0), 1.0, 2.0, 0.1, 9.0, 64_000, 10**6))
            metrics.hear(ShardDone(0, ONE, 64, 800, (("truncated", 64),)))

        def look(at: int) -> None:
            metrics.look({OTHER: Progress(64, 1, at + 1, 9999, at + 1.0, at + 1.0, at + 1.0)})

        costs: dict[str, Callable[[int], None]] = {
            "a shard of 64 videos": shard,
            "a look at a worker": look,
            "all gauges, 8 workers": lambda at: metrics.show(SNAPSHOT),
        }
        taken: dict[str, list[float]] = {name: [] for name in costs}
        for _ in range(ROUNDS):
            metrics.begin(OTHER)
            for name, once in costs.items():
                started = time.perf_counter()
                for at in range(TIMES):
                    once(at)
                taken[name].append((time.perf_counter() - started) / TIMES * 1e6)
    for name, us in taken.items():
        print(f"{name}: {statistics.median(us):.1f} us ({min(us):.1f} to {max(us):.1f})")


if __name__ == "__main__":
    main()
