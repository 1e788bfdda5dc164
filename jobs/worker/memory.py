"""The memory that one decode may take: a watch in its own process that ends it, and says why.

Resident private memory is what a machine runs out of, so that is watched. A native call that keeps Python from running
while it allocates is stopped by RLIMIT_AS, set a good deal higher: mapped is not used, and threads map much.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOTE = "memory: "  # how the note of a decode begins that was ended for it
POLL_S = 0.05
MAPPED_SLACK_BYTES = 4 * 1024**3  # of address space: Ray's shared memory, malloc's arenas, the stacks of threads
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()


@contextmanager
def memory_limit(limit_bytes: int, note_fd: int, *, mapped_too: bool = True) -> Iterator[None]:
    """This process may take so much more than it has now; beyond it, one line goes to `note_fd` and the process ends.

    An allocation that would go far beyond fails at once, as a MemoryError where Python asked; not where `mapped_too`
    is False, for CUDA, which maps as much as all its devices have. Linux only: elsewhere nothing is limited.
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
            os._exit(1)  # nothing of the decoder's can be unwound from here


def _private_bytes() -> int:
    _, resident, shared = _pages()
    return (resident - shared) * _PAGE_BYTES


def _pages() -> tuple[int, int, int]:
    """(mapped, resident, of these shared) pages of this process; proc(5)."""
    mapped, resident, shared = (int(word) for word in _STATM.read_bytes().split()[:3])
    return mapped, resident, shared
