"""How many clips per second a worker on a GPU can be fed, by a network that takes no time; and each stage alone.

    python -m bench.feeding      local videos of 320x240 and 720p, and ready frames; half an hour

Ray is told of one GPU, which nothing uses. Arms of a round, in clips per second:

decoding      a process per core decodes the videos, without Ray (`bench.stages`); not for ready frames
messages      ready frames travel from decode processes through Ray to their reader, which drops them
batches       messages in memory become batches and rows: what the worker does with them
committing    rows become the committed files of a shard
fed, N        a job of N workers on the GPU

Two ceilings: the lowest stage alone, and "on these cores" what all stages reach that take turns on the same cores, as
they must on a machine where decoding takes all of them. Decoding and messages use every core, the others use one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from bench import null, stages
from bench.inputs import make_weights
from bench.processes import NULL, launch
from bench.rounds import Report, Rounds, Table, parser_of, per_second, take_turns
from p3d.jobs.machine import inference_threads_of, usable_cpus
from p3d.jobs.planning.prepare import GPU_BATCH, JobSpec, prepare
from p3d.jobs.scheduler.cluster import local_cluster
from p3d.jobs.worker.decode_task import DecodeSpec
from p3d.jobs.worker.decoding import Decoding
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.extract import InferenceThreads, extract_shard
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FLOAT32, INT64, UINT8, FrameBlock, ShardPlan, VideoRef
from p3d.pipeline.types.policy import DecodeLimits
from tests.zoo import corpus

SHARD = 64  # videos
CLIP = 16  # frames, of which a clip starts at each
FORMS, WORKERS = ("320x240", "720p", "ready160", "ready64"), (1, 4)
REFS = (VideoRef(f"{at:032x}", "", f"file:///{at}", "0" * 16, 1) for at in range(SHARD))
VIDEOS = ShardPlan(1, "0" * 8, 0, tuple(REFS))  # which nothing opens


@dataclass(frozen=True, slots=True)
class Work:
    """Videos of `n_frames` frames, real ones or, if `ready`, empty files whose frames are made up."""

    name: str
    source: Path
    weights: Path
    n_frames: int
    ready: bool
    recipe: Recipe

    @property
    def spec(self) -> DecodeSpec:
        recipe = self.recipe
        limits = (DecodeLimits(), DEFAULTS, usable_cpus(), 300.0)
        return DecodeSpec(recipe.frame_spec, recipe.sampling, recipe.decode_policy, *limits)


def fed(work: Work, workers: int, folder: Path) -> float:
    """Clips per second of a job."""
    out = folder / uuid.uuid4().hex
    env = {null.GPUS: "1"} | ({null.READY: str(work.n_frames)} if work.ready else {})
    words = ("--weights", work.weights, "--shard-videos", SHARD // 2 // workers, "--workers-per-gpu", workers)
    with patch.dict(os.environ, env):
        done = launch(work.source, str(out), *words, command=NULL)
    shutil.rmtree(out)
    return done.clips_per_s


def messages(work: Work, folder: Path) -> float:
    """Clips per second of the reader of some shards of messages, after the first of them."""
    with patch.dict(os.environ, {null.READY: str(work.n_frames)}), local_cluster():
        null.send_ready_frames()
        frames, started = 0, 0.0
        for _ in range(5):
            with closing(Decoding(VIDEOS, work.spec, folder).messages()) as found:
                frames += sum(len(one.numbers_N) for _, one in found if isinstance(one, FrameBlock))
            started, frames = (started, frames) if started else (time.monotonic(), 0)
        return frames / CLIP / (time.monotonic() - started)


def rows_of(work: Work) -> Any:
    """The rows of a shard whose features are all 1."""

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
        features_BD = np.ones((len(index_BT), work.recipe.feature_dim), np.float32)
        return features_BD, np.empty((len(features_BD), 0), np.float32)

    with patch.dict(os.environ, {null.READY: str(work.n_frames)}):
        ready = [*null.ready_messages(work.spec)]
    return extract_shard(
        VIDEOS,
        ((at, message) for at in range(SHARD) for message in ready),
        encode,
        sampling=work.recipe.sampling,
        batch_size=GPU_BATCH,
        feature_dim=work.recipe.feature_dim,
        n_scores=0,
        embedding_dtype="float32",
        inference_threads=InferenceThreads(inference_threads_of("cuda", 1, 1)),
    )


def committing(work: Work, folder: Path) -> float:
    """Clips per second that are committed to a local folder, after a first shard."""
    out = folder / uuid.uuid4().hex
    store, rows, shards = open_store(str(out)), rows_of(work), 4
    own, started = pa.table({"video_id": [video.video_id for video in VIDEOS.videos]}), 0.0
    for at in range(shards + 1):
        commit_shard(store, replace(rows, shard=replace(rows.shard, shard=at)), work.recipe, own)
        started = started or time.monotonic()
    took_s = time.monotonic() - started
    shutil.rmtree(out)
    return shards * len(rows.clips) / took_s


def measure(report: Report, work: Work, rounds: int, folder: Path) -> None:
    """All arms of one form of video."""
    alone: dict[str, Callable[[], float]] = {
        "messages": partial(messages, work, folder),
        "batches": per_second(partial(rows_of, work), SHARD * (work.n_frames // CLIP)),
        "committing": partial(committing, work, folder),
    }
    if not work.ready:
        alone["decoding"] = lambda: stages.run("decode", work.source, work.weights, f"every:{CLIP}").clips_per_s
    jobs = {f"fed, {n}": partial(fed, work, n, folder) for n in WORKERS}
    found = take_turns({**alone, **jobs}, rounds, "clips/s", warm=False)
    by_round = [{name: found.of[name][at] for name in alone} for at in range(rounds)]
    ceilings = {"lowest stage": [min(rates.values()) for rates in by_round], "on these cores": [*map(shared, by_round)]}
    lowest = min(alone, key=lambda name: found.spread(name).median)
    whole = Rounds("clips/s", {**found.of, **ceilings})
    bases = [str(whole.ratio(arm, base)) for arm in whole.of for base in ceilings]
    rows = tuple((arm, str(whole.spread(arm)), *bases[2 * at : 2 * at + 2]) for at, arm in enumerate(whole.of))
    columns = ("arm", "clips/s", "over the lowest stage", "over these cores")
    report.add(Table(f"{work.name}: the lowest stage is {lowest}", columns, rows, whole))


def shared(rates: dict[str, float]) -> float:
    """Clips per second if the stages take turns on the cores of this machine."""
    parallel = sum(1 / rates[name] for name in ("decoding", "messages") if name in rates)
    return 1 / (parallel + sum(1 / rates[name] for name in ("batches", "committing")) / usable_cpus())


def works_of(folder: Path, only: list[str], videos: int) -> list[Work]:
    """The forms of video to measure."""
    made = []
    for name in only:
        ready = name.startswith("ready")
        weights = make_weights(folder, "p3d63", 64 if name == "ready64" else None)
        n_frames, source = 160 if ready else 96, folder / name
        source.mkdir()
        if not ready:
            corpus.make(source, videos, (240, 320) if name == "320x240" else (720, 1280), n_frames, 48)
        for at in range(videos * ready):
            (source / f"{at:05d}.mp4").write_bytes(at.to_bytes(8, "big"))
        made.append(Work(name, source, weights, n_frames, ready, prepare(JobSpec(None, str(weights))).recipe))
    return made


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS), help="measure these forms of video")
    parser.add_argument("--videos", type=int, default=4 * SHARD, help=f"of each form (default {4 * SHARD})")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    given = parser.parse_args()
    report = Report("feeding", "Feeding a worker on a GPU")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        for work in works_of(folder, given.only, given.videos):
            measure(report, work, given.rounds, folder)
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(null)
    sys.exit(main())
