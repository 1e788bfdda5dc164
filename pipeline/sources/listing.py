"""Find the videos of a source (a folder, an `s3://` prefix, one file or a list) as rows.

Rows keep the order of the sorted walk or of the list. Nothing is skipped silently: files of other kinds and links to
folders are named in `skipped`, and a folder that cannot be read is an error. AppleDouble files (`._x.mp4` next to
`x.mp4`, written by macOS) are files of another kind, even in a list.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.errors import InputError, StoreChanged, StoreDenied, StoreMissing, counted
from p3d.pipeline.sources.globs import Globs, split_glob
from p3d.pipeline.sources.identity import (
    APPLE_DOUBLE,
    APPLE_DOUBLE_NAME,
    is_apple_double,
    local_path,
    local_row,
    local_row_again,
    readable,
    real_path,
    s3_row,
)
from p3d.pipeline.sources.listing_buffer import FIELDS, ListingBuffer, batch_of
from p3d.pipeline.sources.lists import LIST_EXTENSIONS, TABLE_EXTENSIONS, FileList, line_numbers, read_list
from p3d.pipeline.storage.s3.uri import refuse_almost_s3, split_s3_uri
from p3d.pipeline.storage.store import ObjectInfo, Store, StoreOptions
from p3d.pipeline.storage.urls import CREDENTIAL, open_store
from p3d.pipeline.types import VideoRef

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .qt .mkv .webm .avi .divx .mpg .mpeg .mpe .m1v .m2v .vob .ts .mts .m2ts .wmv .asf .flv .f4v .3gp "
    ".3g2 .ogv .ogm .gif .mxf .y4m .h264 .264 .avc .h265 .265 .hevc .ivf .dv .mjpg .mjpeg .nut .rm .rmvb .wtv .obu "
    ".vc1".split()
)
HEAD_THREADS = 32  # parallel HEAD requests for a list of S3 keys
MAX_SKIPPED = 1000  # names of other files that are kept
EXAMPLES = 3  # rows of one video that a message names
BATCH = 1000  # files of one folder per batch of rows
NAMED_LISTS = f"{', '.join(LIST_EXTENSIONS[:-1])} or {LIST_EXTENSIONS[-1]}"
TELL_S = 10.0  # seconds between progress messages

Tell = Callable[[str], None]
ReadList = Callable[[str, bytes, str | None], FileList]  # as `read_list`


@dataclass(frozen=True, slots=True)
class SourceListing:
    """The content of a source: `videos` has the MANIFEST columns except `shard`, and the user's own columns.

    `skipped` names other files, at most MAX_SKIPPED of `n_skipped`.
    """

    videos: pa.Table
    skipped: tuple[str, ...]
    n_skipped: int = 0
    forget: Callable[[], None] = lambda: None  # once the rows are planned: a listing that was interrupted goes on


def find(
    source: str,
    options: StoreOptions,
    *,
    id_column: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tell: Tell = lambda _: None,
    read: ReadList = read_list,
    kept: Path | None = None,
) -> SourceListing:
    """The videos of a folder, an `s3://` prefix, one file, or a list (local or on S3).

    A text list has one path per line. Other lists have them in a column of LIST_COLUMNS; their other columns are kept.
    Relative paths are relative to the list. Of a folder or a prefix, only videos that a pattern of `include` matches
    are taken, if there are any, and none that one of `exclude` matches. Such a pattern may also be the source.
    `tell` is called with the progress of a long listing. `read` parses a list, for lists that have more in a line.
    `kept` is a folder for this listing alone: if the listing of an S3 prefix is interrupted, the next one continues it.
    InputError if the source cannot be read or has no videos.
    """
    path, globs = check_source(source, id_column=id_column, include=include, exclude=exclude)
    typed, (source, pattern) = source, split_glob(source)
    is_list = source.lower().endswith(LIST_EXTENSIONS)
    if path is None:
        found = (
            _from_list(source, _read_s3(source, options), read, options, id_column)
            if is_list
            else _walk_s3(source, options, globs, tell, kept)
        )
    elif is_list and path.is_file():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
        found = _from_list(str(path), content, read, options, id_column)
    else:
        found = _walk_folder(path, globs, tell) if path.is_dir() else _one_file(path, globs)
    if not found.videos.num_rows:
        found.forget()  # or the next listing, after videos have been copied there, would have none, too
        if pattern:
            raise InputError(
                f"{typed} does not exist, and as a pattern it matches no video ({found.n_skipped} other files)"
            )
        if globs:
            raise InputError(
                f"no videos in {source} are left by --include and --exclude ({found.n_skipped} other files); patterns "
                "match paths below SRC, such as 'talks/*.mp4'"
            )
        raise InputError(
            f"no videos in {source} ({found.n_skipped} other files); known extensions are "
            f"{' '.join(sorted(VIDEO_EXTENSIONS)[:8])} ...; name other files in a {NAMED_LISTS} list"
        )
    for glob in globs.unmatched:
        tell(f"warning: the pattern {glob!r} matches no file of {source}")
    return found


def check_source(
    source: str, *, id_column: str | None = None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[Path | None, Globs]:
    """The local path of a source, None on S3, and the patterns for what is below it. Nothing is listed.

    InputError for a source that does not exist here, and for options that do not fit it.
    """
    if not source:
        raise InputError("the source is an empty text; name a folder, a video, a list or s3://bucket/prefix")
    if CREDENTIAL.match(source):
        raise InputError("the source contains a credential; use a plain path or s3:// and botocore's credential chain")
    refuse_almost_s3(source)
    typed, (source, pattern) = source, split_glob(source)
    if id_column is not None and not source.lower().endswith(TABLE_EXTENSIONS):
        raise InputError(f"--id-column {id_column} needs a CSV, TSV, JSONL or Parquet list, and {source} is neither")
    if pattern and include:
        raise InputError(f"{typed} is a pattern; name the folder {source} as SRC, and repeat --include")
    globs = Globs([pattern] if pattern else include, exclude)
    if globs and source.lower().endswith(LIST_EXTENSIONS):
        raise InputError(f"{source} is a list; --include and --exclude need a folder or a prefix")
    if source.startswith("s3://"):
        return None, globs
    if "://" in source and not source.startswith("file:///"):
        raise InputError(f"{source}: only local paths and s3:// are supported")
    named = os.fsdecode(local_path(source)) if source.startswith("file://") else source
    path = Path(os.path.abspath(named))  # noqa: PTH100 - resolve() would follow links
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not (path.is_dir() or path.is_file() or is_video(path.name)):  # such as the fifo of `<(ls)` in a shell
            raise InputError(f"{path} is neither a folder nor a file; save a list as a file, and name that")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return path, globs


def root_of(source: str) -> str:
    """The folder or prefix below which a source has its videos, if the source is a pattern; else the source."""
    return split_glob(source)[0]


def named_in(source: str, videos: pa.Table) -> frozenset[str]:
    """The uris of the videos if `source` is a list, which may name them anywhere; empty for a folder or a prefix."""
    return frozenset(videos["uri"].to_pylist() if source.lower().endswith(LIST_EXTENSIONS) else ())


def look_again(videos: pa.Table, options: StoreOptions, *, keep_missing: bool = False) -> pa.Table:
    """The same rows of a manifest (without `shard`), with the current size, time, ETag and version of their files.

    With `keep_missing`, a file that is not there keeps what was planned, so that it is unchanged when it is back.
    """
    rows = [VideoRef(**row) for row in videos.select([field.name for field in FIELDS]).to_pylist()]
    with ThreadPoolExecutor(HEAD_THREADS) as pool:  # the threads wait for HEAD requests
        now = list(pool.map(_Lookup("", options).again, rows))
    if keep_missing:
        now = [new if new.size_bytes >= 0 else old for new, old in zip(now, rows, strict=True)]
    again = _table(now).videos
    for at, field in enumerate(FIELDS):
        videos = videos.set_column(videos.schema.get_field_index(field.name), field, again[at])
    return videos


class _Sorter:
    """Adds videos to the listing buffer, and keeps the first MAX_SKIPPED names of other files. Thread-safe."""

    def __init__(self, buffer: ListingBuffer, tell: Tell) -> None:
        self.buffer, self.tell = buffer, tell
        self.skipped: list[str] = []
        self.n_skipped = self.n_seen = 0
        self.told = time.monotonic()
        self.lock = threading.Lock()
        for earlier in buffer.before.values():
            self._count(earlier.n_rows, earlier.n_others, earlier.others)
        if buffer.n_rows:
            tell(f"the listing of before is continued: {self.n_seen} files, {buffer.n_rows} of them videos ...")

    def _count(self, n_rows: int, n_others: int, others: list[str]) -> None:
        self.n_seen += n_rows + n_others
        self.n_skipped += n_others
        self.skipped += others[: MAX_SKIPPED - len(self.skipped)]

    def take(self, rows: list[VideoRef], others: list[str], part: str = "", last: str = "") -> None:
        self.buffer.write(rows, part, last, others)
        with self.lock:
            self._count(len(rows), len(others), others)
            if time.monotonic() - self.told > TELL_S:
                self.told = time.monotonic()
                self.tell(f"{self.n_seen} files listed so far, {self.buffer.n_rows} of them videos ...")

    def found(self) -> SourceListing:
        forget = self.buffer.forget if self.buffer.is_kept else lambda: None
        return SourceListing(self.buffer.table(), tuple(sorted(self.skipped)), self.n_skipped, forget)


def _one_file(path: Path, globs: Globs) -> SourceListing:
    if globs:
        raise InputError(f"{path} is one file; --include and --exclude need a folder or a prefix")
    return _table([local_row(path.parent, os.fsencode(path.name))])


def _walk_folder(root: Path, globs: Globs, tell: Tell) -> SourceListing:
    base = os.fsencode(root)
    with ListingBuffer() as buffer:
        sorter = _Sorter(buffer, tell)
        for directory, folders, names in os.walk(base, onerror=_refuse_unreadable):
            _refuse_unless_entered(directory)
            folders.sort()
            below = [os.path.join(directory, name) for name in folders]  # noqa: PTH118 - bytes
            links = [os.path.relpath(folder, base) for folder in below if os.path.islink(folder)]  # noqa: PTH114 - bytes
            sorter.take([], [f"{readable(link)}/ (a link to a folder)" for link in links])
            _leave_out(base, directory, folders, globs, sorter)
            files = [os.path.relpath(os.path.join(directory, name), base) for name in sorted(names)]  # noqa: PTH118
            for at in range(0, len(files), BATCH):
                batch = files[at : at + BATCH]
                wanted = [name for name in batch if globs.keeps(os.fsdecode(name)) and is_video(name)]
                videos = [name for name in wanted if not is_apple_double(os.path.join(base, name))]  # noqa: PTH118
                others = sorted(set(batch).difference(videos))
                sorter.take([local_row(root, name) for name in videos], [readable(name) for name in others])
        return sorter.found()


def _leave_out(base: bytes, directory: bytes, folders: list[bytes], globs: Globs, sorter: _Sorter) -> None:
    """Remove the folders that `--exclude` names, so that they are not even read."""
    if not globs:
        return
    below = {name: os.path.relpath(os.path.join(directory, name), base) for name in folders}  # noqa: PTH118 - bytes
    out = [name for name in folders if globs.excludes(os.fsdecode(below[name]))]
    folders[:] = [name for name in folders if name not in out]
    sorter.take([], [f"{readable(below[name])}/ (excluded)" for name in out])


def _refuse_unless_entered(directory: bytes) -> None:
    """InputError for a folder whose names may be listed, but none of whose files may be opened."""
    try:
        os.stat(os.path.join(directory, b"."))  # noqa: PTH116, PTH118 - bytes
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> None:
    """Raise InputError. Otherwise the videos of a folder that cannot be read would be skipped silently."""
    raise InputError(f"{os.fsdecode(error.filename)} cannot be read ({error.strerror}); fix that, or plan without it")


def is_video(name: bytes | str) -> bool:
    """Whether the name of a file has a known extension of videos."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - bytes or text
    return (suffix.decode("ascii", "replace") if isinstance(suffix, bytes) else suffix) in VIDEO_EXTENSIONS


