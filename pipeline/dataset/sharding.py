"""Which videos make a shard: rows of a listing get the number of their shard. Pure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST

SHARD_BYTES = 16 * 1024**3  # of source files in a shard; a shard of fewer than `shard_videos` is closed at this size


def with_shards(videos: pa.Table, shard_videos: int) -> pa.Table:
    """The table with its `shard` column: `shard_videos` rows per shard, fewer if their bytes exceed SHARD_BYTES."""
    shards, shard, rows_in, bytes_in = np.empty(videos.num_rows, np.int32), 0, 0, 0
    for row, size in enumerate(videos["size_bytes"].to_numpy().tolist()):
        if rows_in and (rows_in >= shard_videos or bytes_in + size > SHARD_BYTES):
            shard, rows_in, bytes_in = shard + 1, 0, 0
        shards[row] = shard
        rows_in, bytes_in = rows_in + 1, bytes_in + max(size, 0)
    at = MANIFEST.get_field_index("shard")
    return videos.add_column(at, MANIFEST.field("shard"), pa.array(shards))
