"""Estimate the cost of a launch: decode some videos, embed their clips, and extrapolate.

    all videos ──sample──> probe: clips per byte ──> 32 of them ──trial──> seconds of decoding, frames
                                                     frames ──Encoder, inference threads of a job──> clips/s, rows
                                                              on a GPU also in batches of several sizes
                                                              in fp32 also in bf16, if that runs here
                                                     rows ──the dataset's own writers──> bytes per row

On a CPU, decoding and the network share the cores, so their times add up. On a GPU they overlap, so the slower of the
two determines the time.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.jobs.machine import usable_cpus
from p3d.jobs.planning.decode_trial import How, Tried, trial
from p3d.jobs.planning.network_trial import Bf16, embed_trial
from p3d.jobs.planning.prepare import Prepared, default_workers
from p3d.jobs.planning.shard_size import cpu_sizing
from p3d.pipeline.clips.rules import Sampling, clip_spans, laid_over
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import Pooling, derived
from p3d.pipeline.dataset.plans import total_bytes
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.errors import VideoError
from p3d.pipeline.recipe import Recipe, ShardSizing
from p3d.pipeline.sources.identity import local_path
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import FLOAT32, ClipRow, ShardPlan, ShardRows, VideoEnd, VideoOutcome, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

SAMPLE = 500  # at most this many videos are probed, drawn from the whole source with a fixed seed
SAMPLE_S = 5.0  # seconds after which no further video is probed
TRIED = 32  # of them are decoded and embedded
TRIED_S = 30.0  # seconds after which decoding stops
STARTUP_S = 9.0  # that Ray and the first worker take, about
MESSAGES_S = 0.010  # CPU seconds to transport the messages of a video; docs/performance.md


@dataclass(frozen=True, slots=True)
class Bf16Gain(Bf16):
    """`job_times`: the speed of the whole job as a multiple of that in fp32, with its start and its decoding."""

    job_times: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts of videos and shards are exact; clips, bytes and seconds are extrapolated.

    `n_sampled` videos were probed and `n_tried` decoded. `clips_per_s` is the rate of one worker's network alone in
    batches of `batch_size` clips. `by_batch` has the rates of other sizes, 0 for those that do not fit; it is empty on
    a CPU. `decode_s_per_clip` and `network_s_per_clip` are CPU seconds (the latter is 0 on a GPU). `binding` is the
    slower stage, "decoding" or "network". `useful_cores` keep one GPU busy; None on a CPU, which can use all cores.
    `bf16` is None unless the recipe is in fp32 and could also run in bf16 here.
    """

    n_videos: int
    n_shards: int
    size_bytes: int
    n_sampled: int
    n_tried: int
    n_clips: int
    output_bytes: int
    clips_per_s: float
    batch_size: int
    by_batch: dict[int, float]
    decode_s_per_clip: float
    network_s_per_clip: float
    binding: str
    useful_cores: float | None
    seconds: float
    workers: int
    device: str
    warnings: tuple[str, ...]
    bf16: Bf16Gain | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    found: SourceListing,
    prepared: Prepared,
    *,
    limit: int | None,
    shard_videos: int | None,
    workers: int | None,
    s3: StoreOptions,
) -> Estimate:
    """Probe a sample of local videos, then decode and embed a few local or S3 videos and time both on this machine."""
    videos = found.videos if limit is None else found.videos.slice(0, limit)
    recipe, sizes = prepared.recipe, np.maximum(videos["size_bytes"].to_numpy(), 0)
    order = np.random.default_rng(0).permutation(len(sizes)).tolist()
    refs = [VideoRef(**row) for row in videos.take(order[:TRIED]).select(VideoRef.__slots__).to_pylist()]
    how = How(recipe.frame_spec, recipe.sampling, recipe.decode_policy, s3)
    cpus = usable_cpus()
    tried = trial(refs, how, children=cpus, longest_s=TRIED_S)
    good = [one for one in tried if isinstance(one.end, VideoEnd)]

    total = total_bytes(sizes)
    n_sampled, n_clips = _count(_probed(videos, sizes, order, recipe.sampling), tried, recipe, total)
    decode_s = sum(one.cpu_s for one in tried) * total / max(sum(one.video.size_bytes for one in tried), 1)

    network = embed_trial(prepared, good, cpus)
    device, rate = network.device, network.clips_per_s
    workers = workers or default_workers()
    on_cpu = device == "cpu"
    cores_s = (decode_s + MESSAGES_S * len(videos)) / cpus
    network_s = n_clips / (rate if on_cpu else rate * workers)  # a CPU's workers share its cores
    sizing = ShardSizing() if shard_videos is None else ShardSizing(shard_videos)
    if shard_videos is None and on_cpu:
        sizing = cpu_sizing(recipe.sampling, (cores_s + network_s) * workers, len(videos), total / 1e6)
    n_shards = int(with_shards(videos, sizing)["shard"][-1].as_py()) + 1
    output = _output_bytes(recipe, good, network.features_ND, network.probs_NK, n_clips, len(videos), n_shards)
    warnings = []
    if output / n_shards > schema.MAX_OBJECT_BYTES / 2:
        size = f"{output / n_shards / 1024**3:.1f} GiB"
        warnings.append(f"a shard would be about {size}, and the limit is 4 GiB: use a smaller --shard-videos")
    if network.faster is not None:
        warnings.append(network.faster)
    return Estimate(
        n_videos=len(videos),
        n_shards=n_shards,
        size_bytes=total,
        n_sampled=n_sampled,
        n_tried=len(tried),
        n_clips=n_clips,
        output_bytes=output,
        clips_per_s=rate,
        batch_size=network.batch_size,
        by_batch=network.by_batch,
        decode_s_per_clip=decode_s / max(n_clips, 1),
        network_s_per_clip=cpus / rate if on_cpu else 0.0,
        binding="decoding" if cores_s > network_s else "network",
        useful_cores=None if on_cpu else rate * decode_s / max(n_clips, 1),
        seconds=seconds_of_job(cores_s, network_s, on_cpu=on_cpu),
        workers=workers,
        device=device,
        warnings=tuple(warnings),
        bf16=None if network.bf16 is None else gain(network.bf16, cores_s, network_s, on_cpu=on_cpu),
    )


