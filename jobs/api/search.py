"""Find what in a dataset is most similar to a video: a query becomes vectors, then their neighbours are found.

    QUERY ── a file that exists ──────> embed with OUT's weights, recipe, batch and threads ──┐
          ── video_id, uri or path ───> the rows that OUT has of it ──────────────────────────┴─> queries_QD

Neither needs Ray. Only the first needs torch. It decodes in a child process, so a file that crashes or hangs the
decoder gives an ordinary error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from p3d.jobs.api.keywords import listed, path_of
from p3d.jobs.job import rows_of, stored_weights, weights_key
from p3d.pipeline.clips.pool import pool as pool_clips
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import clips_key
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.results.search.exact import SearchResult, nearest
from p3d.pipeline.results.search.index import nearest_by_index
from p3d.pipeline.results.search.options import Level, SearchOptions
from p3d.pipeline.results.search.query import Query, clip_at, stored
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FLOAT32

if TYPE_CHECKING:
    from p3d.encoder import Encoder

Rows = NewestRows | SnapshotRows
MOST_SETTING = 1024  # clips per batch, or threads


def search(
    out: str | Path,
    query: str | Path,
    *,
    level: Level | None = None,
    metric: str = "cosine",
    top: int = 10,
    where: str | Sequence[str] = (),
    distinct: float | None = None,
    index: bool = False,
    device: str = "auto",
    encoder: Encoder | None = None,
    s3: StoreOptions = DEFAULTS,
) -> SearchResult:
    """The rows of the dataset at `out` that are nearest to `query`, best first.

    `query` is a video file, or the video_id, uri or path of a video of `out`. "@12.5s" after it selects its clip at
    that second. Without `level`, a video is compared with videos and a clip with clips. `metric` is "cosine" (higher is
    nearer) or "l2" (distance, lower is nearer). `where` are conditions such as "duration_s>=60". With `distinct`, a hit
    is left out if its cosine to the query or to a better hit is `distinct` or more. With `index`, candidates come from
    the index of `p3d results index`, and their scores from the rows. For many files make one `encoder` with
    `p3d.jobs.api.search.encoder_of`; otherwise the weights are loaded for each. A file is embedded in fp32 if this
    machine does not compute in the precision of the rows; the result's `warning` then says so.

    Raises InputError for invalid input, BadVideo for a file without rows, NoSuchJob, DamagedJob, StoreError.
    """
    conditions = tuple(listed(where))
    given = SearchOptions(
        level=level, metric=metric, top=top, where=conditions, distinct=distinct, index=index, device=device
    )
    source = rows_of(open_store(path_of(out, "out"), s3))
    asked = resolve(source, path_of(query, "query"), level=level, device=device, encoder=encoder)
    return find(
        source, asked, level=level, metric=metric, top=given.top, where=conditions, distinct=distinct, index=index
    )


def find(
    source: Rows,
    query: Query,
    *,
    level: Level | None = None,
    metric: str = "cosine",
    top: int = 10,
    where: Sequence[str] = (),
    distinct: float | None = None,
    index: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """`search` for a query that is already resolved."""
    look = nearest_by_index if index else nearest
    chosen = level or query.level
    features_QD = query.features_QD
    found = look(
        source, features_QD, level=chosen, metric=metric, top=top, where=where, distinct=distinct, on_step=on_step
    )
    return replace(found, warning=query.warning)


def resolve(
    source: Rows, text: str, *, level: Level | None = None, device: str = "auto", encoder: Encoder | None = None
) -> Query:
    """Resolve a QUERY into vectors that will be compared with `level`. A time in `text` always selects one clip."""
    name, at_s = text, None
    if not _is_file(text) and not source.find(text) and (match := re.fullmatch(r"(.+)@([0-9.]+)s", text)):
        name, at_s = match[1], _second(text, match[2])
    wants_clips = at_s is not None or level == "clip"
    if _is_file(name):
        query = embedded(source, name, encoder or encoder_of(source, device))["clip" if wants_clips else "video"]
    else:
        query = stored(source, name, wants_clips)
    return query if at_s is None else clip_at(query, name, at_s)


def _is_file(name: str) -> bool:
    return os.path.isfile(name)  # noqa: PTH113 - `Path` raises an error for a name that is too long


def _second(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise InputError(f"{text!r} has no valid time; write it as VIDEO@12.5s") from None


def embedded(source: Rows, path: str, encoder: Encoder) -> dict[Level, Query]:
    """Embed a file as the job of the dataset does, rounded as its rows are: queries of its clips and the video.

    If the encoder's device does not compute in the precision of the rows, it has to be in fp32 (`encoder_of`), and the
    queries have a warning. Raises ValueError for an encoder of any other precision; other errors are those of `embed`.
    """
    from p3d.jobs.api.embed import embed
    from p3d.jobs.planning.prepare import recipe_of_query

    recipe = source.job.recipe
    of_query, warning = recipe_of_query(recipe, str(encoder.device)), None
    if of_query.precision != recipe.precision:
        warning = (
            f"this machine does not support {recipe.precision}, the precision of the rows, on device {encoder.device}; "
            f"the file was embedded in {of_query.precision}, so even a copy of a video does not match exactly"
        )
    found = embed(path, encoder, of_query)
    features_ND = _rounded(found.features_ND, recipe)
    pooled_D = _rounded(pool_clips(features_ND, recipe.pool)[0], recipe)
    return {
        "clip": Query(features_ND, tuple((clip.start_s, clip.end_s) for clip in found.clips), "clip", warning=warning),
        "video": Query(pooled_D[None], ((0.0, found.end.duration_s),), "video", warning=warning),
    }


def _rounded(features: FLOAT32, recipe: Recipe) -> FLOAT32:
    return features.astype(recipe.embedding_dtype).astype(np.float32)


def encoder_of(source: Rows, device: str = "auto") -> Encoder:
    """The encoder of a dataset, with the weights, batch size and threads that its rows were computed with.

    It computes in fp32 if the device does not support the precision of the rows. InputError if OUT has no weights, or
    this machine does not have the device or the decoder.
    """
    from p3d.encoder import Encoder, device_for
    from p3d.jobs.planning.prepare import recipe_of_query, run_options

    recipe, store = source.job.recipe, source.store
    key = weights_key(recipe)
    if store.head(key) is None:
        raise InputError(
            f"{store.url} has no weights to embed a file with; restore {key}, or search by one of its videos"
        )
    precision = recipe_of_query(recipe, device).precision
    weights = stored_weights(store, recipe)
    kind = device_for(device).type
    last = _settings_of(source, kind)
    options = run_options({}, workers=1, device=device, batch_size=last.get("batch_size"), threads=last.get("threads"))
    return Encoder(
        weights,
        device=options.device,
        batch_size=options.batch_size,
        threads=options.threads if kind == "cpu" else None,
        precision=precision,
    )


def _settings_of(source: Rows, kind: str) -> dict[str, int]:
    """Batch size and threads from the footer of the first committed shard, if it ran on this kind of device.

    The files of a snapshot do not store them. A value that no job has is ignored: OUT may be somebody else's.
    """
    if isinstance(source, SnapshotRows) or not source.pieces:
        return {}
    with source.store.open(clips_key(source.pieces[0])) as content, schema.open_parquet(content) as file:
        text = schema.read_footer(file).get(schema.STATS_KEY, "{}")
    try:
        stats = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(stats, dict) or str(stats.get("device", "")).partition(":")[0] != kind:
        return {}
    found = {name: stats.get(name) for name in ("batch_size", "threads")}
    return {name: value for name, value in found.items() if type(value) is int and 1 <= value <= MOST_SETTING}
