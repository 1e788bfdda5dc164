"""Estimate the cost of a launch: decode some videos, embed their clips, and extrapolate.

    all videos ──sample──> probe: clips per byte ──> 32 of them ──trial──> seconds of decoding, frames
                                                     frames ──Encoder, inference threads of a job──> clips/s, rows
                                                              on a GPU also in batches of several sizes
                                                              in fp32 also in lower precisions that run here
                                                     rows ──the dataset's own writers──> bytes per row

On a CPU, decoding and the network share the cores, so their times add up. On a GPU they overlap, so the slower of the
two determines the time.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.jobs.machine import cpus_of_a_gpu_worker, usable_cpus
from p3d.jobs.planning.changes import ToDo
from p3d.jobs.planning.decode_trial import How, Tried, trial
from p3d.jobs.planning.feeding import COMMIT_S_PER_CLIP, LOCAL_SHARD_S, S3_SHARD_S, Feeding, feeding, read_seconds
from p3d.jobs.planning.network_trial import WORTH, Gain, embed_trial
from p3d.jobs.planning.prepare import MAX_DECODE_TASKS, Prepared, default_workers, machines_here
from p3d.jobs.planning.shard_size import cpu_sizing
from p3d.pipeline.clips.rules import clip_spans, laid_over, looked_at
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import Pooling, derived
from p3d.pipeline.dataset.outcomes import Outcomes
from p3d.pipeline.dataset.plans import total_bytes
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.decode.frames import probe, route_of
from p3d.pipeline.errors import InputError, VideoError, counted
from p3d.pipeline.recipe import Recipe, ShardSizing
from p3d.pipeline.sources.identity import local_path
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import FLOAT32, ClipRow, Failure, ShardPlan, ShardRows, VideoEnd, VideoOutcome, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

SAMPLE = 500  # at most this many videos are probed, drawn from the whole source with a fixed seed
SAMPLE_S = 5.0  # seconds after which no further video is probed
TRIED = 32  # of them are decoded and embedded
TRIED_S = 30.0  # seconds after which decoding stops
STARTUP_S = 9.0  # that Ray and the first worker take, about
MESSAGES_S = 0.010  # CPU seconds to transport the messages of a video; docs/explanation/performance.md


EXAMPLES = 3  # of the videos that fail for a reason
TELL_S = 5.0  # between two messages about the progress of the trial
LEAST_COSINE = 0.999  # with fp32, of any clip, for a precision to be recommended
DIGITS = 20  # of a feature of the golden clip, as text


@dataclass(frozen=True, slots=True)
class Failing:
    """How many videos of the sample fail for a reason, and the first few of them: (path, detail)."""

    reason: str
    count: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class JobGain(Gain):
    """`job_times`: the speed of the whole job as a multiple of that in fp32, with its start and its decoding."""

    job_times: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts of videos and shards are exact; clips, bytes and seconds are extrapolated.

    `n_missing` files do not exist, such as `missing`. `n_sampled` of the others were probed or decoded, `n_tried` of
    them decoded. `n_failed` of the sample fail, for the reasons of `failing`. `share` of the frames of the median video
    are part of a clip; None if no video could be read. `output_bytes` are those of the rows, `weights_bytes` those of
    the copy of the weights, 0 if OUT has one. `clips_per_s` is the rate of one worker's network alone in
    batches of `batch_size` clips. `by_batch` has the rates of other sizes, 0 for those that do not fit; it is empty on
    a CPU. `decode_s_per_clip` and `network_s_per_clip` are CPU seconds (the latter is 0 on a GPU). `binding` is the
    slower stage, "decoding" or "network". `useful_cores` keep one GPU busy; None on a CPU, which can use all cores.
    `gains` are those of the other precisions that run here, if the recipe is in fp32. `not_compared` has those that
    could be expected here, but that this GPU or the network lacks. `feeding` is what one of the workers can be fed on
    this machine; None on a CPU.
    """

    n_videos: int
    n_shards: int
    size_bytes: int
    n_missing: int
    missing: tuple[str, ...]
    n_sampled: int
    n_tried: int
    n_failed: int
    failing: tuple[Failing, ...]
    share: float | None
    n_clips: int
    output_bytes: int
    weights_bytes: int
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
    gains: tuple[JobGain, ...] = ()
    not_compared: dict[str, str] = field(default_factory=dict)
    feeding: Feeding | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    todo: ToDo,
    prepared: Prepared,
    *,
    shard_videos: int | None,
    workers: int | None,
    workers_per_gpu: int,
    weights_bytes: int,
    s3: StoreOptions,
    tell: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Probe a sample of local videos, then decode and embed a few local or S3 videos and time both on this machine.

    `tell` is called with the progress. InputError if there is nothing to do.
    """
    new = todo.changes.videos()
    videos = pa.concat_tables([one.select(VideoRef.__slots__) for one in (new, todo.pending)])
    if not videos.num_rows:
        raise InputError("there is nothing to estimate")
    recipe, sizes = prepared.recipe, videos["size_bytes"].to_numpy()
    missing = np.flatnonzero(sizes < 0)
    order = [at for at in np.random.default_rng(0).permutation(len(sizes)).tolist() if sizes[at] >= 0]
    refs = [VideoRef(**row) for row in videos.take(order[:SAMPLE]).to_pylist()]
    how = How(recipe.frame_spec, recipe.sampling, recipe.decode_policy, s3)
    cpus = usable_cpus()
    if n_local := sum(not one.uri.startswith("s3://") for one in refs):
        tell(f"reading what is in {counted(n_local, 'video')}, for at most {SAMPLE_S:.0f} s ...")
    sample = _probed(refs, recipe)
    tell(f"decoding {counted(len(refs[:TRIED]), 'video')}, for at most {TRIED_S:.0f} s ...")
    on_done = _Counted(len(refs[:TRIED]), tell)
    tried = trial(refs[:TRIED], how, children=cpus, longest_s=TRIED_S, on_done=on_done)
    good = [one for one in tried if isinstance(one.end, VideoEnd)]

    total = total_bytes(sizes)
    n_clips = _count(sample, tried, recipe, total)
    sample |= {one.video.video_id: _looked(one, recipe) for one in tried}
    decode_s = sum(one.cpu_s for one in tried) * total / max(sum(one.video.size_bytes for one in tried), 1)

    tell("embedding a clip of each ...")
    network = embed_trial(prepared, good, cpus)
    device, rate = network.device, network.clips_per_s
    there = machines_here()
    workers = workers or default_workers(there.gpus, workers_per_gpu)
    on_cpu = device == "cpu"
    cores_s = (decode_s + MESSAGES_S * len(videos)) / cpus
    # a CPU's workers share its cores, and those of a GPU share it
    network_s = n_clips / (rate if on_cpu else rate * math.ceil(workers / workers_per_gpu))
    sizing = ShardSizing() if shard_videos is None else ShardSizing(shard_videos)
    if shard_videos is None and on_cpu and any(isinstance(one.end, VideoEnd) for one in tried):  # as a launch does
        sizing = cpu_sizing(recipe.sampling, (cores_s + network_s) * workers, len(videos), total / 1e6)
    n_shards = todo.n_pending_shards
    n_shards += int(with_shards(new, sizing)["shard"][-1].as_py()) + 1 if new.num_rows else 0
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
        n_missing=len(missing),
        missing=tuple(videos["path"].take(missing[:EXAMPLES]).to_pylist()),
        n_sampled=len(sample),
        n_tried=len(tried),
        n_failed=sum(one.failure is not None for one in sample.values()),
        failing=_failing(sample),
        share=median(shares) if (shares := [one.share for one in sample.values() if one.share]) else None,
        n_clips=n_clips,
        output_bytes=output,
        weights_bytes=weights_bytes,
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
        gains=tuple(job_gain(one, cores_s, network_s, on_cpu=on_cpu) for one in network.gains),
        not_compared=network.not_compared,
        feeding=None
        if on_cpu or not n_clips
        else fed(
            recipe,
            cores=max(1, cpus // workers - cpus_of_a_gpu_worker(there, workers, workers_per_gpu)),
            decode_s=decode_s / n_clips,
            shard_clips=n_clips / n_shards,
            on_s3=any(one.uri.startswith("s3://") for one in refs),
        ),
    )


def fed(recipe: Recipe, *, cores: int, decode_s: float, shard_clips: float, on_s3: bool) -> Feeding:
    """What one worker on a GPU can be fed here by `cores` decodes, each of which takes `decode_s` seconds per clip.

    Decoding is measured by the trial; the other stages take what they took in the bench.
    """
    height, width = recipe.crop_hw
    return feeding(
        cores=min(cores, MAX_DECODE_TASKS),
        decode_s=decode_s,
        read_s=read_seconds(recipe.clip_frames, 3 * height * width),
        commit_s=COMMIT_S_PER_CLIP,
        shard_clips=shard_clips,
        shard_s=S3_SHARD_S if on_s3 else LOCAL_SHARD_S,
    )


def seconds_of_job(cores_s: float, network_s: float, *, on_cpu: bool) -> float:
    """Seconds from launch to end, if decoding takes `cores_s` and the network `network_s` alone."""
    return STARTUP_S + (cores_s + network_s if on_cpu else max(cores_s, network_s))


def job_gain(of: Gain, cores_s: float, network_s: float, *, on_cpu: bool) -> JobGain:
    """What a precision gains for a whole job whose stages take these seconds in fp32."""
    full_s = seconds_of_job(cores_s, network_s, on_cpu=on_cpu)
    half_s = seconds_of_job(cores_s, network_s / of.times, on_cpu=on_cpu)
    return JobGain(**asdict(of), job_times=full_s / half_s)


def recommended(gains: Sequence[JobGain]) -> JobGain | None:
    """The precision to choose: the most exact of those nearly as fast as the fastest. None if none is worth it."""
    worth = [one for one in gains if one.job_times >= WORTH and one.lowest >= LEAST_COSINE]
    fastest = max((one.job_times for one in worth), default=0.0)
    return max((one for one in worth if one.job_times * WORTH >= fastest), key=lambda one: one.lowest, default=None)


@dataclass(frozen=True, slots=True)
class _Looked:
    """What was found in a video: its clips, the share of its frames that they look at, or why it fails."""

    path: str
    size_bytes: int
    n_clips: int = 0
    share: float = 0.0
    failure: Failure | None = None


class _Counted:
    """Counts the videos of the trial, and tells about them now and then. Called by several threads."""

    def __init__(self, n_all: int, tell: Callable[[str], None]) -> None:
        self.n_all, self.tell, self.n_done, self.told = n_all, tell, 0, time.monotonic()
        self.lock = threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.n_done += 1
            if time.monotonic() - self.told >= TELL_S:
                self.told = time.monotonic()
                self.tell(f"{self.n_done} of {self.n_all} decoded ...")


def _count(probed: dict[str, _Looked], tried: list[Tried], recipe: Recipe, total: int) -> int:
    """The number of clips in `total` bytes of videos.

    A probe promises more clips of a damaged video than can be decoded. The tried videos show which share is real.
    """
    seen = {one.video.video_id: _looked(one, recipe) for one in tried}
    sample = probed or seen
    promised = sum(sample[one].n_clips for one in seen if one in sample)
    kept = sum(seen[one].n_clips for one in seen if one in sample) / promised if promised else 1.0
    n_clips, size_bytes = sum(one.n_clips for one in sample.values()), sum(one.size_bytes for one in sample.values())
    return round(n_clips * kept * total / max(size_bytes, 1))


def _probed(videos: list[VideoRef], recipe: Recipe) -> dict[str, _Looked]:
    """What a sample of the local videos holds, by id; videos on S3 are left out, to avoid downloads."""
    found = {}
    until = time.monotonic() + SAMPLE_S
    for video in videos:
        if video.uri.startswith("s3://"):
            continue
        try:
            seen = probe(os.fsdecode(local_path(video.uri)), DecodeLimits())
            route_of(seen, recipe.frame_spec, recipe.sampling, recipe.decode_policy, DecodeLimits())
            found[video.video_id] = _readable(video, recipe, seen.n_frames, seen.duration_s)
        except VideoError as error:
            failure = Failure(error.reason, error.detail)
            found[video.video_id] = _Looked(video.path, video.size_bytes, failure=failure)
        if time.monotonic() > until:
            break
    return found


def _looked(one: Tried, recipe: Recipe) -> _Looked:
    if isinstance(one.end, Failure):
        return _Looked(one.video.path, one.video.size_bytes, failure=one.end)
    return _readable(one.video, recipe, one.end.n_frames, one.end.duration_s)


def _readable(video: VideoRef, recipe: Recipe, n_frames: int, duration_s: float) -> _Looked:
    sampling = recipe.sampling.for_video(video.video_id)
    n_frames = laid_over(sampling, n_frames, duration_s)
    spans = clip_spans(sampling, n_frames)
    return _Looked(video.path, video.size_bytes, len(spans), looked_at(sampling, spans, n_frames))


def _failing(sample: dict[str, _Looked]) -> tuple[Failing, ...]:
    """The failures of the sample by reason, the most frequent first."""
    failed = [(one.path, one.failure) for one in sample.values() if one.failure is not None]
    counts = Counter(str(failure.reason) for _, failure in failed)
    return tuple(
        Failing(
            reason,
            count,
            tuple((path, failure.detail) for path, failure in failed if str(failure.reason) == reason)[:EXAMPLES],
        )
        for reason, count in counts.most_common()
    )


def weights_bytes(prepared: Prepared) -> int:
    """The bytes that a new job writes besides its plan and its rows: the weights and the golden features, about."""
    return len(prepared.content) + DIGITS * prepared.recipe.feature_dim


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
    of_rows = Outcomes.of(rows.outcomes, recipe.schema_version)
    pooling = Pooling(of_rows.n_clips, recipe)
    pooling.add(features_ND, probs_NK)
    tables = [one for _, one, _ in derived(shard, {}, of_rows, pooling.vectors, recipe, own)]
    with TemporaryDirectory(prefix="p3d-plan-") as folder:
        path = Path(folder) / "rows.parquet"

        def size(of: pa.Table) -> int:
            schema.write_parquet(path, of, {})
            return path.stat().st_size

        empty = sum(size(one.slice(0, 0)) for one in (table, *tables))
        per_clip = (size(table) - size(table.slice(0, 0))) / count
        per_video = (size(tables[0]) - size(tables[0].slice(0, 0)) + len(outcomes_text)) / count
    return round(n_clips * per_clip + n_videos * per_video + n_shards * empty)
