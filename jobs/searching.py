"""What in a dataset is like a video: the query becomes vectors, and `pipeline.results` finds their neighbours.

    QUERY ── a file that exists ──────> embed with OUT's weights, recipe, batch and threads ──┐
          ── video_id, uri or path ───> the rows that OUT has of it ──────────────────────────┴─> queries_QD ──> Found

Neither needs Ray. Only the first needs torch, and it decodes in a process of its own: a file that crashes or hangs its
decoder is an error in a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.job import rows_of, stored_weights, weights_key
from pipeline import schema
from pipeline.commit import clips_key
from pipeline.config import Recipe
from pipeline.errors import InputError
from pipeline.pool import pool as pool_clips
from pipeline.results.index import nearest_by_index
from pipeline.results.newest import NewestRows
from pipeline.results.search import Found, Level, Metric, nearest
from pipeline.results.snapshot import SnapshotRows
from pipeline.store import DEFAULTS, StoreOptions, open_store
from pipeline.types import FLOAT32

if TYPE_CHECKING:
    from p3d.encoder import Encoder

Rows = NewestRows | SnapshotRows


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Q vectors to look for, and where in the query video each is from: seconds [start, end).

    `video_id` is None for a file that was embedded; `level` is what is compared if nobody says.
    """

    features_QD: FLOAT32
    seconds: tuple[tuple[float, float], ...]
    level: Level
    video_id: str | None = None


def search(
    out: str | Path,
    query: str | Path,
    *,
    level: Level | None = None,
    metric: Metric = "cosine",
    top: int = 10,
    where: Sequence[str] = (),
    distinct: float | None = None,
    index: bool = False,
    device: str = "auto",
    encoder: Encoder | None = None,
    s3: StoreOptions = DEFAULTS,
) -> Found:
    """The rows of the dataset at `out` that are nearest to `query`, best first.

    `query` is a video file, or the video_id, uri or path of a video of `out`; "@12.5s" after it means its clip at that
    second. Without `level`, a video is compared with videos and a clip with clips. `metric` is "cosine" (higher is
    nearer) or "l2" (distance). `where` are conditions such as "duration_s>=60"; of rows whose cosine is `distinct` or
    more only the best is a hit, and none that is so near to the query. With `index`, candidates come
    from what `p3d results index` made, and their scores from the rows. For many files make one `encoder` with
    `jobs.searching.encoder_of`, or the weights are loaded for each.

    Raises InputError for what cannot be (BadVideo for a file without rows), NoSuchJob, DamagedJob, StoreError.
    """
    source = rows_of(open_store(str(out), s3))
    asked = resolve(source, str(query), level=level, device=device, encoder=encoder)
    return find(source, asked, level=level, metric=metric, top=top, where=where, distinct=distinct, index=index)


def find(
    source: Rows,
    query: Query,
    *,
    level: Level | None = None,
    metric: Metric = "cosine",
    top: int = 10,
    where: Sequence[str] = (),
    distinct: float | None = None,
    index: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Found:
    """`search` for a query that is resolved already."""
    look = nearest_by_index if index else nearest
    chosen = level or query.level
    features_QD = query.features_QD
    return look(
        source, features_QD, level=chosen, metric=metric, top=top, where=where, distinct=distinct, on_step=on_step
    )


def resolve(
    source: Rows, text: str, *, level: Level | None = None, device: str = "auto", encoder: Encoder | None = None
) -> Query:
    """What a QUERY means. `level` is what it will be compared with; a second in it means one clip all the same."""
    name, at_s = text, None
    if not Path(text).is_file() and not source.find(text) and (match := re.fullmatch(r"(.+)@([0-9.]+)s", text)):
        name, at_s = match[1], _second(text, match[2])
    wants_clips = at_s is not None or level == "clip"
    if Path(name).is_file():
        query = _embedded(source, name, wants_clips, encoder or encoder_of(source, device))
    else:
        query = _stored(source, name, wants_clips)
    return query if at_s is None else _clip_at(query, name, at_s)


def _second(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise InputError(f"{text!r} ends in no time; write it as VIDEO@12.5s") from None


def _stored(source: Rows, name: str, clips: bool) -> Query:
    """A video of the dataset, by its rows."""
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


def _embedded(source: Rows, path: str, clips: bool, encoder: Encoder) -> Query:
    """A file, embedded as the job of the dataset does it, and rounded as its rows are."""
    from jobs.embedding import embed

    recipe = source.job.recipe
    found = embed(path, encoder, recipe)
    features_ND = _rounded(found.features_ND, recipe)
    spans = tuple((clip.start_s, clip.end_s) for clip in found.clips)
    if clips:
        return Query(features_ND, spans, "clip")
    pooled_D = _rounded(pool_clips(features_ND, recipe.pool)[0], recipe)
    return Query(pooled_D[None], ((0.0, found.end.duration_s),), "video")


def _rounded(features: FLOAT32, recipe: Recipe) -> FLOAT32:
    return features.astype(recipe.embedding_dtype).astype(np.float32)


def _clip_at(query: Query, name: str, at_s: float) -> Query:
    """The clip that shows a second, of several the one with it nearest to the middle."""
    spans = query.seconds
    showing = [at for at, (start, end) in enumerate(spans) if start <= at_s < end]
    if not showing:
        raise InputError(
            f"no clip of {name!r} shows second {at_s:g}: its clips are from {spans[0][0]:g} to {spans[-1][1]:g} s"
        )
    at = min(showing, key=lambda one: abs(sum(spans[one]) / 2 - at_s))
    return Query(query.features_QD[at : at + 1], spans[at : at + 1], query.level, query.video_id)


def encoder_of(source: Rows, device: str = "auto") -> Encoder:
    """The network of a dataset with its own weights, and the batch and threads that its rows were computed with.

    InputError where OUT has no weights, or this machine cannot compute as the recipe says.
    """
    from jobs.planning import refuse_unfit_device, run_options
    from p3d.encoder import Encoder, device_for

    recipe, store = source.job.recipe, source.store
    key = weights_key(recipe)
    if store.head(key) is None:
        raise InputError(f"{store.url} has no weights to embed a file with; restore {key}, or search by a video of it")
    refuse_unfit_device(recipe, device)
    weights = stored_weights(store, recipe)
    kind = device_for(device).type
    last = _settings_of(source, kind)
    options = run_options({}, workers=1, device=device, batch_size=last.get("batch_size"), threads=last.get("threads"))
    return Encoder(
        weights,
        device=options.device,
        batch_size=options.batch_size,
        threads=options.threads if kind == "cpu" else None,
        precision=recipe.precision,
    )


def _settings_of(source: Rows, kind: str) -> dict[str, int]:
    """Batch and threads of the first shard that is done, as its footer says, if it ran on this kind of device.

    A snapshot's files say nothing of either.
    """
    if isinstance(source, SnapshotRows) or not source.pieces:
        return {}
    with source.store.open(clips_key(source.pieces[0])) as content, schema.open_parquet(content) as file:
        stats = json.loads(schema.read_footer(file).get(schema.STATS_KEY, "{}"))
    if str(stats.get("device", "")).partition(":")[0] != kind:
        return {}
    return {name: stats[name] for name in ("batch_size", "threads") if name in stats}
