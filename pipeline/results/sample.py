"""A uniform sample of a stream of rows, in bounded memory. N rows of a group, S of the sample, D dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.types import FLOAT32


class Reservoir:
    """A uniform sample of at most `size` of the rows added, by reservoir sampling. Memory grows with the sample."""

    def __init__(self, rng: np.random.Generator, size: int, dim: int) -> None:
        self.rng, self.size, self.seen = rng, size, 0
        self.rows_SD = np.empty((size, dim), np.float32)  # the system allocates pages when they are written
        self.keys: dict[int, tuple[Any, ...]] = {}  # position in the sample -> key

    def add(self, vectors_ND: FLOAT32, keys: pa.Table | None = None) -> None:
        numbers_N = np.arange(self.seen, self.seen + len(vectors_ND))
        positions_N = np.where(numbers_N < self.size, numbers_N, self.rng.integers(0, numbers_N + 1))
        taken = np.flatnonzero(positions_N < self.size)
        self.rows_SD[positions_N[taken]] = vectors_ND[taken]  # of two rows for one position the later one stays
        if keys is not None and len(taken):
            for position, key in zip(positions_N[taken].tolist(), keys_of(keys, taken), strict=True):
                self.keys[position] = key
        self.seen += len(vectors_ND)

    @property
    def n(self) -> int:
        return min(self.size, self.seen)


def keys_of(table: pa.Table, rows: Any) -> list[tuple[Any, ...]]:
    """(video_id [, clip_index]) of some rows."""
    names = [name for name in table.column_names if name != "plan_seq"]
    columns = [table[name].take(pa.array(rows, pa.int64())).to_pylist() for name in names]
    return list(zip(*columns, strict=True))
