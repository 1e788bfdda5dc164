"""The clip vectors of a dataset as one .npy file per video, for tools that read features so, such as ActionFormer.

    NewestRows | SnapshotRows ──> .DIR.<random>.part/features/<name>.npy ..., index.parquet ──rename──> DIR

Everything is written into a new folder next to DIR, and synced before the folder gets its name: DIR exists as a whole
or not at all. index.parquet, its last file, has a row per video, in the order of the plans. Ids may be any text and OUT
may be somebody else's, so a file is named by the id only if the id is a plain name.

Legend: N rows of a piece, T clips of a video, D dimension.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import OnStep, SnapshotRows
from p3d.pipeline.errors import DamagedJob, InputError, OtherRecipe, Unfinished
from p3d.pipeline.results.duplicates import by_video
from p3d.pipeline.storage.local import fsync, make_folder, writing
from p3d.pipeline.storage.store import Store

FEATURES = "features"
INDEX = "index.parquet"
FLUSH_CLIPS = 1 << 20  # of the index in memory
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}")
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # on Windows, with any suffix
FACTS = ("video_id", "path", "uri", "n_clips", "n_frames", "duration_s", "fps", "resampled_fps", "resampled_frames")
INDEX_SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),  # of the file, without folder and suffix
        pa.field("file", pa.string(), nullable=False),  # below DIR
        pa.field("path", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("n_clips", pa.int32(), nullable=False),
        pa.field("n_frames", pa.int64(), nullable=False),  # with --fps of the resampled video
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),  # with --fps that rate
        pa.field("stride_frames", pa.int32()),  # null unless the clips are every:STRIDE
        pa.field("clip_frames", pa.int32(), nullable=False),  # from the first to the last frame of a clip
        pa.field("start_s", pa.list_(pa.float64()), nullable=False),
        pa.field("end_s", pa.list_(pa.float64()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written. `stride_frames` is None unless the clips are every:STRIDE.

    `renamed` are videos whose file has another name than their id.
    """

    videos: int
    clips: int
    failures: int
    pending: int
    renamed: int
    size_bytes: int
    dimension: int
    dtype: str
    stride_frames: int | None
    clip_frames: int


def export_npy(
    source: NewestRows | SnapshotRows, folder: Path, *, skip_pending: bool = False, on_step: OnStep | None = None
) -> Exported:
    """Write the clips of `source` into a new or empty folder, [T, D] per video, in the stored dtype.

    `on_step` counts the shards or files of a first pass over videos/, then the videos that are written. Raises
    Unfinished if videos are pending, unless `skip_pending`; OtherRecipe if the folder is not empty; InputError if there
    are no clips; DamagedJob; StoreError if the disk fails.
    """
    folder = Path(os.path.realpath(folder))
    url, words = source.store.url, source.store.words()
    if not source.with_clips:
        raise InputError(f"{url} is a snapshot without clips: export the output that it was made from")
    if source.pending and not skip_pending:
        raise Unfinished(
            f"{source.pending} of the videos of {url} are still to be done: run `p3d resume {words}` first, or leave "
            "them out with --skip-pending"
        )
    _refuse_used(source.store, folder)
    facts = _facts(source, on_step and partial(on_step, "read"))
    with _whole(folder) as work:
        return _write(source, facts, work, on_step and partial(on_step, "written"))


def safe_name(video_id: str, taken: set[str]) -> str:
    """A file name without suffix for a video, and add it to the `taken` ones, which are in lower case.

    It is the id itself if that is a plain name on every file system and, without regard to case, not taken. Otherwise
    it has readable characters of the id, `~`, which no plain name has, and digits of the id's sha256.
    """
    name = video_id
    if not PLAIN.fullmatch(name) or DEVICE.fullmatch(name) or name.lower() in taken:
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", video_id)[:80].strip("_") or "video"
        name = f"{readable}~{hashlib.sha256(video_id.encode()).hexdigest()[:32]}"
    taken.add(name.lower())
    return name


