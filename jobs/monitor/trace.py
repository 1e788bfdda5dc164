"""The timeline of a job as Chrome trace events, from the footers of its shards; it also works for finished jobs.

The footer of a shard says where and when it was computed, and the seconds in total, in the network and waiting for
frames. Open the file in https://ui.perfetto.dev or chrome://tracing. Format: "Trace Event Format",
Google, 2016: `X` is an interval (`ts`, `dur` in microseconds), `C` a counter, `M` names a track.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from p3d.pipeline.dataset.shard_times import ShardTime

MOST_PID = 1 << 22  # the largest pid of Linux


def trace_events(shards: Iterable[ShardTime]) -> Iterator[dict[str, Any]]:
    """One track per worker of each machine, one interval per shard, and counters of clips and failures so far.

    A worker has a second track for shards that it began before another had finished.
    """
    shards, hosts = list(shards), list[str]()
    tracks = dict[tuple[str, int, int], float]()  # host, process, number of track -> end of its last interval
    for shard in sorted(shards, key=lambda shard: shard.began_s):
        if shard.host not in hosts:
            hosts.append(shard.host)
            yield {"ph": "M", "name": "process_name", "pid": len(hosts), "args": {"name": shard.host}}
        free = 0
        while tracks.get((shard.host, shard.pid, free), shard.began_s) > shard.began_s:
            free += 1
        track = {"pid": hosts.index(shard.host) + 1, "tid": shard.pid + free * MOST_PID}
        if (shard.host, shard.pid, free) not in tracks:
            yield {"ph": "M", "name": "thread_name", **track, "args": {"name": f"{shard.device} (pid {shard.pid})"}}
        tracks[shard.host, shard.pid, free] = shard.ended_s
        args = {name: getattr(shard, name) for name in ("videos", "failed", "clips", "encode_s", "wait_s")}
        began_us, took_us = round(shard.began_s * 1e6), round(shard.shard_s * 1e6)
        yield {"ph": "X", "cat": "shard", "name": shard.name, "ts": began_us, "dur": took_us, **track, "args": args}
    clips, failed = 0, 0
    for shard in sorted(shards, key=lambda shard: (shard.ended_s, shard.name)):
        clips, failed = clips + shard.clips, failed + shard.failed
        so_far = {"clips": clips, "failed videos": failed}
        yield {"ph": "C", "name": "so far", "ts": round(shard.ended_s * 1e6), "pid": 1, "tid": 0, "args": so_far}
