"""Which shards of a plan hold some videos."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset.plans import Manifest


def shards_with(manifest: Manifest, ids: frozenset[str]) -> frozenset[int]:
    """The numbers of the shards that have a video of these ids."""
    wanted = pa.array(sorted(ids), pa.string())
    found = (videos["shard"].filter(pc.is_in(videos["video_id"], wanted)) for videos in manifest.parts())
    return frozenset(shard for shards in found for shard in shards.unique().to_pylist())