def _walk_s3(source: str, options: StoreOptions, globs: Globs, tell: Tell, kept: Path | None) -> SourceListing:
    from p3d.pipeline.storage.s3.store import S3Store  # botocore takes half a second to import
    from p3d.pipeline.storage.s3.walk import list_parts, split

    bucket, prefix = split_s3_uri(source)
    store = S3Store(f"s3://{bucket}", options)
    root = prefix if prefix.endswith("/") or not prefix else f"{prefix}/"
    with ListingBuffer(kept) as buffer:
        sorter = _Sorter(buffer, tell)

        def begin(part: str) -> str | None:
            before = buffer.before.get(part)
            return "" if before is None else None if before.done else before.last

        def take(part: str, objects: list[ObjectInfo] | None) -> None:
            if objects is None:
                buffer.end(part)
                return
            names = [info.key.removeprefix(root) for info in objects]
            videos = {
                name: info
                for name, info in zip(names, objects, strict=True)
                if globs.keeps(name) and is_video(name) and not _is_apple_double(store, info.key, info.size_bytes)
            }
            rows = [s3_row(bucket, info.key, name, info) for name, info in videos.items()]
            others = [name for name in names if name and not name.endswith("/") and name not in videos]
            sorter.take(rows, others, part, max((info.key for info in objects), default=""))

        parts = buffer.parts
        if parts is None:
            parts = split(store, root, take)
            buffer.split(parts)
        list_parts(store, parts, take, begin)
        if not sorter.n_seen and prefix and not globs and (info := store.head(prefix)) is not None:  # one object
            buffer.forget()
            return _table([s3_row(bucket, prefix, prefix.rpartition("/")[2], info)])
        return sorter.found()


