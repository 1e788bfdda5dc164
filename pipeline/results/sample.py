"""A uniform sample of rows that come by once, in bounded memory. N rows of a group, S of the sample, D dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.types import FLOAT32


class Reservoir:
    """A uniform sample of at most `size` rows of all that come by, in memory that grows with it."""

    def __init__(self, rng: np.random.Generator, size: int, dim: int) -> None:
        self.rng, self.size, self.seen = rng, size, 0
        self.rows_SD = np.empty((size, dim), np.float32)  # the system gives the pages as they are written
        self.keys: dict[int, tuple[Any, ...]] = {}  # by place

    def add(self, vectors_ND: FLOAT32, keys: pa.Table | None = None) -> None:
        numbers_N = np.arange(self.seen, self.seen + len(vectors_ND))
        places_N = np.where(numbers_N < self.size, numbers_N, self.rng.integers(0, numbers_N + 1))
        taken = np.flatnonzero(places_N < self.size)
        self.rows_SD[places_N[taken]] = vectors_ND[taken]  # of two for one place the later one stays
        if keys is not None and len(taken):
            for place, key in zip(places_N[taken].tolist(), keys_of(keys, taken), strict=True):
                self.keys[place] = key
        self.seen += len(vectors_ND)

    @property
    def n(self) -> int:
        return min(self.size, self.seen)


def keys_of(table: pa.Table, rows: Any) -> list[tuple[Any, ...]]:
    """(video_id [, clip_index]) of some rows."""
    names = [name for name in table.column_names if name != "plan_seq"]
    columns = [table[name].take(pa.array(rows, pa.int64())).to_pylist() for name in names]
    return list(zip(*columns, strict=True))
