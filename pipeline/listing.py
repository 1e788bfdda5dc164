"""Sources -> rows: which videos a folder, a prefix, a file or a list holds, and how to prove each is still the same.

`video_id` names the source: the path below its root, so that moving an archive changes nothing. `version` names its
content: size + etag, or size + mtime_ns. Rows keep the order of the sorted walk or of the list.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.schema import MANIFEST, OWN_COLUMNS
from pipeline.store import ObjectInfo, Store, StoreOptions, open_store, s3_uri, split_s3_uri
from pipeline.types import VideoRef

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .qt .mkv .webm .avi .divx .mpg .mpeg .mpe .m1v .m2v .vob .ts .mts .m2ts .wmv .asf .flv .f4v .3gp "
    ".3g2 .ogv .ogm .gif .mxf .y4m .h264 .264 .avc .h265 .265 .hevc .ivf .dv .mjpg .mjpeg .nut .rm .rmvb".split()
)
LIST_EXTENSIONS = (".txt", ".csv", ".parquet")
LIST_COLUMNS = ("uri", "url", "path", "video", "file", "filename")
HEAD_THREADS = 32  # of HEAD requests for a list of S3 keys


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds: `videos` has the MANIFEST columns but `shard`, and the user's; `skipped` are other files."""

    videos: pa.Table
    skipped: tuple[str, ...]


def find(source: str, options: StoreOptions, *, id_column: str | None = None) -> Found:
    """The videos of a folder, an `s3://` prefix, one file, or a text, CSV or Parquet list (local or on S3).

    A text list has one path a line. A CSV or Parquet list has them in a column named uri, path, video or file; its
    other columns are kept. Relative paths are relative to the list. InputError with a remedy if nothing fits.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://[^/]*@|.*[?&]X-Amz-Signature", source, re.IGNORECASE):
        raise InputError("the source holds a credential; use a plain path or s3:// and let botocore find credentials")
    is_list = source.lower().endswith(LIST_EXTENSIONS)
    if id_column is not None and not source.lower().endswith((".csv", ".parquet")):
        raise InputError(f"--id-column {id_column} needs a CSV or Parquet list, and {source} is neither")
    if source.startswith("s3://"):
        found = (
            _from_list(source, _read_s3(source, options), options, id_column) if is_list else _walk_s3(source, options)
        )
    elif "://" in source and not source.startswith("file://"):
        raise InputError(f"{source}: only local paths and s3:// are supported")
    else:
        path = Path(os.path.abspath(source.removeprefix("file://")))  # noqa: PTH100 - resolve() would follow links
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if is_list and path.is_file():
            found = _from_list(str(path), path.read_bytes(), options, id_column)
        else:
            found = _walk_folder(path) if path.is_dir() else _table([_local_row(path.parent, os.fsencode(path.name))])
    if not found.videos.num_rows:
        raise InputError(
            f"no videos in {source} ({len(found.skipped)} other files); known extensions are "
            f"{' '.join(sorted(VIDEO_EXTENSIONS)[:8])} ..., anything else goes through a .txt, .csv or .parquet list"
        )
    _refuse_duplicates(found.videos)
    return found


def video_id(relative: bytes, label: str = "") -> str:
    """32 hex digits that name a video by its path below the source's root."""
    return hashlib.sha256(label.encode() + b"\0" + relative).hexdigest()[:32]


def content_version(size_bytes: int, mark: str | int | None) -> str:
    """16 hex digits that name a content: its size, and its etag or mtime_ns."""
    return hashlib.sha256(f"{size_bytes}:{mark}".encode()).hexdigest()[:16]


def local_path(uri: str) -> bytes:
    """`file:///...` -> the path's own bytes."""
    return unquote_to_bytes(uri.removeprefix("file://"))


def stat_version(status: os.stat_result) -> str:
    """The version of a local file as it is now."""
    return content_version(status.st_size, status.st_mtime_ns)


def _text(raw: bytes) -> str:
    """Bytes of a name as text for people; what is not UTF-8 is shown as \\xNN."""
    return raw.decode("utf-8", "backslashreplace")


def _local_row(root: Path, relative: bytes) -> VideoRef:
    raw = os.path.join(os.fsencode(root), relative)  # noqa: PTH118 - bytes, which Path does not take
    name, uri = relative, "file://" + quote_from_bytes(os.path.normpath(raw))
    try:
        status = os.lstat(raw)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(raw)  # noqa: PTH116 - bytes
    except OSError:
        return VideoRef(video_id(name), _text(name), uri, content_version(-1, None), -1)
    return VideoRef(video_id(name), _text(name), uri, stat_version(status), status.st_size, mtime_ns=status.st_mtime_ns)


def _walk_folder(root: Path) -> Found:
    rows: list[VideoRef] = []
    skipped: list[str] = []
    base = os.fsencode(root)
    for directory, folders, names in os.walk(base):
        folders.sort()
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(directory, name), base)  # noqa: PTH118 - bytes
            if _is_video(name):
                rows.append(_local_row(root, relative))
            else:
                skipped.append(_text(relative))
    rows.sort(key=lambda row: row.uri)
    return _table(rows, skipped)


def _is_video(name: bytes | str) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - bytes or text
    return (suffix.decode("ascii", "replace") if isinstance(suffix, bytes) else suffix) in VIDEO_EXTENSIONS


