"""Deadlines of a decode: what it sends while its video is fetched or opened, when no frames come.

    work, in a thread ──bytes fetched, packets read──> Progress ──> VideoAlive, only if there was some ──> its deadline

A decode is stopped if no message of it arrives within the deadline, whatever the size of the file. A large video takes
longer to fetch or to index, but makes progress. FFmpeg that searches 100 GiB of zeros for the next packet does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from p3d.pipeline.types import VideoAlive

T = TypeVar("T")

SMALL_BYTES = 4 * 1024**2  # a file of less is fetched and opened within any deadline, so it gives no signs of life
FETCHED_BYTES = 128 * 1024  # least bytes between two signs of life of a fetch
SIGNS = 4  # of life, within one deadline


@dataclass(slots=True)
class Progress:
    """How much of some work is done: in bytes or packets. One thread counts, and another one reads.

    `least` is how much counts as a sign of life. Until the monotonic time `uncounted_until`, work that cannot be
    counted is in progress.
    """

    least: int = 1
    done: int = 0
    uncounted_until: float = 0.0

    def add(self, count: int) -> None:
        """Count more of the work as done."""
        self.done += count


def alive_while(work: Callable[[], T], progress: Progress, deadline_s: float) -> Generator[VideoAlive, None, T]:
    """Do the work in a thread, and return its result or raise its error. Meanwhile, yield its signs of life.

    There are at most SIGNS within `deadline_s`, and none while `progress` stands still. Closing waits for the work.
    """
    with ThreadPoolExecutor(1) as pool:
        future, level = pool.submit(work), 0
        while not wait([future], deadline_s / SIGNS).done:
            if progress.done - level >= progress.least or time.monotonic() < progress.uncounted_until:
                level = progress.done
                yield VideoAlive()
        return future.result()
