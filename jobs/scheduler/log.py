"""The log of a run: one line per event, in OUT/_job/logs/, for `p3d jobs logs`.

    _job/logs/000003.log     replaced from time to time by run 3: its newest lines, oldest first

The log is for people, and nothing depends on it. A write that fails is repeated with the next one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque

from p3d.jobs.scheduler.state import (
    Checked,
    CheckFailed,
    Event,
    Reopened,
    ShardDone,
    ShardTrouble,
    Stop,
    TryAgain,
    WorkerDied,
    WorkerLimitRaised,
    WorkerReady,
    WorkerRefused,
    WorkerUnready,
)
from p3d.pipeline.errors import StoreError, StoreMissing, counted
from p3d.pipeline.storage.store import Store

LINES = 5000  # kept per run, about half a megabyte
WRITE_S = 30.0  # between two writes during the run


class RunLog:
    """The newest lines of one run, and when they were last written."""

    def __init__(self, store: Store, number: int) -> None:
        self.store, self.key = store, log_key(number)
        self.lines: deque[str] = deque(maxlen=LINES)
        self.dropped = 0
        self.written, self.changed = time.monotonic(), False

    def add(self, sentence: str) -> None:
        """One line, with the time of this machine in UTC."""
        logging.getLogger(__name__).info("%s", sentence)
        self.dropped += len(self.lines) == LINES
        self.lines.append(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}  {' '.join(sentence.split())}")
        self.changed = True

    def hear(self, event: Event) -> None:
        """Add a line for an event of the scheduler, if people want to know about it."""
        if sentence := told(event):
            self.add(sentence)

    def write(self, *, now: bool = False) -> None:
        """Replace the log's object if there are new lines and the last write is at least WRITE_S ago, or `now`."""
        if not self.changed or (not now and time.monotonic() - self.written < WRITE_S):
            return
        self.written = time.monotonic()
        head = [f"({self.dropped} older lines were dropped)"] if self.dropped else []
        with contextlib.suppress(StoreError):
            self.store.replace(self.key, ("\n".join([*head, *self.lines]) + "\n").encode(errors="backslashreplace"))
            self.changed = False


def told(event: Event) -> str:
    """A line about an event; empty for those that are not logged."""
    match event:
        case WorkerReady(worker):
            return f"worker {worker} is ready"
        case WorkerRefused(worker, detail):
            return f"worker {worker} must not be used: {detail}"
        case WorkerUnready(worker, detail):
            return f"worker {worker} could not start: {detail}"
        case WorkerDied(worker, detail):
            return f"worker {worker} died: {detail}"
        case ShardDone(worker, shard, n_videos, n_clips, failures):
            reasons, videos = ", ".join(f"{count} {reason}" for reason, count in failures), counted(n_videos, "video")
            return f"worker {worker} committed shard {shard}: {videos}, {counted(n_clips, 'clip')}" + (
                f"; failed: {reasons}" if reasons else ""
            )
        case ShardTrouble(worker, shard, kind, detail):
            return f"worker {worker} could not do shard {shard} ({kind}): {detail}"
        case Checked(shard, committed):
            return f"shard {shard} of a worker that died is {'committed' if committed else 'not committed'}"
        case CheckFailed(shard, detail):
            return f"could not check whether shard {shard} is committed: {detail}"
        case Reopened(shards):
            return f"{counted(len(shards), 'shard')} of earlier runs have lost their clips files and are computed again"
        case WorkerLimitRaised(n_workers):
            return f"nodes have joined: up to {counted(n_workers, 'worker')} can run now"
        case TryAgain():
            return "retrying the store that failed"
        case Stop(_, why):
            return f"stopping: {why}"
    return ""


def log_key(number: int) -> str:
    return f"_job/logs/{number:06d}.log"


def read_log(store: Store, number: int) -> str:
    """The log of a run as it was last written; empty if it wrote none."""
    try:
        return store.read(log_key(number)).decode(errors="replace")
    except StoreMissing:
        return ""