def _is_apple_double(store: Store, key: str, size_bytes: int) -> bool:
    """As `is_apple_double`, of an object: it is read only if its name is like that."""
    if not key.rpartition("/")[2].startswith(APPLE_DOUBLE_NAME.decode()) or size_bytes < len(APPLE_DOUBLE):
        return False
    try:
        with store.open(key) as file:
            return file.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE
    except (StoreMissing, StoreChanged, StoreDenied):
        return False  # the row says that it cannot be read


def _read_s3(source: str, options: StoreOptions) -> bytes:
    bucket, key = split_s3_uri(source)
    return open_store(f"s3://{bucket}", options).read(key)


def _from_list(
    source: str, content: bytes, read: ReadList, options: StoreOptions, id_column: str | None
) -> SourceListing:
    listed = read(source, content, id_column)
    lookup = _Lookup(source, options)
    with ThreadPoolExecutor(HEAD_THREADS) as pool:  # the threads wait for HEAD requests
        looked_up = list(pool.map(lookup.look, listed.entries))
    rows = [row for row, _ in looked_up]
    others = [other for _, other in looked_up]
    videos = _table(rows).videos
    if listed.ids is not None:
        videos = videos.set_column(0, MANIFEST.field("video_id"), listed.ids)
    if listed.own is not None:
        for field in listed.own.schema:
            videos = videos.append_column(field, listed.own[field.name])
    if any(others):
        videos = videos.filter(pc.invert(pa.array(others)))

    def where() -> tuple[str, list[int]]:
        unit, numbers = line_numbers(source, content, len(rows))
        return unit, [number for number, other in zip(numbers, others, strict=True) if not other]

    _refuse_duplicates(videos, where)
    if id_column is None:
        _refuse_spellings(videos, where)
    skipped = [row.path for row, other in zip(rows, others, strict=True) if other]
    return SourceListing(videos, tuple(skipped[:MAX_SKIPPED]), len(skipped))


