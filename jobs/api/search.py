"""Find what in a dataset is most similar to a video: a query becomes vectors, then their neighbours are found.

    QUERY ── a file that exists ──────> embed with OUT's weights, recipe, batch and threads ──┐
          ── video_id, uri or path ───> the rows that OUT has of it ──────────────────────────┴─> queries_QD

Neither needs Ray. Only the first needs torch. It decodes in a child process, so a file that crashes or hangs the
decoder gives an ordinary error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from p3d.jobs.api.dataset import several_rows
from p3d.jobs.api.keywords import listed, path_of
from p3d.jobs.job import stored_weights, weights_key
from p3d.pipeline.clips.pool import pool as pool_clips
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import clips_key
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.results.search.exact import POOL, SearchResult, merge, nearest
from p3d.pipeline.results.search.index import nearest_by_index
from p3d.pipeline.results.search.options import Level, SearchOptions
from p3d.pipeline.results.search.query import Query, clip_at, hits_wanted, position_s, split_position, stored
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.types import FLOAT32

if TYPE_CHECKING:
    from p3d.encoder import Encoder

Rows = NewestRows | SnapshotRows
MOST_SETTING = 1024  # clips per batch, or threads


def search(
    out: str | Path | Sequence[str | Path],
    query: str | Path,
    *,
    level: Level = "clip",
    metric: str = "cosine",
    top: int = 10,
    per_video: bool = True,
    with_self: bool = False,
    where: str | Sequence[str] = (),
    distinct: float | None = None,
    index: bool = False,
    device: str = "auto",
    encoder: Encoder | None = None,
    s3: StoreOptions = DEFAULTS,
) -> SearchResult:
    """The rows of the dataset at `out` that are nearest to `query`, best first.

    `out` may be several outputs of one recipe, or a folder of them: then each hit says which one has it.
    `query` is a video file, or the video_id, uri or path of a video of `out`. A position after it, as "@12.5", "@1:05"
    or "@1:02:03.5", selects the clip that shows that second. `level` is "clip" or "video". Of clips, only the best one
    of each video is a hit, unless `per_video` is False. If the query is a video of `out`, also if it is given as the
    file that `out` has a row of, its own rows are left out unless `with_self`. `metric` is "cosine" (higher is nearer)
    or "l2" (distance, lower is nearer). Equal scores are in the order of paths. `where` are conditions such as
    "duration_s>=60". With `distinct`, a hit is left out if its cosine to the query or to a better hit is `distinct` or
    more. With `index`, candidates come from the index of `p3d results index`, and their scores from the rows. For many
    files make one `encoder` with `p3d.jobs.api.search.encoder_of`; otherwise the weights are loaded for each. A file is
    embedded in fp32 if this machine does not compute in the precision of the rows; the result's `warning` then says so.

    Raises InputError for invalid input, BadVideo for a file without rows, NoSuchJob, OtherRecipe, DamagedJob,
    StoreError.
    """
    options = SearchOptions(
        level=level,
        metric=metric,
        top=top,
        per_video=per_video,
        with_self=with_self,
        where=tuple(listed(where)),
        distinct=distinct,
        index=index,
        device=device,
    )
    sources = several_rows(out, s3)
    asked = resolve_in_all(sources, path_of(query, "query"), level=level, device=device, encoder=encoder)
    return find_in_all(sources, asked, options)


def find(
    source: Rows,
    query: Query,
    options: SearchOptions,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """`search` for a query that is already resolved."""
    found = (nearest_by_index if options.index else nearest)(
        source,
        query.features_QD,
        level=options.level,
        metric=options.metric,
        top=options.top,
        where=hits_wanted(query, options.where, options.with_self),
        distinct=options.distinct,
        per_video=options.per_video,
        on_step=on_step,
    )
    return replace(found, warning=query.warning)


def find_in_all(
    sources: Sequence[Rows],
    queries: Sequence[Query],
    options: SearchOptions,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """`find` in one or several outputs of one recipe. The hits are those of one output with all rows."""
    if len(sources) == 1:
        return find(sources[0], queries[0], options, on_step=on_step)
    wide = options if options.distinct is None else replace(options, distinct=None, top=max(options.top, POOL))
    found = [
        (source.store.url, find(source, query, wide, on_step=on_step))
        for source, query in zip(sources, queries, strict=True)
    ]
    features_QD = queries[0].features_QD
    return merge(found, features_QD, metric=options.metric, top=options.top, distinct=options.distinct)


def resolve_in_all(
    sources: Sequence[Rows], text: str, *, level: Level = "clip", device: str = "auto", encoder: Encoder | None = None
) -> list[Query]:
    """`resolve`, for each source: the same vectors, with the video_id that the query has there.

    InputError if several sources have a stored video of this name: ids are unique in one output only.
    """
    if len(sources) == 1:
        return [resolve(sources[0], text, level=level, device=device, encoder=encoder)]
    name, holders = text, [one for one in sources if one.find(text)]
    if not holders and not _is_file(text):
        name = split_position(text)[0]
        holders = [one for one in sources if one.find(name)]
    if _is_file(name):
        first = next((one for one in sources if one.store.head(weights_key(one.job.recipe)) is not None), sources[0])
        query = resolve(first, text, level=level, device=device, encoder=encoder)
        return [replace(query, video_id=_id_of_file(one, name)) for one in sources]
    if len(holders) > 1:
        raise InputError(
            f"{name!r} is a video of {' and of '.join(one.store.url for one in holders)}: give the uri of one, or its "
            "file"
        )
    if not holders:
        raise InputError(
            f"{name!r} is neither a file nor a video of {', '.join(one.store.url for one in sources)}: give a video "
            "file, or a video_id, uri or path that videos/ has"
        )
    query = resolve(holders[0], text, level=level, device=device)
    return [query if one is holders[0] else replace(query, video_id=None) for one in sources]


def resolve(
    source: Rows, text: str, *, level: Level = "clip", device: str = "auto", encoder: Encoder | None = None
) -> Query:
    """Resolve a QUERY into vectors that will be compared with `level`. A position in `text` always selects one clip."""
    name, position = text, None
    if not _is_file(text) and not source.find(text):
        name, position = split_position(text)
    at_s = None if position is None else position_s(position)
    wants_clips = at_s is not None or level == "clip"
    if _is_file(name):
        query = embedded(source, name, encoder or encoder_of(source, device))["clip" if wants_clips else "video"]
        query = replace(query, video_id=_id_of_file(source, name))
    else:
        query = stored(source, name, wants_clips)
    return query if at_s is None else clip_at(query, name, at_s)


def _id_of_file(source: Rows, path: str) -> str | None:
    """The id of the video of OUT that was embedded from this very file; None without one, or with several."""
    for absolute in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):  # noqa: PTH100 - as listings do
        ids = source.find(local_row(Path("/"), os.fsencode(absolute)).uri)
        if len(ids) == 1:
            return ids[0]
    return None


def _is_file(name: str) -> bool:
    return os.path.isfile(name)  # noqa: PTH113 - `Path` raises an error for a name that is too long


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
        "clip": Query(features_ND, tuple((clip.start_s, clip.end_s) for clip in found.clips), warning=warning),
        "video": Query(pooled_D[None], ((0.0, found.end.duration_s),), warning=warning),
    }


def _rounded(features: FLOAT32, recipe: Recipe) -> FLOAT32:
    return features.astype(recipe.embedding_dtype).astype(np.float32)


def encoder_of(source: Rows, device: str = "auto") -> Encoder:
    """The encoder of a dataset, with the weights, batch size and threads that its rows were computed with.

    It computes in fp32 if the device does not support the precision of the rows. InputError if OUT has no weights, or
    this machine does not have the device or the decoder.
    """
    from p3d.device import device_for
    from p3d.encoder import Encoder
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
