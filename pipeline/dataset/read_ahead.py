"""Reads several shards at a time, and gives their tables in order.

Arrow reads, decompresses and checks pages outside Python's lock, and so do hashing and matrix products. So threads that
are ahead of the caller use the other cores. Memory holds at most AHEAD batches for each thread: BATCH_ROWS rows,
or one table that has more.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pyarrow as pa

THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
AHEAD = 2
BATCH_ROWS = 512  # 4 MiB of 2048 float32

Tables = Iterator[tuple[str, pa.Table]]
Batch = tuple[list[tuple[str, pa.Table]], bool]  # the next tables, and whether they are the last


def read_ahead(shards: Iterable[Tables], threads: int = 0) -> Iterator[Tables]:
    """The tables of each shard, in the order of `shards`. The first error in that order is raised where it occurs."""
    threads = threads or THREADS
    if threads == 1:
        yield from shards
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, "read"))
        begun: deque[tuple[Tables, Future[Batch]]] = deque()
        stack.callback(lambda: [batch.cancel() for _, batch in begun])
        more = iter(shards)
        while True:
            for shard in itertools.islice(more, AHEAD * threads - len(begun)):
                begun.append((shard, pool.submit(_next, shard)))
            if not begun:
                return
            yield _rest(pool, *begun.popleft())


def _rest(pool: ThreadPoolExecutor, shard: Tables, batch: Future[Batch]) -> Tables:
    last = False
    while not last:
        tables, last = batch.result()
        if not last:
            batch = pool.submit(_next, shard)
        yield from tables


def _next(shard: Tables) -> Batch:
    """The next tables of a shard, until they have BATCH_ROWS."""
    tables, n_rows = [], 0
    for one in shard:
        tables.append(one)
        n_rows += one[1].num_rows
        if n_rows >= BATCH_ROWS:
            return tables, False
    return tables, True
