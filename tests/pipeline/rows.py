"""Shards of synthetic rows for tests of the commit protocol: real types, small numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from p3d.pipeline.clips.rules import clip_spans
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.errors import Reason
from p3d.pipeline.recipe import JobRecord, Recipe, ShardSizing
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import FLOAT32, ClipRow, Failure, ShardRows, VideoEnd, VideoInfo, VideoOutcome, VideoRef

DIM = 8
CLASSES = 3


def recipe(**changes: object) -> Recipe:
    """A recipe of eight features."""
    values: dict[str, object] = {
        "model": "p3d63",
        "graph": "caffe",
        "weights_sha256": "0" * 64,
        "feature_dim": DIM,
        "clip_frames": 16,
        "resize_hw": (182, 242),
        "short_side": None,
        "crop_hw": (160, 160),
        "clips": "every:16",
        "frame_step": 1,
        "fps": None,
        "decoder": "auto",
        "partial": "fail",
        "precision": "fp32",
        "pool": "mean",
        "embedding_dtype": "float32",
        "num_classes": CLASSES,
        "scores": False,
    }
    return Recipe(**(values | changes))  # type: ignore[arg-type] # checked by Recipe


def videos(names: Sequence[str]) -> pa.Table:
    """A manifest table without shards; each name also gets a user column `label`."""
    rows = [
        {"video_id": name, "path": f"{name}.mp4", "uri": f"file:///v/{name}.mp4", "version": "0" * 16, "size_bytes": 10}
        for name in names
    ]
    fields = [field for field in MANIFEST if field.name != "shard"]
    table = pa.table([pa.array([row.get(f.name) for row in rows], f.type) for f in fields], schema=pa.schema(fields))
    return table.append_column("label", pa.array([f"label of {name}" for name in names]))


def planned(store: Store, names: Sequence[str], *, shard_videos: int = 4, recipe_: Recipe | None = None) -> Manifest:
    """A job with one plan of `names` in OUT."""
    chosen = recipe_ or recipe()
    store.create("job.json", JobRecord(chosen, "random:0", {}).to_json())
    found = SourceListing(videos(names), ())
    plan = write_plan(store, 1, chosen, with_shards(found.videos, ShardSizing(shard_videos)), 0, ShardSizing())
    return Manifest(store, plan)


def outcome(video: VideoRef, n_frames: int) -> VideoOutcome:
    """An embedded video of `n_frames`, or a failure if that is 0."""
    if not n_frames:
        return VideoOutcome(video, failure=Failure(Reason.TRUNCATED, "ends early", 1))
    n_clips = len(clip_spans(recipe().sampling, n_frames))
    info = VideoInfo(n_frames, 320, 240, 0, 25.0, n_frames / 25, "mp4", "h264", 0, "decord")
    return VideoOutcome(video, n_clips, info, VideoEnd(n_frames, n_frames / 25))


def distributions(rng: np.random.Generator, n_rows: int, n_scores: int) -> FLOAT32:
    """Softmax scores, [R, K]."""
    weights_RK = np.exp(rng.standard_normal((n_rows, n_scores)))
    return (weights_RK / weights_RK.sum(1, keepdims=True)).astype(np.float32)


def shard_rows(
    manifest: Manifest, shard: int, *, seed: int = 0, frames: Sequence[int] = (40, 0, 16, 9), n_scores: int = 0
) -> ShardRows:
    """Rows as extract_shard would return them; video i of the shard has `frames[i % len]` frames, 0 is a failure."""
    rng = np.random.default_rng([seed, shard])
    plan = manifest.shard(shard)
    outcomes = tuple(outcome(video, frames[at % len(frames)]) for at, video in enumerate(plan.videos))
    clips = tuple(
        ClipRow(o.video.video_id, o.video.path, span, span.start_frame / 25, span.end_frame / 25)
        for o in outcomes
        if o.end
        for span in clip_spans(recipe().sampling, o.end.n_frames)
    )
    features_RD = rng.standard_normal((len(clips), DIM)).astype(np.float32)
    return ShardRows(plan, outcomes, clips, features_RD, distributions(rng, len(clips), n_scores), {"encode_s": 1.0})