class _Lookup:
    """Turns the entries of one list into rows; thread-safe."""

    def __init__(self, source: str, options: StoreOptions) -> None:
        self.source, self.options = source, options
        self.base = source.rpartition("/")[0] or "/"
        self.stores: dict[str, Store] = {}

    def look(self, entry: str) -> tuple[VideoRef, bool]:
        """The row of an entry, and whether it is an AppleDouble file."""
        row = self.row(entry)
        if not row.uri.startswith("s3://"):
            return row, is_apple_double(local_path(row.uri))
        bucket, key = split_s3_uri(row.uri)
        return row, _is_apple_double(self.stores[bucket], key, row.size_bytes)

    def row(self, entry: str) -> VideoRef:
        """The row of an entry: a percent-encoded URI if it has a scheme, else a path relative to the list."""
        scheme = re.match(r"([a-z][a-z0-9+.-]*)://", entry, re.IGNORECASE)
        if scheme and (scheme[1] not in ("s3", "file") or CREDENTIAL.match(entry)):
            raise InputError(f"{self.source} has an entry {scheme[0]}...; only local paths and s3:// are supported")
        if entry.startswith("s3://"):
            try:
                return self._s3_row(*split_s3_uri(entry), entry)
            except InputError as error:
                raise InputError(f"{self.source}: {error}") from None
        if scheme:
            return local_row(Path(self.base), local_path(entry))
        if self.base.startswith("s3://"):
            if entry.startswith("/"):
                raise InputError(
                    f"{self.source}: {entry} is an absolute path, but a list on S3 needs relative paths or s3://"
                )
            bucket, folder = split_s3_uri(self.base)
            return self._s3_row(bucket, f"{folder}/{_utf8(self.source, entry)}".removeprefix("/"), entry)
        return local_row(Path(self.base), os.path.normpath(os.fsencode(entry)))

    def again(self, row: VideoRef) -> VideoRef:
        """The row with the current state of its source. Its id and its path do not change."""
        if not row.uri.startswith("s3://"):
            return local_row_again(row)
        now = self._s3_row(*split_s3_uri(row.uri), row.path)
        return replace(now, video_id=row.video_id, path=row.path)

    def _s3_row(self, bucket: str, key: str, name: str) -> VideoRef:
        if not key:
            raise InputError(f"{name} does not name an object in its bucket")
        if bucket not in self.stores:
            self.stores[bucket] = open_store(f"s3://{bucket}", self.options)
        return s3_row(bucket, key, name, self.stores[bucket].head(key))


