"""The memory limit of one decode: a thread in its own process ends it when it exceeds the limit, and writes a note.

Resident private memory is what a machine runs out of, so that is watched. A native call that allocates while Python
cannot run is stopped by RLIMIT_AS. That limit is much higher, because threads map address space that they never use.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p3d.pipeline.decode.child import MEMORY_NOTE

NOTE = MEMORY_NOTE  # the prefix of a note about the memory limit
POLL_S = 0.05
MAPPED_SLACK_BYTES = 4 * 1024**3  # of address space: Ray's shared memory, malloc's arenas, the stacks of threads
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()


@contextmanager
def memory_limit(limit_bytes: int, note_fd: int, *, mapped_too: bool = True) -> Iterator[None]:
    """Let this process allocate `limit_bytes` more than now. Beyond that, write a line to `note_fd` and exit with 1.

    An allocation far beyond the limit fails at once, in Python as a MemoryError. `mapped_too=False` turns that off, for
    CUDA, which maps as much address space as all devices have memory. Linux only: elsewhere nothing is limited.
    """
    if not _STATM.exists():
        yield
        return
    mapped_pages, _, _ = _pages()
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = mapped_pages * _PAGE_BYTES + limit_bytes + MAPPED_SLACK_BYTES
    if before[1] != resource.RLIM_INFINITY:
        most = min(most, before[1])
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(limit_bytes, note_fd, done), name="memory", daemon=True)
    watch.start()
    if mapped_too:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        done.set()
        watch.join()


def _watch(limit_bytes: int, note_fd: int, done: threading.Event) -> None:
    base = _private_bytes()
    while not done.wait(POLL_S):
        taken = _private_bytes() - base
        if taken > limit_bytes:
            os.write(note_fd, f"{NOTE}{taken >> 20} MiB, the limit is {limit_bytes >> 20}\n".encode())
            os._exit(1)  # the decoder's thread cannot be unwound from here


def _private_bytes() -> int:
    _, resident, shared = _pages()
    return (resident - shared) * _PAGE_BYTES


def _pages() -> tuple[int, int, int]:
    """(mapped, resident, shared) pages of this process, from /proc/self/statm; see proc(5)."""
    mapped, resident, shared = (int(word) for word in _STATM.read_bytes().split()[:3])
    return mapped, resident, shared
