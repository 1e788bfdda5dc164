"""The Arrow schemas of the dataset, and its data files. The columns are declared in `dataset.columns`.

    clips/     one row per clip:  where it is in the video, and its embedding [and class probabilities]
    videos/    one row per video: what the video is, and its pooled embedding(s) [and probabilities] + the user's own
               columns
    failures/  one row per video that has no rows: the reason, and a detail message

`embedding` is `fixed_size_list<float32 not null>[D]` (or float16), which DuckDB, Polars, pandas, LanceDB and FAISS read
directly. `probs`, only with `--scores`, is `fixed_size_list<float32 not null>[K]`. The footer of a clips file holds
what its rows cannot: `p3d.outcomes`, one JSON record per video of the shard, and `p3d.stats`. Legend: R clip rows, V
videos, D feature dimension, K classes. `n_scores` is K if scores are stored, else 0 (`Recipe.n_scores`).
An output has the columns and the fields of `p3d.outcomes` that its schema version has (`p3d.pipeline.types.versions`).
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p3d.pipeline.clips.pool import POOLS, pool_columns
from p3d.pipeline.dataset import columns, outcomes
from p3d.pipeline.dataset.columns import Column
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.local import is_utf8
from p3d.pipeline.storage.store import DATA_BYTES
from p3d.pipeline.types import BOOL, FLOAT32, ShardPlan, ShardRows, VideoOutcome
from p3d.pipeline.types.versions import SCHEMA_VERSION, in_version

OUTCOMES_KEY = "p3d.outcomes"
STATS_KEY = "p3d.stats"
SHARD_KEY = "p3d.shard"  # {"plan_seq", "plan8", "shard"} of every data file
SOURCE_KEY = "p3d.clips"  # of a derived file: {"sha256", "size_bytes"} of the clips object it was made from
ROW_GROUP_ROWS = 4096
MAX_OBJECT_BYTES = DATA_BYTES
SUM_ERROR = 1e-3  # largest deviation from 1 of the sum of a row of probabilities
# every float16 as float32, indexed by its bits: looking a row up here takes a third of the time of numpy's conversion
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)

MANIFEST = columns.schema(columns.MANIFEST, SCHEMA_VERSION)  # of a new output


@cache
def own_columns(version: int) -> frozenset[str]:
    """The names that a user's own column cannot have in an output of a schema version."""
    tables = (columns.MANIFEST, columns.FAILURES, columns.VIDEOS)
    ours = [column.name for table in tables for column in table if column.since <= version]
    return frozenset([*ours, *(name for how in POOLS for name in pool_columns(how)), "probs"])


def clips_columns(recipe: Recipe) -> tuple[Column, ...]:
    """Columns of clips/: times in seconds and frames [start, end) as in `ClipSpan`.

    Frames are the video's own, counted from 0. If videos/ has a `resampled_fps`, frame k is the one on screen at
    k / resampled_fps seconds. Seconds are always those of the video itself, and never exceed `duration_s`.
    """
    return (*columns.CLIPS, *_vectors(recipe, ["embedding"]))


def videos_columns(recipe: Recipe) -> tuple[Column, ...]:
    """Columns of videos/, without the user's own. Each pooling of `--pool` has a column of its own."""
    return (*columns.VIDEOS, *_vectors(recipe, pool_columns(recipe.pool)))


def _vectors(recipe: Recipe, names: list[str]) -> list[Column]:
    vectors = [columns.vector(name, recipe.feature_dim, recipe.embedding_dtype) for name in names]
    return [*vectors, *([columns.vector("probs", recipe.n_scores, "float32")] if recipe.n_scores else [])]


@cache
def clips_schema(recipe: Recipe) -> pa.Schema:
    """The Arrow schema of `clips_columns`, in the version of the recipe."""
    return columns.schema(clips_columns(recipe), recipe.schema_version)


