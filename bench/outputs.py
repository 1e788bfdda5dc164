"""Outputs of random vectors, written by the commit protocol without decoding, and commands that are measured on them.

    write ──> job.json, plans/, clips/, videos/, failures/           measured ──> Ran: output, seconds, CPU s, peak MB

The rows pass every check of `p3d verify --deep`. There are no weights, so no file can be embedded as a query.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.rounds import REPO
from p3d.pipeline.clips.rules import ClipSpan
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.errors import Reason
from p3d.pipeline.recipe import JobRecord, Recipe, ShardSizing
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types import FLOAT32, ClipRow, Failure, ShardRows, VideoEnd, VideoInfo, VideoOutcome, VideoRef
from tests.pipeline.rows import recipe, videos

SHARD_VIDEOS = 64
FRAMES, FPS = 16, 25  # of a clip
# the kernel's peak of a child includes its parent before exec; /proc/self/status does not
MEASURED = """
import atexit, os, pathlib
status, note = pathlib.Path("/proc/self/status"), pathlib.Path(os.environ["P3D_PEAK"])
atexit.register(lambda: note.write_text(status.read_text().split("VmHWM:")[1].split()[0]))
"""
P3D = "from p3d.jobs.cli import main; main()"

Vectors = Callable[[int, int, int, int], FLOAT32]  # (shard, videos, clips, dim) -> [videos * clips, dim]


def id_of(at: int) -> str:
    """An id as a listing makes it."""
    return hashlib.sha256(str(at).encode()).hexdigest()[:32]


def normal(shard: int, n_videos: int, n_clips: int, dim: int) -> FLOAT32:
    """Independent normal features: no two videos are alike."""
    return np.random.default_rng([3, shard]).standard_normal((n_videos * n_clips, dim), np.float32)


def write(
    folder: Path, n_videos: int, n_clips: int, vectors: Vectors = normal, *, failing: int = 0, **changes: object
) -> None:
    """Write an output of videos of `n_clips` clips; of each `failing` videos one fails. `changes` are of the recipe."""
    store, chosen = LocalStore(str(folder)), recipe(**changes)
    store.create("job.json", JobRecord(chosen, "random:0", {}).to_json())
    table = with_shards(videos([id_of(at) for at in range(n_videos)]), ShardSizing(SHARD_VIDEOS))
    plan = write_plan(store, 1, chosen, table, 0, ShardSizing())
    workers = os.cpu_count() or 1
    parts = [range(at, plan.n_shards, workers) for at in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        pool.map(partial(_commit, folder, chosen, n_clips, vectors, failing), parts)


def _commit(folder: Path, chosen: Recipe, n_clips: int, vectors: Vectors, failing: int, shards: Iterable[int]) -> None:
    from p3d.pipeline.dataset.plans import load_plans

    store = LocalStore(str(folder))
    manifest = Manifest(store, load_plans(store)[0])
    for at in shards:
        plan = manifest.shard(at)
        outcomes = tuple(
            _outcome(one, 0 if failing and k % failing == failing - 1 else n_clips) for k, one in enumerate(plan.videos)
        )
        done = [one.video for one in outcomes if one.n_clips]
        clips = tuple(
            ClipRow(
                one.video_id,
                one.path,
                ClipSpan(k, FRAMES * k, FRAMES * (k + 1), 0),
                FRAMES * k / FPS,
                FRAMES * (k + 1) / FPS,
            )
            for one in done
            for k in range(n_clips)
        )
        features_RD = vectors(at, len(done), n_clips, chosen.feature_dim)
        rows = ShardRows(plan, outcomes, clips, features_RD, np.empty((len(clips), 0), np.float32), {})
        commit_shard(store, rows, chosen, manifest.user_columns(at))


def _outcome(video: VideoRef, n_clips: int) -> VideoOutcome:
    if not n_clips:
        return VideoOutcome(video, failure=Failure(Reason.TRUNCATED, "ends early, after 12 of 250 frames", 1))
    n_frames = FRAMES * n_clips
    info = VideoInfo(n_frames, 320, 240, 0, float(FPS), n_frames / FPS, "mp4", "h264", 0, "decord")
    return VideoOutcome(video, n_clips, info, VideoEnd(n_frames, n_frames / FPS))


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended: what it printed, elapsed and CPU seconds, and its peak resident memory."""

    printed: str
    seconds: float
    cpu_s: float
    peak_mb: float


def measured(*words: object, code: str = P3D) -> Ran:
    """Run Python code, that of p3d by default, with the words as arguments. SystemExit if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        command = [sys.executable, "-c", MEASURED + code, *map(str, words)]
        env = {**os.environ, "P3D_PEAK": str(peak), "PYTHONPATH": str(REPO)}
        started = time.monotonic()
        with (Path(folder) / "said").open("w+") as said:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=env)
            assert process.stdout is not None
            printed = process.stdout.read().decode()
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
            if status:
                said.seek(0)
                raise SystemExit(f"{' '.join(map(str, words))} ended with {status}: {said.read()[-3000:]}")
        return Ran(printed, seconds, used.ru_utime + used.ru_stime, int(peak.read_text()) * 1024 / 1e6)
