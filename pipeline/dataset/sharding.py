"""Which videos make a shard: rows of a listing get the number of their shard. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.recipe import SHARD_S, ShardSizing

SHARD_BYTES = 16 * 1024**3  # of source files in a shard; a shard of fewer videos is closed at this size


def sharded(tables: Iterable[pa.Table], sizing: ShardSizing) -> Iterator[pa.Table]:
    """The tables with their `shard` column. They follow each other, so a shard may continue in the next table.

    A shard has one video at least, and otherwise ends before a limit is exceeded: `sizing.videos` rows, SHARD_BYTES of
    source files, and SHARD_S seconds as `sizing` estimates them.
    """
    shard, rows_in, bytes_in, seconds_in, most = 0, 0, 0, 0.0, sizing.videos
    at = MANIFEST.get_field_index("shard")
    for videos in tables:
        sizes_N = videos["size_bytes"].to_numpy()
        seconds_N = sizing.seconds_per_video + sizing.seconds_per_mb * np.maximum(sizes_N, 0) / 1e6
        shards = []
        for size, seconds in zip(sizes_N.tolist(), seconds_N.tolist(), strict=True):
            if rows_in and (rows_in >= most or bytes_in + size > SHARD_BYTES or seconds_in + seconds > SHARD_S):
                shard, rows_in, bytes_in, seconds_in = shard + 1, 0, 0, 0.0
            shards.append(shard)
            rows_in, bytes_in, seconds_in = rows_in + 1, bytes_in + max(size, 0), seconds_in + seconds
        yield videos.add_column(at, MANIFEST.field("shard"), pa.array(shards, pa.int32()))


def with_shards(videos: pa.Table, sizing: ShardSizing) -> pa.Table:
    """One table with its `shard` column; see `sharded`."""
    return next(sharded([videos], sizing))
