"""Near-duplicate videos of a whole dataset: pairs by their video vectors, evidence by their clips, and clusters.

    pass 1   videos/   unit vectors in a temporary file ──near_pairs──> pairs above the threshold ──> clusters
    pass 2   clips/    some clips of each video in a cluster (probes)
    pass 3   clips/    every clip of its most similar video against these probes ──> which seconds are similar

Memory: an eighth of the vectors, PROBE_BYTES of probes, one row group, and some 200 bytes per video. The vectors of the
videos, 4 D bytes each, are in a temporary file. Time grows with the square of the number of videos (`near_pairs`).
Clusters are the connected components of the pairs, so two videos of a cluster need not be similar: each video has its
own evidence. Legend: N rows, P probes, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.results.near_pairs import near_pairs
from p3d.pipeline.results.vectors import VectorFile, unit
from p3d.pipeline.types import FLOAT32, INT64

PROBE_BYTES = 256 * 1024**2
PROBES = 8  # clips of a video to look for in the other one, evenly spaced; fewer if PROBE_BYTES is not enough

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Match:
    """Seconds [start_s, end_s) of a video, the most similar seconds of the other video, and the cosine of the clips."""

    cosine: float
    start_s: float
    end_s: float
    other_start_s: float
    other_end_s: float


@dataclass(frozen=True, slots=True)
class Member:
    """A video of a cluster, the video of the cluster most similar to it, and the cosine of their vectors.

    `matches` has the most similar clips of the two, by time; empty if the dataset has no clips.
    """

    video_id: str
    path: str
    uri: str
    n_clips: int
    duration_s: float
    like_id: str
    like_path: str
    cosine: float
    matches: tuple[Match, ...]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Clusters of two or more videos, the largest first, videos in plan order. `n_videos` were compared."""

    clusters: tuple[tuple[Member, ...], ...]
    n_videos: int
    n_pairs: int


def find_duplicates(
    source: NewestRows | SnapshotRows, *, threshold: float, on_step: OnStep | None = None
) -> Duplicates:
    """Videos whose vectors have a cosine of `threshold` or more. DamagedJob if a row is damaged."""
    pairs = _Pairs(threshold)
    _compare_all(source, pairs, on_step)
    clusters = pairs.clusters()
    names = pairs.names
    like = {at: pairs.most_similar[at] for cluster in clusters for at in cluster}
    found = _facts(source, frozenset(names[at] for at in like))
    evidence = _Evidence({names[at]: names[other] for at, (_, other) in like.items()}, source.job.recipe.feature_dim)
    if source.with_clips and like:
        evidence.gather(source, found, on_step)

    def member(at: int) -> Member:
        cosine, other = like[at]
        path, uri, n_clips, duration_s = found[names[at]]
        matches = evidence.matches_of(names[at])
        other_id = names[other]
        return Member(names[at], path, uri, n_clips, duration_s, other_id, found[other_id][0], cosine, matches)

    return Duplicates(tuple(tuple(map(member, cluster)) for cluster in clusters), len(names), pairs.n_pairs)