def _refuse_used(source: Store, folder: Path) -> None:
    """OtherRecipe unless the folder is empty or absent, and outside the source; InputError if it cannot be one."""
    if f"{folder}/".startswith(f"{os.path.realpath(source.url)}/"):
        raise OtherRecipe(f"{folder} lies in {source.url} itself; choose a folder outside it for the export")
    try:
        first = next(folder.iterdir(), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; name a new or empty folder for the export") from None
    if first is not None:
        raise _used(folder, first.name)
    if folder.is_mount():
        raise InputError(f"{folder} is a mount point, which cannot be replaced; name a new folder in it")


def _used(folder: Path, held: str) -> OtherRecipe:
    return OtherRecipe(f"{folder} is not empty ({held}); choose a new or empty folder for the export")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder`, which gets its name at the end, synced, or is removed after an error."""
    name = folder.name.encode(errors="replace")[:100].decode(errors="ignore")  # a name has at most 255 bytes
    work = folder.with_name(f".{name}.{uuid.uuid4().hex}.part")
    with writing(work):
        make_folder(folder.parent)
        work.mkdir()
    try:
        yield work
        with writing(folder):
            fsync(work / FEATURES)
            fsync(work)
            if folder.is_dir() and (held := next(folder.iterdir(), None)) is not None:
                raise _used(folder, held.name)
            work.rename(folder)  # fails unless the folder is absent or empty
            fsync(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _facts(source: NewestRows | SnapshotRows, on_step: Callable[[int, int], None] | None) -> pa.Table:
    """The FACTS of the videos that have rows, in plan order."""
    parts = [rows.select(FACTS) for folder, rows in source.rows(clips=False, on_step=on_step) if folder == "videos"]
    return pa.concat_tables([source.schemas["videos"].empty_table().select(FACTS), *parts])


def _write(
    source: NewestRows | SnapshotRows, facts: pa.Table, work: Path, on_video: Callable[[int, int], None] | None
) -> Exported:
    """Write the arrays and the index. DamagedJob unless each video has the clips that its row says."""
    recipe, taken, n_clips, renamed = source.job.recipe, set[str](), 0, 0
    stride = recipe.sampling.value if recipe.sampling.rule == "every" else None
    same = {"stride_frames": stride, "clip_frames": recipe.sampling.span}
    index = _Index(work / INDEX, same, json.dumps(recipe.to_dict()))
    with writing(work), index:
        (work / FEATURES).mkdir()
        videos = groupby(_pieces(source), key=itemgetter(0))
        for at, row in enumerate(_rows_of(facts)):
            name = safe_name(row["video_id"], taken)
            renamed += name != row["video_id"]
            found = next(videos, ("", ()))
            if found[0] != row["video_id"]:
                raise _damaged(source, f"{row['video_id']} is in videos/, and not at the same place in clips/")
            array = _Array(work / FEATURES / f"{name}.npy", recipe.feature_dim, np.dtype(recipe.embedding_dtype))
            with array:
                spans = [array.add(rows) for _, rows in found[1]]
            start_s, end_s = ([second for span in spans for second in span[side]] for side in (0, 1))
            if array.n_rows != row["n_clips"]:
                raise _damaged(source, f"{row['video_id']} has {array.n_rows} clips, and its row says {row['n_clips']}")
            index.add({**row, "name": name, "file": f"{FEATURES}/{name}.npy", "start_s": start_s, "end_s": end_s})
            n_clips += array.n_rows
            if on_video is not None:
                on_video(at + 1, facts.num_rows)
        if (left := next(videos, None)) is not None:
            raise _damaged(source, f"{left[0]} has clips and no row in videos/")
    return Exported(
        videos=facts.num_rows,
        clips=n_clips,
        failures=source.n_videos - facts.num_rows,
        pending=source.pending,
        renamed=renamed,
        size_bytes=sum(entry.stat().st_size for entry in os.scandir(work / FEATURES)),
        dimension=recipe.feature_dim,
        dtype=recipe.embedding_dtype,
        stride_frames=stride,
        clip_frames=recipe.sampling.span,
    )


def _damaged(source: NewestRows | SnapshotRows, text: str) -> DamagedJob:
    return DamagedJob(
        f"{source.store.url} does not add up: {text}. `p3d verify {source.store.words()} --deep` says more"
    )


def _pieces(source: NewestRows | SnapshotRows) -> Iterator[tuple[str, pa.Table]]:
    """(video_id, some of its clips in order): the clips of a video may lie in several row groups."""
    for folder, rows in source.rows():
        if folder == "clips":
            for video_id, held in by_video(rows):
                yield video_id, rows.slice(held.start, len(held))


def _rows_of(facts: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of the index, as far as they follow from videos/."""
    for batch in facts.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            fps, n_frames = row.pop("resampled_fps"), row.pop("resampled_frames")
            yield row | ({} if fps is None else {"fps": fps, "n_frames": n_frames})


class _Array:
    """A .npy file [T, D] that grows. A context manager: at its end T is written into the header, and all is synced."""

    def __init__(self, path: Path, dim: int, dtype: np.dtype[Any]) -> None:
        self.dim, self.dtype, self.n_rows = dim, dtype, 0
        self._file: BinaryIO = path.open("xb")
        self._file.write(self._header())

    def _header(self) -> bytes:
        """The header for the current T; numpy makes it as long for any other one."""
        header = io.BytesIO()
        facts = {"descr": self.dtype.newbyteorder("<").str, "fortran_order": False, "shape": (self.n_rows, self.dim)}
        np.lib.format.write_array_header_1_0(header, facts)
        return header.getvalue()

    def add(self, rows: pa.Table) -> tuple[list[float], list[float]]:
        """Append the vectors of some clips. Returns when they start and end."""
        values: npt.NDArray[Any] = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors_ND = np.ascontiguousarray(values.reshape(-1, self.dim), self.dtype.newbyteorder("<"))
        self._file.write(vectors_ND.data)
        self.n_rows += len(vectors_ND)
        return rows["start_s"].to_pylist(), rows["end_s"].to_pylist()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(self._header())
                self._file.flush()
                os.fsync(self._file.fileno())


class _Index:
    """The index, written in parts as videos arrive. A context manager: it gets its name at the end, synced."""

    def __init__(self, path: Path, same: dict[str, int | None], recipe: str) -> None:
        self.path, self.same = path, same
        self._part = path.with_suffix(".part")
        self._schema = INDEX_SCHEMA.with_metadata({"p3d.recipe": recipe})
        self._writer = pq.ParquetWriter(self._part, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._clips = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row | self.same)
        self._clips += row["n_clips"]
        if self._clips >= FLUSH_CLIPS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._clips = [], 0

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            fsync(self._part)
            self._part.rename(self.path)