def _s3_row(bucket: str, key: str, name: str, info: ObjectInfo | None) -> VideoRef:
    uri, known = s3_uri(bucket, key), info is not None
    size, etag = (info.size_bytes, info.etag) if info else (-1, None)
    mtime_ns = info.mtime_ns if info and known else None
    return VideoRef(
        video_id(name.encode()), _text(name.encode()), uri, content_version(size, etag), size, mtime_ns, etag
    )


def _walk_s3(source: str, options: StoreOptions) -> Found:
    bucket, prefix = split_s3_uri(source)
    store = open_store(f"s3://{bucket}", options)
    rows: list[VideoRef] = []
    skipped: list[str] = []
    root = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    listed = list(store.list(root))
    if not listed and prefix and (info := store.head(prefix)) is not None:  # one object
        return _table([_s3_row(bucket, prefix, prefix.rpartition("/")[2], info)])
    for info in listed:
        name = info.key.removeprefix(root)
        if _is_video(name):
            rows.append(_s3_row(bucket, info.key, name, info))
        elif not name.endswith("/"):
            skipped.append(name)
    rows.sort(key=lambda row: row.uri)
    return _table(rows, skipped)


def _read_s3(source: str, options: StoreOptions) -> bytes:
    bucket, key = split_s3_uri(source)
    return open_store(f"s3://{bucket}", options).read(key)


def _from_list(source: str, content: bytes, options: StoreOptions, id_column: str | None) -> Found:
    if source.lower().endswith(".txt"):
        lines = content.decode("utf-8", "surrogateescape").splitlines()
        return _table(_list_rows(source, [line for line in lines if line.strip()], options))
    try:
        is_csv = source.lower().endswith(".csv")
        table = pyarrow.csv.read_csv(io.BytesIO(content)) if is_csv else pq.read_table(io.BytesIO(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from None
    column = next((name for name in LIST_COLUMNS if name in table.column_names), None)
    if column is None:
        raise InputError(f"{source} has no column of paths: name one of its columns {', '.join(LIST_COLUMNS)}")
    if table[column].null_count:
        raise InputError(f"{source}: {table[column].null_count} rows have no path in column {column!r}")
    kept = [name for name in table.column_names if name not in (column, id_column)]
    if odd := [name for name in kept if name in OWN_COLUMNS]:
        raise InputError(f"{source}: columns {odd} have the names of our own; rename them in the list")
    videos = _table(_list_rows(source, [str(entry) for entry in table[column].to_pylist()], options)).videos
    if id_column is not None:
        videos = videos.set_column(0, MANIFEST.field("video_id"), _ids(source, table, id_column))
    for name in kept:
        videos = videos.append_column(table.schema.field(name), table[name])
    return Found(videos, ())


def _ids(source: str, table: pa.Table, id_column: str) -> pa.Array:
    if id_column not in table.column_names:
        raise InputError(f"{source} has no column {id_column!r}; it has {', '.join(table.column_names)}")
    ids = pc.cast(table[id_column], pa.string()).combine_chunks()
    if ids.null_count or pc.any(pc.equal(pc.utf8_length(ids), 0)).as_py():
        raise InputError(f"{source}: some rows have no id in column {id_column!r}")
    return ids


def _list_rows(source: str, entries: list[str], options: StoreOptions) -> list[VideoRef]:
    with ThreadPoolExecutor(HEAD_THREADS) as pool:  # waits on HEAD requests
        return list(pool.map(_ListEntries(source, options).row, entries))


class _ListEntries:
    """Turns the entries of one list into rows; thread-safe."""

    def __init__(self, source: str, options: StoreOptions) -> None:
        self.source, self.options = source, options
        self.base = source.rpartition("/")[0]
        self.stores: dict[str, Store] = {}

    def row(self, entry: str) -> VideoRef:
        scheme = re.match(r"([a-z][a-z0-9+.-]*)://", entry, re.IGNORECASE)
        if scheme and scheme[1] not in ("s3", "file"):
            raise InputError(f"{self.source}: {entry}: only local paths and s3:// are supported")
        if not scheme and self.base.startswith("s3://"):
            entry, name = f"{self.base}/{entry}", entry
        else:
            name = entry
        if entry.startswith("s3://"):
            bucket, _, key = entry.removeprefix("s3://").partition("/")
            if bucket not in self.stores:
                self.stores[bucket] = open_store(f"s3://{bucket}", self.options)
            return _s3_row(bucket, key, name, self.stores[bucket].head(key))
        return _local_row(Path(self.base), os.fsencode(entry.removeprefix("file://")))


def _table(rows: list[VideoRef], skipped: list[str] | None = None) -> Found:
    fields = [field for field in MANIFEST if field.name != "shard"]
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in fields]
    return Found(pa.table(columns, schema=pa.schema(fields)), tuple(skipped or ()))


def _refuse_duplicates(videos: pa.Table) -> None:
    counts = pc.value_counts(videos["video_id"].combine_chunks())
    twice = (
        [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1]
        if len(counts) < len(videos)
        else []
    )
    if twice:
        paths = videos.filter(pc.equal(videos["video_id"], twice[0]))["path"].to_pylist()
        raise InputError(
            f"{len(twice)} videos are listed more than once, the first as {paths[:3]} (id {twice[0]}); "
            "remove the repeats, or give each row an id of its own with --id-column"
        )
