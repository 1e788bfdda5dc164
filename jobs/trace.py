"""The timeline of a job, also of one long past: from the footers of its shards, as Chrome trace events.

Each shard's footer says where and when it was computed, how long that took, and how much of it was spent in the network
and in waiting for frames. Open the file in https://ui.perfetto.dev or chrome://tracing. Format: "Trace Event Format",
Google, 2016: `X` is an interval (`ts`, `dur` in microseconds), `C` a counter, `M` names a track.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline import schema
from pipeline.commit import clips_key, committed_names
from pipeline.errors import DamagedJob
from pipeline.store import Store

READERS = 16  # footers at a time
MOST_PID = 1 << 22  # of Linux


@dataclass(frozen=True, slots=True)
class ShardTime:
    """When and where a shard was computed; seconds, of the clock of its own machine (since 1970).

    `encode_s`, `wait_s` and `full_s` as in `pipeline.extract.Progress`; 0 where an older version did not write it.
    `settings` are what the rows depend on, in words.
    """

    name: str
    host: str
    pid: int
    device: str
    ended_s: float
    shard_s: float
    encode_s: float
    wait_s: float
    videos: int
    failed: int
    clips: int
    frames: int
    full_s: float
    settings: str


def shard_times(store: Store) -> list[ShardTime]:
    """Of all committed shards, the first that ended first. DamagedJob for a footer that does not say it."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _read(store, name), sorted(committed_names(store)[0]))
        return sorted(found, key=lambda shard: (shard.ended_s, shard.name))


def _read(store: Store, name: str) -> ShardTime:
    try:
        with store.open(clips_key(name)) as content, schema.open_parquet(content) as file:
            stats = json.loads(schema.read_footer(file)[schema.STATS_KEY])
        return ShardTime(
            name,
            stats["host"],
            stats["pid"],
            stats["device"],
            datetime.fromisoformat(stats["ended"]).timestamp(),
            stats["shard_s"],
            stats["encode_s"],
            stats["wait_s"],
            stats["videos"],
            stats["failed"],
            stats["clips"],
            stats.get("frames", 0),
            stats.get("full_s", 0.0),
            sys.intern(f"batch {stats.get('batch_size', '?')}, threads {stats.get('threads', '?')}"),
        )
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are ValueError and OSError
        raise DamagedJob(f"{clips_key(name)}: its footer does not say when it was made ({error}); run verify") from None


def trace_events(shards: Iterable[ShardTime]) -> Iterator[dict[str, Any]]:
    """Tracks for each worker of each machine, an interval for each shard, and the clips and failures so far.

    A worker has a second track for shards that it began before it was done with another.
    """
    hosts, clips, failed = list[str](), 0, 0
    tracks = dict[tuple[str, int, int], float]()  # host, process, which of its tracks -> when its last interval ended
    for shard in sorted(shards, key=lambda shard: shard.ended_s - shard.shard_s):
        if shard.host not in hosts:
            hosts.append(shard.host)
            yield {"ph": "M", "name": "process_name", "pid": len(hosts), "args": {"name": shard.host}}
        began_s, free = shard.ended_s - shard.shard_s, 0
        while tracks.get((shard.host, shard.pid, free), began_s) > began_s:
            free += 1
        track = {"pid": hosts.index(shard.host) + 1, "tid": shard.pid + free * MOST_PID}
        if (shard.host, shard.pid, free) not in tracks:
            yield {"ph": "M", "name": "thread_name", **track, "args": {"name": f"{shard.device} (pid {shard.pid})"}}
        tracks[shard.host, shard.pid, free] = shard.ended_s
        said = {name: getattr(shard, name) for name in ("videos", "failed", "clips", "encode_s", "wait_s")}
        began_us, took_us = round(began_s * 1e6), round(shard.shard_s * 1e6)
        yield {"ph": "X", "cat": "shard", "name": shard.name, "ts": began_us, "dur": took_us, **track, "args": said}
        clips, failed = clips + shard.clips, failed + shard.failed
        so_far = {"clips": clips, "failed videos": failed}
        yield {"ph": "C", "name": "so far", "ts": began_us + took_us, "pid": 1, "tid": 0, "args": so_far}
