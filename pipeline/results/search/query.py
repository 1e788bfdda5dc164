"""What is asked: vectors, and which seconds of a video each is from; of a video of the dataset, its own rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.results.search.exact import Level
from p3d.pipeline.types import FLOAT32


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Q vectors to look for, and where in the query video each is from: seconds [start, end).

    `video_id` is None for a file that was embedded; `level` is what is compared if nobody says.
    """

    features_QD: FLOAT32
    seconds: tuple[tuple[float, float], ...]
    level: Level
    video_id: str | None = None


def stored(source: NewestRows | SnapshotRows, name: str, clips: bool) -> Query:
    """A video of the dataset by its video_id, uri or path: its clips, or itself. InputError if it has no rows."""
    place, dim = source.store.url, source.job.recipe.feature_dim
    ids = source.find(name)
    if not ids:
        raise InputError(
            f"{name!r} is neither a file nor a video of {place}: give a video file, or a video_id, uri or path that "
            "videos/ has"
        )
    if len(ids) > 1:
        raise InputError(
            f"{len(ids)} videos of {place} have the path {name!r}; give one's video_id, such as {ids[0]!r}"
        )
    if clips and not source.with_clips:
        raise InputError(f"the snapshot at {place} has no clips; search its videos, with --level video")
    features, seconds, failed = [], [], False
    for folder, table in source.rows(clips=clips, only=frozenset(ids)):
        failed |= folder == "failures" and table.num_rows > 0
        if folder == ("clips" if clips else "videos"):
            features.append(schema.features_of(table["embedding"], dim))
            starts = table["start_s"].to_pylist() if clips else [0.0] * table.num_rows
            seconds += list(zip(starts, table["end_s" if clips else "duration_s"].to_pylist(), strict=True))
    if not seconds:
        why = f"failed: see `p3d failures {place}`" if failed else f"is still to be done: `p3d resume {place}` goes on"
        raise InputError(f"{name!r} has no rows to search by, for it {why}")
    return Query(np.concatenate(features), tuple(seconds), "clip" if clips else "video", ids[0])


def clip_at(query: Query, name: str, at_s: float) -> Query:
    """The clip that shows a second, of several the one with it nearest to the middle. InputError if none does."""
    spans = query.seconds
    showing = [at for at, (start, end) in enumerate(spans) if start <= at_s < end]
    if not showing:
        raise InputError(
            f"no clip of {name!r} shows second {at_s:g}: its clips are from {spans[0][0]:g} to {spans[-1][1]:g} s"
        )
    at = min(showing, key=lambda one: abs(sum(spans[one]) / 2 - at_s))
    return Query(query.features_QD[at : at + 1], spans[at : at + 1], query.level, query.video_id)