def _utf8(source: str, entry: str) -> str:
    """The entry. InputError if it is not UTF-8, as S3 keys must be."""
    raw = os.fsencode(entry)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode("utf-8", "backslashreplace")
        raise InputError(f"{source}: {shown} is not UTF-8, as S3 keys must be") from None


def _table(rows: list[VideoRef]) -> SourceListing:
    return SourceListing(pa.Table.from_batches([batch_of(rows)]), ())


Where = Callable[[], tuple[str, list[int]]]  # "line" or "row", and the number of each video of a list


def _refuse_duplicates(videos: pa.Table, where: Where) -> None:
    counts = pc.value_counts(videos["video_id"].combine_chunks())
    twice = (
        [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1]
        if len(counts) < len(videos)
        else []
    )
    if twice:
        (unit, numbers), names = where(), videos["path"].to_pylist()
        found = [at for at, one in enumerate(videos["video_id"].to_pylist()) if one == twice[0]]
        more = ", ..." if len(found) > EXAMPLES else ""
        if len({names[at] for at in found}) == 1:
            listed = f"{names[found[0]]} in {unit}s {', '.join(str(numbers[at]) for at in found[:EXAMPLES])}{more}"
        else:
            listed = f"{', '.join(f'{names[at]} in {unit} {numbers[at]}' for at in found[:EXAMPLES])}{more}"
        raise InputError(
            f"{counted(len(twice), 'video')} listed more than once, the first as {listed} (id {twice[0]}); remove the "
            "duplicates, or give each row its own id with --id-column"
        )


def _refuse_spellings(videos: pa.Table, where: Where) -> None:
    """InputError if two rows name one file or object in different ways: by `./`, `//`, a link, or its absolute path."""
    seen: dict[bytes | str, int] = {}
    folders: dict[bytes, bytes] = {}
    paths = videos["path"].to_pylist()
    for at, uri in enumerate(videos["uri"].to_pylist()):
        named = uri if uri.startswith("s3://") else real_path(local_path(uri), folders)
        first = seen.setdefault(named, at)
        if first != at:
            unit, numbers = where()
            raise InputError(
                f"{paths[first]!r} in {unit} {numbers[first]} and {paths[at]!r} in {unit} {numbers[at]} are two names "
                "of one file; remove one, or give each row its own id with --id-column"
            )
