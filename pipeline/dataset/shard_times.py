"""When and where each shard was computed, and what took the time, from the footers of the clips files."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import clips_key, committed_names
from p3d.pipeline.dataset.files import UNREADABLE
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.storage.store import Store

READERS = 16  # footers at a time
MOST = 1e15  # of a number in a footer
SHOWN = 200  # characters of an error that may quote a footer


@dataclass(frozen=True, slots=True)
class ShardTime:
    """When and where a shard was computed. `ended_s` and `began_s` are in seconds since 1970, by its machine's clock.

    `encode_s`, `wait_s` and `full_s` are as in `p3d.pipeline.extract.Progress`, and 0 if an older version did not
    write them. `settings` describes the batch size and the number of threads.
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

    @property
    def began_s(self) -> float:
        return self.ended_s - self.shard_s


def shard_times(store: Store) -> list[ShardTime]:
    """The times of all committed shards, in the order in which they ended. DamagedJob if a footer lacks them."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _read(store, name), sorted(committed_names(store)[0]))
        return sorted(found, key=lambda shard: (shard.ended_s, shard.name))


def _read(store: Store, name: str) -> ShardTime:
    try:
        with store.open(clips_key(name)) as content, schema.open_parquet(content) as file:
            stats = json.loads(schema.read_footer(file)[schema.STATS_KEY])
        return ShardTime(
            name,
            _text(stats["host"]),
            _number(stats["pid"], int),
            _text(stats["device"]),
            ended_s := _number(datetime.fromisoformat(stats["ended"]).timestamp()),
            _number(stats["shard_s"], most=ended_s),  # so that it did not begin before 1970
            _number(stats["encode_s"]),
            _number(stats["wait_s"]),
            _number(stats["videos"], int),
            _number(stats["failed"], int),
            _number(stats["clips"], int),
            _number(stats.get("frames", 0), int),
            _number(stats.get("full_s", 0.0)),
            sys.intern(f"batch {stats.get('batch_size', '?')}, threads {stats.get('threads', '?')}"),
        )
    except UNREADABLE as error:
        why = str(error)[:SHOWN]
        raise DamagedJob(f"{clips_key(name)}: its footer does not say when it was made ({why}); run verify") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of text")
    return value


def _number(value: Any, kind: type = float, most: float = MOST) -> Any:
    """A number in [0, `most`], an integer where `kind` says so. TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"{value:g} is not in [0, {most:g}]")
    return value
