"""Which videos make a shard: rows of a listing get the number of their shard. Pure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.recipe import SHARD_S, ShardSizing

SHARD_BYTES = 16 * 1024**3  # of source files in a shard; a shard of fewer videos is closed at this size


def with_shards(videos: pa.Table, sizing: ShardSizing) -> pa.Table:
    """The table with its `shard` column. A shard has one video at least, and otherwise ends before a limit is exceeded.

    The limits are `sizing.videos` rows, SHARD_BYTES of source files and SHARD_S seconds as `sizing` estimates them.
    """
    shards, shard, rows_in, bytes_in, seconds_in = np.empty(videos.num_rows, np.int32), 0, 0, 0, 0.0
    for row, size in enumerate(videos["size_bytes"].to_numpy().tolist()):
        seconds = sizing.seconds(size)
        full = rows_in >= sizing.videos or bytes_in + size > SHARD_BYTES or seconds_in + seconds > SHARD_S
        if rows_in and full:
            shard, rows_in, bytes_in, seconds_in = shard + 1, 0, 0, 0.0
        shards[row] = shard
        rows_in, bytes_in, seconds_in = rows_in + 1, bytes_in + max(size, 0), seconds_in + seconds
    at = MANIFEST.get_field_index("shard")
    return videos.add_column(at, MANIFEST.field("shard"), pa.array(shards))
