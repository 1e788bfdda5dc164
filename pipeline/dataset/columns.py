"""Every column of the dataset, declared once: schemas, checks and the reference page are made from these tables.

A new column is one entry here, and a field of the record that its value comes from (`p3d.pipeline.types`): the value of
a column of videos/ and failures/ is the field of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its Arrow type, what it means, its unit (empty if it has none), and whether it may be null.

    `since` is the schema version that it came with. In rows of older versions it has the value `before`.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    nullable: bool = False
    since: int = 1
    before: Any = None

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable)


_ID = Column("video_id", pa.string(), "its identity: a hash of its path below the source, or from `--id-column`")
_PATH = Column("path", pa.string(), "its name for people: relative to the source; bytes that are not UTF-8 as `\\xNN`")
_URI = Column("uri", pa.string(), "`file:///...` or `s3://bucket/key`, percent-encoded")
_PLAN = Column("plan_seq", pa.int32(), "the plan that the row belongs to; of several rows of a video the newest counts")
_VERSION = Column("version", pa.string(), "the version of the file: from its size and time, or its ETag")

MANIFEST = (
    _ID,
    _PATH,
    _URI,
    _VERSION,
    Column("size_bytes", pa.int64(), "the size of the file; -1 if it did not exist", "bytes"),
    Column("mtime_ns", pa.int64(), "when it was changed; null if that is not known", "ns since 1970", nullable=True),
    Column("etag", pa.string(), "its ETag in S3", nullable=True),
    Column("shard", pa.int32(), "the shard that embeds it"),
)
CLIPS = (
    _ID,
    _PATH,
    _PLAN,
    Column("clip_index", pa.int32(), "the number of the clip in its video, from 0"),
    Column("start_frame", pa.int64(), "its first frame, counted from 0; with `--fps` of the resampled video", "frames"),
    Column("end_frame", pa.int64(), "one after its last frame", "frames"),
    Column("start_s", pa.float64(), "when its first frame is shown, from the first frame of the video", "s"),
    Column("end_s", pa.float64(), "when its last frame ends; never after `duration_s`", "s"),
    Column("n_padded", pa.int32(), "how often the last frame was repeated, in a video shorter than a clip", "frames"),
)
VIDEOS = (
    _ID,
    _PATH,
    _URI,
    _PLAN,
    _VERSION,
    Column("n_clips", pa.int32(), "how many rows of clips/ it has"),
    Column("n_frames", pa.int64(), "how many frames were found; those that an edit list discards do not count"),
    Column("duration_s", pa.float64(), "the end of the last frame, from the start of the first", "s"),
    Column("fps", pa.float64(), "the frame rate of the file", "frames/s"),
    Column("width", pa.int32(), "as shown, after the rotation", "pixels"),
    Column("height", pa.int32(), "as shown, after the rotation", "pixels"),
    Column("rotation", pa.int32(), "the turn that was applied, clockwise", "degrees"),
    Column("codec", pa.string(), "FFmpeg's name of the codec"),
    Column("stream_index", pa.int32(), "the number of the stream that was read"),
    Column("route", pa.string(), "the decoder: `pyav`, `decord` or `nvdec`"),
    Column("truncated", pa.bool_(), "true if only the frames before damage were used (`--partial keep`)"),
    Column("claimed_frames", pa.int64(), "the container's own frame count; null if it has none", nullable=True),
    Column("fps_estimated", pa.bool_(), "true if `fps` is that of the frames' times, as the file states another"),
    Column("stream_why", pa.string(), "why this stream was chosen; null if there is only one", nullable=True),
    Column("resampled_fps", pa.float64(), "the rate of `--fps`; null without it", "frames/s", nullable=True),
    Column("resampled_frames", pa.int64(), "the frames of the resampled video; null without `--fps`", nullable=True),
)
FAILURES = (
    _ID,
    _PATH,
    _URI,
    _PLAN,
    _VERSION,
    Column("reason", pa.string(), "one of the [failure reasons](failure-reasons.md)"),
    Column("detail", pa.string(), "what happened, for people"),
    Column("attempts", pa.int32(), "how many decodes were started"),
)


def embedding_type(dim: int, dtype: str) -> pa.DataType:
    """`fixed_size_list<float32 | float16 not null>[dim]`."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.list_(pa.field("element", value, nullable=False), dim)


def vector(name: str, dim: int, dtype: str) -> Column:
    """A column of vectors: `embedding`, the one of a further pooling, or `probs`."""
    if name == "probs":
        return Column(name, embedding_type(dim, "float32"), "the probability of each class (`--scores`)")
    pooling = name.removeprefix("embedding").lstrip("_")
    meaning = f"the {pooling} of its clips' vectors" if pooling else "its vector; of a video, pooled by `--pool`"
    return Column(name, embedding_type(dim, dtype), meaning)


def schema(columns: tuple[Column, ...], version: int) -> pa.Schema:
    """The Arrow schema of the columns that a table has in a schema version."""
    return pa.schema([column.field for column in columns if column.since <= version])


def with_newer(table: pa.Table, columns: tuple[Column, ...], version: int) -> pa.Table:
    """Rows of an older version with the columns that came later, at their place in `columns`.

    A user's own column of that name stays the user's.
    """
    for at, column in enumerate(columns):
        if column.since > version and column.name not in table.column_names:
            values = pa.repeat(pa.scalar(column.before, column.type), table.num_rows)
            table = table.add_column(at, column.field, values)
    return table