class _Pairs:
    """Pairs of videos, by number in plan order: their connected components, and the most similar partner of each."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.n_pairs = threshold, 0
        self.names: list[str] = []
        self.most_similar: dict[int, tuple[float, int]] = {}
        self._parent: dict[int, int] = {}

    def add(self, first_P: INT64, second_P: INT64, cosine_P: FLOAT32) -> None:
        """Add pairs by the numbers of their videos, each pair once, the first before the second."""
        self.n_pairs += len(first_P)
        for a, b, cosine in zip(first_P.tolist(), second_P.tolist(), cosine_P.tolist(), strict=True):
            self._join(a, b)
            for mine, theirs in ((a, b), (b, a)):
                if cosine > self.most_similar.get(mine, (-2.0, 0))[0]:
                    self.most_similar[mine] = (cosine, theirs)

    def clusters(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for one in sorted(self.most_similar):
            found.setdefault(self._root(one), []).append(one)
        return sorted(found.values(), key=lambda cluster: (-len(cluster), cluster[0]))

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        self._parent[max(a, b)] = min(a, b)

    def _root(self, one: int) -> int:
        while (parent := self._parent.get(one, one)) != one:
            self._parent[one] = self._parent.get(parent, parent)
            one = parent
        return one


def _compare_all(source: NewestRows | SnapshotRows, pairs: _Pairs, on_step: OnStep | None) -> None:
    """Compare every pair of videos once, after one pass over their rows."""
    dim = source.job.recipe.feature_dim
    vectors = VectorFile(dim)
    for folder, table in source.rows(clips=False, on_step=on_step and partial(on_step, "read")):
        if folder == "videos" and table.num_rows:
            pairs.names += table["video_id"].to_pylist()
            vectors.add(table)
    for found in near_pairs(vectors.mapped(), pairs.threshold, on_step and partial(on_step, "compared")):
        pairs.add(*found)


def _facts(source: NewestRows | SnapshotRows, ids: frozenset[str]) -> dict[str, tuple[str, str, int, float]]:
    """(path, uri, n_clips, duration_s) of some videos."""
    found = {}
    for folder, table in source.rows(clips=False, only=ids) if ids else ():
        if folder == "videos":
            columns = [table[name].to_pylist() for name in ("video_id", "path", "uri", "n_clips", "duration_s")]
            found.update({row[0]: row[1:] for row in zip(*columns, strict=True)})
    return found


@dataclass(slots=True)
class _Probes:
    """Some clips of a video, and the best match of each in the other video so far."""

    start_s: list[float]
    end_s: list[float]
    vectors_PD: FLOAT32
    best: list[Match | None]


class _Evidence:
    """Which seconds of a video are similar to which seconds of its most similar video."""

    def __init__(self, like: dict[str, str], dim: int) -> None:
        self.like, self.dim = like, dim
        self._asked: dict[str, list[str]] = {}  # video -> the videos whose most similar video it is
        for one, other in like.items():
            self._asked.setdefault(other, []).append(one)
        self._probes: dict[str, _Probes] = {}

    def gather(
        self, source: NewestRows | SnapshotRows, facts: dict[str, tuple[str, str, int, float]], on_step: OnStep | None
    ) -> None:
        """Two passes over the clips of the clusters' videos."""
        per_video = max(1, min(PROBES, PROBE_BYTES // (4 * self.dim * len(self.like))))
        wanted = {one: _spread(facts[one][2], per_video) for one in self.like}
        for what, use in (("probes", partial(self._take, wanted)), ("evidence", self._match)):
            ids = frozenset(self.like)
            for folder, table in source.rows(only=ids, on_step=on_step and partial(on_step, what)):
                if folder == "clips" and table.num_rows:
                    use(table)

    def matches_of(self, video_id: str) -> tuple[Match, ...]:
        probes = self._probes.get(video_id)
        return tuple(one for one in probes.best if one is not None) if probes else ()

    def _take(self, wanted: dict[str, frozenset[int]], table: pa.Table) -> None:
        for video_id, rows in by_video(table):
            keep = [at for at in rows if table["clip_index"][at].as_py() in wanted[video_id]]
            chosen = table.take(pa.array(keep, pa.int64()))
            starts, ends = chosen["start_s"].to_pylist(), chosen["end_s"].to_pylist()
            vectors_PD = unit(chosen, self.dim)
            if (known := self._probes.get(video_id)) is not None:  # a video may lie in two row groups
                starts, ends = known.start_s + starts, known.end_s + ends
                vectors_PD = np.concatenate([known.vectors_PD, vectors_PD])
            self._probes[video_id] = _Probes(starts, ends, vectors_PD, [None] * len(starts))

    def _match(self, table: pa.Table) -> None:
        unit_ND, starts, ends = unit(table, self.dim), table["start_s"].to_pylist(), table["end_s"].to_pylist()
        for video_id, rows in by_video(table):
            for asking in self._asked.get(video_id, ()):
                probes = self._probes[asking]
                cosine_PN = probes.vectors_PD @ unit_ND[rows.start : rows.stop].T
                for at, best in enumerate(cosine_PN.argmax(axis=1).tolist()):
                    cosine, there = min(1.0, float(cosine_PN[at, best])), rows.start + best
                    before = probes.best[at]
                    if before is None or cosine > before.cosine:
                        probes.best[at] = Match(
                            cosine, probes.start_s[at], probes.end_s[at], starts[there], ends[there]
                        )


def by_video(table: pa.Table) -> Iterator[tuple[str, range]]:
    """(video_id, its rows); the rows of a video are consecutive."""
    ids = table["video_id"].to_pylist()
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or ids[at] != ids[start]:
            yield ids[start], range(start, at)
            start = at


def _spread(n_clips: int, n: int) -> frozenset[int]:
    """At most n of the clips, evenly spaced, the first and the last among them."""
    return frozenset(np.linspace(0, n_clips - 1, min(n, n_clips)).round().astype(int).tolist())
