"""A few clips, and the most similar clips of other videos, in a random sample of bounded size.

    some shards ──every clip, checked──> CLIPS of them at random ──> queries, and the nearest clips of other videos

Memory holds CLIPS vectors and one row group. Legend: N rows of a group, S of the sample, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.results.report.facts import SAMPLE_COLUMNS, Rows, Sampled, in_turn, name_of, with_out
from p3d.pipeline.results.sample import Reservoir
from p3d.pipeline.results.search.metrics import cosines

CLIPS = 8192  # in the sample: 64 MiB of vectors of 2048 float32
SHARDS = 32  # of all jobs, drawn at random, that the sample is taken from; at least one of each
FILES = 1  # of a snapshot instead, whose files have up to 1 GiB
_KEYS = ["video_id", "start_s", "end_s"]


@dataclass(frozen=True, slots=True)
class Clip:
    """Seconds [start_s, end_s) of a video. `cosine` is to the query, and None for the query itself."""

    video: Sampled
    start_s: float
    end_s: float
    cosine: float | None = None

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Each query with its neighbours, the nearest first, found among `n_clips` clips of `n_videos` videos."""

    found: tuple[tuple[Clip, tuple[Clip, ...]], ...]
    n_clips: int
    n_videos: int


def find_neighbours(
    sources: Sequence[Rows],
    *,
    queries: int,
    top: int,
    rng: np.random.Generator,
    on_step: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Draw query clips, and find the nearest clip of each of the `top` most similar other videos in the sample."""
    dim = sources[0].job.recipe.feature_dim
    sample = Reservoir(rng, CLIPS, dim)
    for source, told in in_turn(sources if queries else (), on_step):
        if not source.with_clips:
            continue
        for folder, table in source.rows(skip=_left_out(source, rng, max(1, SHARDS // len(sources))), on_step=told):
            if folder == "clips" and table.num_rows:
                sample.add(schema.features_of(table["embedding"], dim), with_out(table.select(_KEYS), source))
    nearest = _nearest(sample, queries, top, rng) if sample.n else []
    shown = [sample.keys[at] for query, others in nearest for at in (query, *(at for at, _ in others))]
    videos: dict[tuple[str, str], Sampled] = {}
    for source in sources:
        ids = frozenset(video_id for video_id, *_, out in shown if out == name_of(source))
        for folder, table in source.rows(clips=False, only=ids) if ids else ():
            if folder == "videos":
                rows = (Sampled(**row) for row in with_out(table.select(SAMPLE_COLUMNS), source).to_pylist())
                videos.update((one.key, one) for one in rows)

    def clip(at: int, cosine: float | None = None) -> Clip:
        video_id, start_s, end_s, out = sample.keys[at]
        return Clip(videos[out, video_id], start_s, end_s, cosine)

    found = tuple((clip(query), tuple(clip(at, cosine) for at, cosine in others)) for query, others in nearest)
    return Neighbours(found, sample.n, len({(key[0], key[-1]) for key in sample.keys.values()}))


def _left_out(source: Rows, rng: np.random.Generator, shards: int) -> frozenset[str]:
    """All pieces except those that the sample is drawn from: `shards` of a job, FILES of a snapshot."""
    snapshot = isinstance(source, SnapshotRows)
    pieces = [one for one in source.pieces if not snapshot or one.startswith("clips/")]
    size = min(len(pieces), FILES if snapshot else shards)
    kept = {pieces[at] for at in rng.choice(len(pieces), size, replace=False)} if pieces else set()
    return frozenset(source.pieces) - kept


def _nearest(
    sample: Reservoir, queries: int, top: int, rng: np.random.Generator
) -> list[tuple[int, list[tuple[int, float]]]]:
    """(query, [(neighbour, cosine), ...]) by row number in the sample. Each query is of another video.

    Empty if the sample has only one video.
    """
    keys = [(sample.keys[at][-1], sample.keys[at][0]) for at in range(sample.n)]
    known: dict[tuple[str, str], int] = {}
    ids_S = np.array([known.setdefault(key, len(known)) for key in keys])  # a number for each video
    features_SD = sample.rows_SD[: sample.n]
    lengths_S = np.sqrt(np.einsum("sd,sd->s", features_SD, features_SD))
    first: dict[int, int] = {}
    for at in rng.permutation(sample.n).tolist():
        first.setdefault(ids_S[at], at)
    found = []
    for query in list(first.values())[:queries]:
        near_S = features_SD @ (features_SD[query] / lengths_S[query]) / lengths_S
        near_S[ids_S == ids_S[query]] = -np.inf
        others: list[tuple[int, float]] = []
        seen: set[int] = set()
        for at in np.argsort(-near_S, kind="stable").tolist():
            if len(others) == top or near_S[at] == -np.inf:
                break
            if ids_S[at] not in seen:
                seen.add(ids_S[at])
                pair = features_SD[[query, at]].astype(np.float64)
                others.append((at, float(cosines(pair[:1], pair[1:])[0])))
        if others:
            found.append((query, others))
    return found
