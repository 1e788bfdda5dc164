"""What a launch would cost: a sample of the videos is probed, a batch is timed, the rest is arithmetic."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from jobs.planning import Prepared, default_batch, default_workers
from p3d.encoder import Encoder, device_for, golden_clip
from pipeline.clips import clip_spans, laid_over
from pipeline.decode import DecodeLimits
from pipeline.decode.probe import probe
from pipeline.errors import VideoError
from pipeline.identity import local_path
from pipeline.listing import Found
from pipeline.manifest import with_shards
from pipeline.schema import MAX_OBJECT_BYTES

SAMPLE = 500  # videos that are probed at most, drawn from the whole source with a fixed seed
SAMPLE_S = 5.0  # after which no further one is
TIMED_BATCHES = 2  # after one to warm up


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts of videos and shards are exact; clips, bytes and seconds are extrapolated from `n_sampled` videos."""

    n_videos: int
    n_shards: int
    size_bytes: int
    n_sampled: int
    n_clips: int
    output_bytes: int
    clips_per_s: float
    seconds: float
    workers: int
    device: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    found: Found,
    prepared: Prepared,
    *,
    limit: int | None,
    shard_videos: int,
    workers: int | None,
) -> Estimate:
    """Probe a sample of local videos (clips per byte) and time the network on this machine."""
    videos = found.videos if limit is None else found.videos.slice(0, limit)
    sizes = np.maximum(videos["size_bytes"].to_numpy(), 0)
    counts, sampled, sampling = [], [], prepared.recipe.sampling
    until = time.monotonic() + SAMPLE_S
    for at in np.random.default_rng(0).permutation(len(sizes))[:SAMPLE].tolist():
        uri = videos["uri"][at].as_py()
        if uri.startswith("s3://"):
            continue  # a probe would download it
        try:
            seen = probe(os.fsdecode(local_path(uri)), DecodeLimits())
            n_frames = laid_over(sampling, seen.n_frames, seen.duration_s)
        except VideoError:
            n_frames = 0
        counts.append(len(clip_spans(sampling.for_video(videos["video_id"][at].as_py()), n_frames)))
        sampled.append(int(sizes[at]))
        if time.monotonic() > until:
            break
    total = int(sizes.sum())
    n_clips = round(sum(counts) * total / max(sum(sampled), 1)) if counts else 0
    device, rate = _rate(prepared)
    workers = workers or default_workers()
    recipe = prepared.recipe
    vector_bytes = recipe.feature_dim * (2 if recipe.embedding_dtype == "float16" else 4)
    probs_bytes = recipe.n_scores * 4
    n_shards = int(with_shards(videos, shard_videos)["shard"][-1].as_py()) + 1
    output = n_clips * (vector_bytes + probs_bytes + 100)
    output += len(videos) * (vector_bytes * len(recipe.pool.split("+")) + probs_bytes + 500)
    warnings = []
    if output / n_shards > MAX_OBJECT_BYTES / 2:
        size = f"{output / n_shards / 1024**3:.1f} GiB"
        warnings.append(f"a shard would be about {size}, and 4 is the most: use a smaller --shard-videos")
    return Estimate(
        n_videos=len(videos),
        n_shards=n_shards,
        size_bytes=total,
        n_sampled=len(counts),
        n_clips=n_clips,
        output_bytes=output,
        clips_per_s=rate,
        seconds=n_clips / (rate * workers),
        workers=workers,
        device=device,
        warnings=tuple(warnings),
    )


def _rate(prepared: Prepared) -> tuple[str, float]:
    """(device, clips/s of one worker) of the network alone, after a warm-up."""
    device = str(device_for("auto"))
    size = default_batch(device)
    encoder = Encoder(prepared.weights, device=device, batch_size=size, precision=prepared.recipe.precision)
    frames_NHWC, index_BT = golden_clip(prepared.weights.recipe)
    index_BT = np.repeat(index_BT, size, axis=0)
    seconds = []
    for _ in range(TIMED_BATCHES + 1):
        started = time.monotonic()
        encoder.encode(frames_NHWC, index_BT)
        seconds.append(time.monotonic() - started)
    return device, size / median(seconds[1:])