@cache
def videos_schema(recipe: Recipe) -> pa.Schema:
    """The Arrow schema of `videos_columns`, in the version of the recipe."""
    return columns.schema(videos_columns(recipe), recipe.schema_version)


def failures_schema(version: int) -> pa.Schema:
    """The Arrow schema of failures/ in a schema version."""
    return columns.schema(columns.FAILURES, version)


@cache
def schemas_of(recipe: Recipe, own: tuple[pa.Field, ...] = ()) -> dict[str, pa.Schema]:
    """The Arrow schema of the files in each folder, in the version of the recipe; `own` are the user's columns."""
    videos, failures = pa.schema([*videos_schema(recipe), *own]), failures_schema(recipe.schema_version)
    return {"clips": clips_schema(recipe), "videos": videos, "failures": failures}


def check_columns(folder: str, held: pa.Schema, recipe: Recipe) -> None:
    """ValueError unless a file of a folder has the columns of this recipe; in videos/, the user's own may follow."""
    ours = schemas_of(recipe)[folder]
    n_ours = len(ours) if folder == "videos" else len(held)
    if not pa.schema(list(held)[:n_ours]).equals(ours) or len(set(held.names)) != len(held):
        raise ValueError("it has other columns than p3d writes")


def with_newer_columns(folder: str, table: pa.Table, recipe: Recipe) -> pa.Table:
    """Rows of a folder, as an output of `recipe` has them, with the columns that came in later schema versions."""
    if recipe.schema_version == SCHEMA_VERSION:
        return table
    every = {"clips": clips_columns(recipe), "videos": videos_columns(recipe), "failures": columns.FAILURES}
    return columns.with_newer(table, every[folder], recipe.schema_version)


def newest_schemas(stored: dict[str, pa.Schema], recipe: Recipe) -> dict[str, pa.Schema]:
    """The schemas, by folder, of rows as `with_newer_columns` returns them."""
    return {name: with_newer_columns(name, one.empty_table(), recipe).schema for name, one in stored.items()}


def vector_array(vectors_NW: FLOAT32, kind: pa.DataType) -> pa.Array:
    """[N, W] float32 -> an Arrow array of the vector column type `kind`, rounded to its dtype."""
    # not to_pandas_dtype, which needs pandas before pyarrow 26
    dtype = np.float16 if pa.types.is_float16(kind.value_type) else np.float32
    values = np.ascontiguousarray(vectors_NW, dtype).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)


def probs_of(table: pa.Table, n_scores: int) -> FLOAT32:
    """The class probabilities of rows, [N, K] float32; K is 0 if no scores are stored."""
    return features_of(table["probs"], n_scores) if n_scores else np.empty((table.num_rows, 0), np.float32)


def sound_probs(probs_NK: FLOAT32) -> BOOL:
    """Which rows are distributions, [N]: finite, in [0, 1], with a sum of 1 within SUM_ERROR. All True if K is 0."""
    if not probs_NK.shape[1]:
        return np.ones(len(probs_NK), np.bool_)
    inside_N = ((probs_NK >= 0) & (probs_NK <= 1)).all(axis=1)  # comparisons with NaN are False
    sound_N: BOOL = inside_N & (np.abs(probs_NK.sum(axis=1, dtype=np.float64) - 1) <= SUM_ERROR)
    return sound_N


def features_of(column: pa.ChunkedArray | pa.Array, dim: int) -> FLOAT32:
    """Arrow column of vectors -> [N, D] float32; zero copy for one float32 chunk."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = array.flatten().to_numpy(zero_copy_only=False)
    if values.dtype == np.float16:
        values = _HALVES[values.view(np.uint16)]
    return np.asarray(values, np.float32).reshape(-1, dim)


def clips_table(rows: ShardRows, recipe: Recipe) -> pa.Table:
    """The rows of a shard's clips file."""
    schema = clips_schema(recipe)
    spans = [clip.span for clip in rows.clips]
    columns: list[Any] = [
        [clip.video_id for clip in rows.clips],
        [clip.path for clip in rows.clips],
        [rows.shard.plan_seq] * len(spans),
        [span.index for span in spans],
        [span.start_frame for span in spans],
        [span.end_frame for span in spans],
        [clip.start_s for clip in rows.clips],
        [clip.end_s for clip in rows.clips],
        [span.n_padded for span in spans],
        vector_array(rows.features_RD, schema.field("embedding").type),
    ]
    if recipe.n_scores:
        columns.append(vector_array(rows.probs_RK, schema.field("probs").type))
    return pa.table(
        [pa.array(c, f.type) if isinstance(c, list) else c for c, f in zip(columns, schema, strict=True)], schema
    )