def seconds_of_job(cores_s: float, network_s: float, *, on_cpu: bool) -> float:
    """Seconds from launch to end, if decoding takes `cores_s` and the network `network_s` alone."""
    return STARTUP_S + (cores_s + network_s if on_cpu else max(cores_s, network_s))


def gain(bf16: Bf16, cores_s: float, network_s: float, *, on_cpu: bool) -> Bf16Gain:
    """What bf16 gains for a whole job whose stages take these seconds in fp32."""
    full_s = seconds_of_job(cores_s, network_s, on_cpu=on_cpu)
    half_s = seconds_of_job(cores_s, network_s / bf16.times, on_cpu=on_cpu)
    return Bf16Gain(**asdict(bf16), job_times=full_s / half_s)


def _count(probed: dict[str, tuple[int, int]], tried: list[Tried], recipe: Recipe, total: int) -> tuple[int, int]:
    """(number of sampled videos, number of clips in `total` bytes of videos).

    A probe promises more clips of a damaged video than can be decoded. The tried videos show which share is real.
    """
    seen = {one.video.video_id: (_clips(one, recipe), one.video.size_bytes) for one in tried}
    looked_at = probed or seen
    promised = sum(looked_at[one][0] for one in seen if one in looked_at)
    kept = sum(seen[one][0] for one in seen if one in looked_at) / promised if promised else 1.0
    n_clips, size_bytes = (sum(column) for column in zip(*looked_at.values(), strict=True)) if looked_at else (0, 0)
    return len(looked_at), round(n_clips * kept * total / max(size_bytes, 1))


def _probed(videos: pa.Table, sizes: Any, order: list[int], sampling: Sampling) -> dict[str, tuple[int, int]]:
    """id -> (clips, bytes) of a sample of the local videos; videos on S3 are left out, to avoid downloads."""
    counted = {}
    until = time.monotonic() + SAMPLE_S
    for at in order[:SAMPLE]:
        uri = videos["uri"][at].as_py()
        if uri.startswith("s3://"):
            continue
        try:
            seen = probe(os.fsdecode(local_path(uri)), DecodeLimits())
            n_frames = laid_over(sampling, seen.n_frames, seen.duration_s)
        except VideoError:
            n_frames = 0
        video_id = videos["video_id"][at].as_py()
        counted[video_id] = len(clip_spans(sampling.for_video(video_id), n_frames)), int(sizes[at])
        if time.monotonic() > until:
            break
    return counted


def _clips(one: Tried, recipe: Recipe) -> int:
    if not isinstance(one.end, VideoEnd):
        return 0
    sampling = recipe.sampling.for_video(one.video.video_id)
    return len(clip_spans(sampling, laid_over(sampling, one.end.n_frames, one.end.duration_s)))


def _output_bytes(
    recipe: Recipe,
    tried: list[Tried],
    features_ND: FLOAT32,
    probs_NK: FLOAT32,
    n_clips: int,
    n_videos: int,
    n_shards: int,
) -> int:
    """Bytes of OUT's tables, extrapolated from written tables of the tried videos, because they are compressed."""
    count = len(features_ND)
    if not tried or not count:
        row = recipe.feature_dim * (2 if recipe.embedding_dtype == "float16" else 4) + recipe.n_scores * 4
        return n_clips * (row + 100) + n_videos * (row * len(recipe.pool.split("+")) + 500)
    shard = ShardPlan(1, "00000000", 0, tuple(one.video for one in tried[:count]))
    outcomes, clips = [], []
    for one in tried[:count]:
        spans = clip_spans(recipe.sampling.for_video(one.video.video_id), 1)
        assert isinstance(one.end, VideoEnd)  # only decoded videos are here
        outcomes.append(VideoOutcome(one.video, n_clips=1, info=one.info, end=one.end))
        clips.append(ClipRow(one.video.video_id, one.video.path, spans[0], 0.0, one.end.duration_s))
    rows = ShardRows(shard, tuple(outcomes), tuple(clips), features_ND, probs_NK)
    table = schema.clips_table(rows, recipe)
    outcomes_text = schema.outcomes_json(rows.outcomes, recipe.schema_version)
    own = pa.table({"video_id": [one.video.video_id for one in tried[:count]]})
    pooling = Pooling(rows.outcomes, recipe)
    pooling.add(features_ND, probs_NK)
    tables = [one for _, one, _ in derived(shard, {}, rows.outcomes, pooling.vectors, recipe, own)]
    with TemporaryDirectory(prefix="p3d-plan-") as folder:
        path = Path(folder) / "rows.parquet"

        def size(of: pa.Table) -> int:
            schema.write_parquet(path, of, {})
            return path.stat().st_size

        empty = sum(size(one.slice(0, 0)) for one in (table, *tables))
        per_clip = (size(table) - size(table.slice(0, 0))) / count
        per_video = (size(tables[0]) - size(tables[0].slice(0, 0)) + len(outcomes_text)) / count
    return round(n_clips * per_clip + n_videos * per_video + n_shards * empty)
