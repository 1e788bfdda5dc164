"""A few clips, and the most similar clips of other videos, in a random sample of bounded size.

    some shards ──every clip, checked──> CLIPS of them at random ──> queries, and the nearest clips of other videos

Memory holds CLIPS vectors and one row group. Legend: N rows of a group, S of the sample, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.results.report.facts import SAMPLE_COLUMNS, Rows, Sampled
from p3d.pipeline.results.sample import Reservoir
from p3d.pipeline.results.search.metrics import cosines

CLIPS = 8192  # in the sample: 64 MiB of vectors of 2048 float32
SHARDS = 32  # of a job, drawn at random, that the sample is taken from
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
    source: Rows,
    *,
    queries: int,
    top: int,
    rng: np.random.Generator,
    on_step: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Draw query clips, and find the nearest clip of each of the `top` most similar other videos in the sample."""
    sample = Reservoir(rng, CLIPS, source.job.recipe.feature_dim)
    if source.with_clips and queries:
        for folder, table in source.rows(skip=_left_out(source, rng), on_step=on_step):
            if folder == "clips" and table.num_rows:
                features_ND = schema.features_of(table["embedding"], source.job.recipe.feature_dim)
                sample.add(features_ND, table.select(_KEYS))
    nearest = _nearest(sample, queries, top, rng) if sample.n else []
    ids = frozenset(sample.keys[at][0] for query, others in nearest for at in (query, *(at for at, _ in others)))
    videos: dict[str, Sampled] = {}
    for folder, table in source.rows(clips=False, only=ids) if ids else ():
        if folder == "videos":
            rows = table.select(SAMPLE_COLUMNS).to_pylist()
            videos.update((row["video_id"], Sampled(**row)) for row in rows)

    def clip(at: int, cosine: float | None = None) -> Clip:
        video_id, start_s, end_s = sample.keys[at]
        return Clip(videos[video_id], start_s, end_s, cosine)

    found = tuple((clip(query), tuple(clip(at, cosine) for at, cosine in others)) for query, others in nearest)
    return Neighbours(found, sample.n, len({key[0] for key in sample.keys.values()}))


def _left_out(source: Rows, rng: np.random.Generator) -> frozenset[str]:
    """All pieces except those that the sample is drawn from."""
    snapshot = isinstance(source, SnapshotRows)
    pieces = [one for one in source.pieces if not snapshot or one.startswith("clips/")]
    size = min(len(pieces), FILES if snapshot else SHARDS)
    kept = {pieces[at] for at in rng.choice(len(pieces), size, replace=False)} if pieces else set()
    return frozenset(source.pieces) - kept


def _nearest(
    sample: Reservoir, queries: int, top: int, rng: np.random.Generator
) -> list[tuple[int, list[tuple[int, float]]]]:
    """(query, [(neighbour, cosine), ...]) by row number in the sample. Each query is of another video.

    Empty if the sample has only one video.
    """
    ids_S = np.array([sample.keys[at][0] for at in range(sample.n)], object)
    features_SD = sample.rows_SD[: sample.n]
    lengths_S = np.sqrt(np.einsum("sd,sd->s", features_SD, features_SD))
    first: dict[str, int] = {}
    for at in rng.permutation(sample.n).tolist():
        first.setdefault(ids_S[at], at)
    found = []
    for query in list(first.values())[:queries]:
        near_S = features_SD @ (features_SD[query] / lengths_S[query]) / lengths_S
        near_S[ids_S == ids_S[query]] = -np.inf
        others: list[tuple[int, float]] = []
        seen: set[str] = set()
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