def check_rows(rows: ShardRows, dim: int, clip_frames: int, n_scores: int) -> None:
    """Check invariants I1, I2 and I6 of a shard before anything is written. Raises ValueError, which names the video.

    Every video of the shard has one outcome, in order. Clip rows are grouped by video in the same order, with indices
    0 .. n - 1. Every feature vector is finite and not all zero. Every row of scores is a distribution. A clip ends
    after it starts, and no clip starts before the previous one of its video.
    """
    if [o.video for o in rows.outcomes] != list(rows.shard.videos):
        raise ValueError(f"shard {rows.shard.name}: outcomes are not those of its {len(rows.shard.videos)} videos")
    if rows.features_RD.shape != (len(rows.clips), dim) or rows.features_RD.dtype != np.float32:
        raise ValueError(
            f"features are {rows.features_RD.shape} {rows.features_RD.dtype}, not {len(rows.clips)} x {dim}"
        )
    if rows.probs_RK.shape != (len(rows.clips), n_scores) or rows.probs_RK.dtype != np.float32:
        raise ValueError(f"scores are {rows.probs_RK.shape} {rows.probs_RK.dtype}, not {len(rows.clips)} x {n_scores}")
    expected = [(o.video.video_id, at) for o in rows.outcomes for at in range(o.n_clips)]
    if [(clip.video_id, clip.span.index) for clip in rows.clips] != expected:
        raise ValueError(f"shard {rows.shard.name}: clip rows do not follow its outcomes")
    good_R = np.isfinite(rows.features_RD).all(1) & (rows.features_RD != 0).any(1)
    for clip, good, sound in zip(rows.clips, good_R, sound_probs(rows.probs_RK), strict=True):
        span = clip.span
        if not sound:
            raise ValueError(f"{clip.video_id} clip {span.index}: its class probabilities are not a distribution")
        if not good or not (0 <= span.start_frame < span.end_frame and 0 <= clip.start_s < clip.end_s):
            raise ValueError(f"{clip.video_id} clip {span.index}: {good = }, {span}, [{clip.start_s}, {clip.end_s}) s")
        if not 0 <= span.n_padded < clip_frames:
            raise ValueError(f"{clip.video_id} clip {span.index}: {span.n_padded = } of {clip_frames} frames")
    for before, after in zip(rows.clips, rows.clips[1:], strict=False):
        if before.video_id == after.video_id and before.span.start_frame > after.span.start_frame:
            raise ValueError(f"{after.video_id} clip {after.span.index} starts before the one before it")


def shard_record(shard: ShardPlan) -> dict[str, Any]:
    """The footer record that says of which shard a data file is."""
    return {"plan_seq": shard.plan_seq, "plan8": shard.plan8, "shard": shard.shard}


def outcomes_json(each: tuple[VideoOutcome, ...], version: int) -> str:
    """The footer record of a shard: one typed record per video, in manifest order, in a schema version."""
    return json.dumps([in_version(outcome, version) for outcome in each], separators=(",", ":"))


