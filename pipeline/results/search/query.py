"""Queries of a search: vectors, and which seconds of a video each is from. Stored videos are queries by their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.results.search.where import Condition
from p3d.pipeline.types import FLOAT32


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Q vectors to look for, and where in the query video each is from: seconds [start, end).

    `video_id` is that of the video of OUT that the query is; None for a file from elsewhere. `warning` says how the
    vectors differ from those of the rows; None if they do not.
    """

    features_QD: FLOAT32
    seconds: tuple[tuple[float, float], ...]
    video_id: str | None = None
    warning: str | None = None


def stored(source: NewestRows | SnapshotRows, name: str, clips: bool) -> Query:
    """The vectors of a stored video, found by its video_id, uri or path: of its clips, or its pooled vector.

    InputError if it has no rows.
    """
    url, dim = source.store.url, source.job.recipe.feature_dim
    ids = source.find(name)
    if not ids:
        raise InputError(
            f"{name!r} is neither a file nor a video of {url}: give a video file, or a video_id, uri or path that "
            "videos/ has"
        )
    if len(ids) > 1:
        raise InputError(
            f"{len(ids)} videos of {url} have the path {name!r}; give the video_id of one, such as {ids[0]!r}"
        )
    if clips and not source.with_clips:
        raise InputError(f"the snapshot at {url} has no clips; search its videos, with --level video")
    features, seconds, failed = [], [], False
    for folder, table in source.rows(clips=clips, only=frozenset(ids)):
        failed |= folder == "failures" and table.num_rows > 0
        if folder == ("clips" if clips else "videos"):
            features.append(schema.features_of(table["embedding"], dim))
            starts = table["start_s"].to_pylist() if clips else [0.0] * table.num_rows
            seconds += list(zip(starts, table["end_s" if clips else "duration_s"].to_pylist(), strict=True))
    if not seconds:
        named = source.store.words()
        why = f"failed, see `p3d failures {named}`" if failed else f"is still to be done, by `p3d resume {named}`"
        raise InputError(f"{name!r} has no rows to search by: it {why}")
    return Query(np.concatenate(features), tuple(seconds), ids[0])


def hits_wanted(query: Query, where: Iterable[str], with_self: bool) -> tuple[str | Condition, ...]:
    """The conditions that a hit must meet: `where` and, without `with_self`, to be of another video than the query.

    This is the one rule of what a query leaves out; the command line, the Python API and the page all use it.
    """
    if with_self or query.video_id is None:
        return tuple(where)
    return (*where, Condition("video_id", pc.not_equal, pa.scalar(query.video_id, pa.string())))


def split_position(text: str) -> tuple[str, str | None]:
    """`VIDEO@POSITION` as (VIDEO, POSITION); (text, None) if nothing after an "@" looks like a position."""
    match = re.fullmatch(r"(.+)@([0-9.:]*[0-9][0-9.:]*s?)", text, re.S)
    return (match[1], match[2]) if match else (text, None)


def position_s(text: str) -> float:
    """A position as seconds: `12.5`, `12.5s`, `1:05` or `1:02:03.5`. InputError for anything else."""
    match = re.fullmatch(r"(?:(?:([0-9]{1,9}):)?([0-9]{1,9}):)?([0-9]{1,9}(?:\.[0-9]*)?|\.[0-9]+)s?", text)
    hours, minutes, seconds = match.groups("0") if match else ("0", "0", "60")
    small = (match and match[2] is None) or float(seconds) < 60
    if match is None or not small or (match[1] is not None and int(minutes) >= 60):
        raise InputError(f"{text!r} is not a position: write seconds, as 12.5, or 1:05, or 1:02:03.5")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def clip_at(query: Query, name: str, at_s: float) -> Query:
    """The clip that shows a second; if several do, the one whose middle is nearest to it. InputError if none does."""
    spans = query.seconds
    showing = [at for at, (start, end) in enumerate(spans) if start <= at_s < end]
    if not showing:
        start, end = min(spans, key=lambda one: max(one[0] - at_s, at_s - one[1]))
        raise InputError(f"no clip of {name!r} shows second {at_s:g}: the nearest one is from {start:g} to {end:g} s")
    at = min(showing, key=lambda one: abs(sum(spans[one]) / 2 - at_s))
    return replace(query, features_QD=query.features_QD[at : at + 1], seconds=spans[at : at + 1])