def parse_outcomes(text: str | bytes, version: int) -> tuple[VideoOutcome, ...]:
    """The inverse of `outcomes_json`. One of MALFORMED if the text is not such a record."""
    return outcomes.parse(text, version).each


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer for a data file: zstd level 1, byte stream split for embeddings, page checksums.

    Without page checksums, 272 of 300 single-bit flips were read back without an error; with them none. Float16 is
    written plain, because DuckDB (2.0) does not read its byte stream split. The user's own columns never use
    dictionary encoding: a dictionary could hold values of rows that were left out.
    """
    lists = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
    vectors = [field.name for field in lists if pa.types.is_float32(field.type.value_type)]
    floats = [name for name in schema.names if name in ("start_s", "end_s", "duration_s", "fps", "resampled_fps")]
    keys = [name for name in ("video_id", "path", "codec", "route", "reason") if name in schema.names]
    where = _for_arrow(path, "w")
    writer = pq.ParquetWriter(
        where,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=keys,
        column_encoding={
            **{f"{v}.list.element": "BYTE_STREAM_SPLIT" for v in vectors},
            **dict.fromkeys(floats, "PLAIN"),
        },
        write_page_checksum=True,
    )
    if where is not path:
        writer.file_handle = where  # which it closes at its end
    return writer


def _for_arrow(path: Path, mode: str) -> Any:
    """What Arrow opens: the path, or the open file if a folder on the way has a name that is not UTF-8."""
    return path if is_utf8(path) else pa.OSFile(os.fsencode(path), mode)


def write_parquet(path: Path, table: pa.Table, footer: dict[str, str]) -> None:
    """One data file of a shard, with its footer keys."""
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata(footer)


class Footer(dict[str, str]):
    """The footer entries whose keys start with `p3d.`, decoded. ValueError, which names it, for one that is missing."""

    def __missing__(self, key: str) -> str:
        raise ValueError(f"its footer has no {key}: another program wrote it")


def read_footer(file: pq.ParquetFile) -> Footer:
    """The entries of p3d in the footer of a data file."""
    metadata = file.metadata.metadata or {}
    return Footer({key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"p3d.")})


def open_parquet(source: Any, *, buffer_bytes: int = 0) -> pq.ParquetFile:
    """A data file whose pages are checked against their checksums as they are read. Read it with `use_threads=False`.

    With `buffer_bytes`, a column of a large row group is read in pieces of that size and not whole.

    Arrow's threads may hold the Python object they read from a little longer than the read takes. If the interpreter
    exits at that moment, the process aborts (2 of 60 exits after `pq.read_table`).
    """
    if isinstance(source, Path):
        source = _for_arrow(source, "r")
    return pq.ParquetFile(
        source, page_checksum_verification=True, memory_map=False, pre_buffer=False, buffer_size=buffer_bytes
    )


def read_parquet(source: Any, columns: list[str] | None = None) -> pa.Table:
    """All rows of a data file, or of some of its columns."""
    with open_parquet(source) as file:
        return file.read(columns=columns, use_threads=False)


def records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table as Python values. A value that Python cannot hold is text, such as a time in nanoseconds."""
    columns = {name: _values(table[name]) for name in table.column_names}
    return [{name: values[at] for name, values in columns.items()} for at in range(table.num_rows)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        if not any(map(_is_of_pandas, values)):
            return values
    except (ValueError, OverflowError):
        pass
    return [_value(column.slice(at, 1).combine_chunks()) for at in range(len(column))]


def _value(one: pa.Array) -> Any:
    """The value of an array of length 1."""
    try:
        value = one[0].as_py()
        if not _is_of_pandas(value):
            return value
        if getattr(value, "nanosecond", None) == 0:
            return value.to_pydatetime()
        if getattr(value, "nanoseconds", None) == 0:
            return value.to_pytimedelta()
    except (ValueError, OverflowError):
        pass
    return " ".join(one.to_string().split())[1:-1].strip()


def _is_of_pandas(value: Any) -> bool:
    """Is this a pandas value? Where pandas is installed, Arrow makes one of a time in nanoseconds."""
    return type(value).__module__.partition(".")[0] == "pandas"
