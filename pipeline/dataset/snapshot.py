"""A clean, verified copy of a dataset: the newest rows only, without the excluded ids, in large files.

    NewestRows | SnapshotRows ──Parts──> DEST/clips videos failures/part-00000.parquet ... ──read back──> snapshot.json

Snapshots serve takedown, compaction and sharing. snapshot.json is created last, after every file was read back from
DEST: without it there is no snapshot. DEST holds nothing about excluded videos but their number. A snapshot can be the
source of the next one, so ids can still be taken down after the job's output was deleted.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.files import FOLDERS, check, local_path, reading, sha256_of
from p3d.pipeline.dataset.newest_rows import NewestRows, Rows
from p3d.pipeline.dataset.snapshot_parts import Parts, create_file
from p3d.pipeline.dataset.snapshot_record import (
    SNAPSHOT_KEY,
    Counts,
    FileRecord,
    SnapshotRecord,
    problems_of,
    read_snapshot,
)
from p3d.pipeline.errors import (
    AlreadyRunning,
    DamagedJob,
    InputError,
    OtherRecipe,
    StoreCorrupt,
    Unfinished,
    as_stored,
)
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import EXISTS, Store
from p3d.pipeline.types import VideoRef

BUFFER_BYTES = 1024**2  # read at a time from a column of a row group, which may have 512 MiB in older snapshots
SHOWN_IDS = 5  # unknown ids listed in an error message, at most
OnStep = Callable[[str, int, int], None]  # (name of the step, number done, number of all)


class SnapshotRows:
    """The rows of a snapshot, without the ids of `leave_out`. Each file is verified before its rows are returned.

    `excluded`, `pending` and `superseded` include the snapshot's own counts.
    """

    def __init__(self, store: Store, leave_out: frozenset[str] = frozenset()) -> None:
        self.store, self.record = store, read_snapshot(store)
        self.job, self.plans = self.record.job, self.record.plans
        recipe, counts = self.job.recipe, self.record.counts
        self._remedy = "Restore it, or make the snapshot again"
        self._leave_out = pa.array(sorted(leave_out), pa.string())
        self.stored = dict(schema.schemas_of(recipe))
        seen: set[str] = set()
        for file in self._files("videos", "failures"):
            with reading(store, file.key, self._remedy), store.open(file.key) as content:
                table = schema.open_parquet(content)
                schema.check_columns(file.folder, table.schema_arrow, recipe)
                self.stored[file.folder] = table.schema_arrow  # which has the user's own columns
                ids = table.read(columns=["video_id"], use_threads=False)["video_id"]
                seen.update(leave_out.intersection(ids.to_pylist()))
        self.schemas = schema.newest_schemas(self.stored, recipe)
        self.unknown, self.with_clips = leave_out - seen, self.record.with_clips
        self.excluded, self.pending = counts.excluded + len(seen), counts.pending
        self.superseded = counts.superseded
        self.n_videos = counts.videos + counts.failures - len(seen)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the units that rows are read in: the files. A name always means the same rows."""
        return tuple(one.key for one in self._files(*FOLDERS))

    def find(self, name: str) -> tuple[str, ...]:
        """The ids of the videos that have this video_id, uri or path."""
        found: dict[str, list[str]] = {"video_id": [], "uri": [], "path": []}
        name = as_stored(name)
        for file in self._files("videos", "failures"):
            with reading(self.store, file.key, self._remedy), self.store.open(file.key) as content:
                table = schema.open_parquet(content).read(columns=list(found), use_threads=False)
            for column, ids in found.items():
                ids += table.filter(pc.equal(table[column], name))["video_id"].to_pylist()
        ids = found["video_id"] or list(dict.fromkeys([*found["uri"], *found["path"]]))
        return tuple(one for one in ids if not pc.is_in(pa.scalar(one), self._leave_out).as_py())

    def place(self, video: VideoRef) -> VideoRef:
        """A video of a row with the version that its source must have, which is that of the row."""
        return video

    def rows(
        self,
        *,
        clips: bool = True,
        only: frozenset[str] | None = None,
        skip: frozenset[str] = frozenset(),
        on_step: Callable[[int, int], None] | None = None,
        own_version: bool = False,
    ) -> Rows:
        """All rows in plan order, each table with its folder. Raises DamagedJob, which names the changed file.

        Rows of an older schema version get the columns that came later, unless `own_version`.

        With `only`, just the rows of these ids: row groups without any of them are not read, and files are verified
        by the checksums of the pages that are read, not whole. `skip` are pieces that are not read.
        """
        files = self._files(*(FOLDERS if clips else FOLDERS[1:]))
        wanted = None if only is None else pa.array(sorted(only), pa.string())
        for done, one in enumerate(files):
            if one.key not in skip:
                for folder, rows in self._file(one, wanted):
                    yield folder, rows if own_version else schema.with_newer_columns(folder, rows, self.job.recipe)
            if on_step is not None:
                on_step(done + 1, len(files))

    def _file(self, one: FileRecord, wanted: pa.Array | None) -> Rows:
        with reading(self.store, one.key, self._remedy), local_path(self.store, one.key) as path:
            check(wanted is not None or sha256_of(path) == one.sha256, "it is not the file that snapshot.json names")
            with schema.open_parquet(path, buffer_bytes=BUFFER_BYTES) as file:
                groups = [at for at in range(file.num_row_groups) if wanted is None or _has_any(file, at, wanted)]
                for batch in file.iter_batches(schema.ROW_GROUP_ROWS, row_groups=groups, use_threads=False):
                    rows = pa.Table.from_batches([batch]).cast(self.stored[one.folder])
                    rows.validate(full=True)  # of text that is not UTF-8
                    keep = pc.invert(pc.is_in(rows["video_id"], self._leave_out))
                    if wanted is not None:
                        keep = pc.and_(keep, pc.is_in(rows["video_id"], wanted))
                    yield one.folder, rows.filter(keep)

    def _files(self, *folders: str) -> list[FileRecord]:
        return [one for one in self.record.files if one.folder in folders]


def _has_any(file: pq.ParquetFile, group: int, ids: pa.Array) -> bool:
    """Whether the row group has a row of one of these videos."""
    column = file.read_row_group(group, columns=["video_id"], use_threads=False)["video_id"]
    return bool(pc.any(pc.is_in(column, ids)).as_py())


def snapshot(
    source: NewestRows | SnapshotRows,
    dest: Store,
    *,
    clips: bool = True,
    allow_unknown: bool = False,
    skip_pending: bool = False,
    on_step: OnStep | None = None,
) -> SnapshotRecord:
    """Write the rows of `source` into an empty DEST, read everything back, and only then create DEST/snapshot.json.

    Raises Unfinished if videos are pending, unless `skip_pending`; InputError if an excluded id is not in the dataset,
    unless `allow_unknown`; OtherRecipe if DEST is not empty; DamagedJob if the source is damaged.
    """
    url = source.store.url
    if source.unknown and not allow_unknown:
        shown = ", ".join(map(repr, sorted(source.unknown)[:SHOWN_IDS]))
        raise InputError(
            f"{len(source.unknown)} of the ids to exclude are not in {url}, such as {shown}; correct the list, or "
            "give --allow-unknown"
        )
    if isinstance(source, NewestRows) and source.pending and not skip_pending:
        raise Unfinished(
            f"{source.pending} of the videos of {url} are still to be done: run `p3d resume {source.store.words()}` "
            "first, or leave them out with --skip-pending"
        )
    refuse_used(source.store, dest)
    dest.prove_create_once()
    with_clips = clips and source.with_clips
    files, n_clips = _copy(source, dest, with_clips, on_step)
    counts = {folder: sum(one.n_rows or 0 for one in files if one.folder == folder) for folder in FOLDERS}
    if counts["videos"] + counts["failures"] != source.n_videos or (with_clips and counts["clips"] != n_clips):
        raise DamagedJob(
            f"{url} does not add up: {counts} rows for {source.n_videos} videos and {n_clips} clips; "
            f"`p3d verify {source.store.words()} --deep` says more"
        )
    files += _copy_weights(source, dest)
    record = SnapshotRecord(
        source=url,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        job=source.job,
        plans=source.plans,
        with_clips=with_clips,
        counts=Counts(**counts, excluded=source.excluded, pending=source.pending, superseded=source.superseded),
        files=tuple(files),
        versions=_versions(),
    )
    if problems := problems_of(dest, record, on_step and partial(on_step, "read back")):
        raise StoreCorrupt(f"{dest.url} does not hold what was written: {problems[0]}; remove it and try again")
    content = record.to_json()
    if dest.create(SNAPSHOT_KEY, content) == EXISTS and dest.read(SNAPSHOT_KEY) != content:
        raise AlreadyRunning(f"{dest.url}: another snapshot was finished here meanwhile; choose another DEST")
    _tidy(dest)
    return record


def refuse_used(source: Store, dest: Store) -> None:
    """Raise OtherRecipe unless DEST is empty or absent, and outside the source."""
    if f"{dest.url}/".startswith(f"{source.url}/"):
        raise OtherRecipe(f"{dest.url} lies in {source.url} itself; choose a folder outside it for the snapshot")
    stranger = next((info.key for info in dest.list()), None)
    if stranger is None:
        return
    if dest.head(SNAPSHOT_KEY) is not None:
        raise OtherRecipe(f"{dest.url} holds a snapshot already; choose another DEST, or remove this one")
    if stranger.startswith(("_job/", *(f"{folder}/part-" for folder in FOLDERS))) and dest.head("job.json") is None:
        raise OtherRecipe(f"{dest.url} holds a snapshot that was not finished; remove it, or choose another DEST")
    raise OtherRecipe(f"{dest.url} is not empty ({stranger}); choose an empty folder for the snapshot")


def _copy(
    source: NewestRows | SnapshotRows, dest: Store, clips: bool, on_step: OnStep | None
) -> tuple[list[FileRecord], int]:
    """Copy all rows into DEST. Returns its files, and the sum of `n_clips` over the videos rows."""
    n_clips = 0
    with contextlib.ExitStack() as stack:
        parts = {
            folder: stack.enter_context(Parts(dest, folder, source.stored[folder]))
            for folder in (FOLDERS if clips else FOLDERS[1:])
        }
        for folder, table in source.rows(clips=clips, on_step=on_step and partial(on_step, "copied"), own_version=True):
            parts[folder].add(table)
            n_clips += (pc.sum(table["n_clips"]).as_py() or 0) if folder == "videos" else 0
        for one in parts.values():
            one.finish()
    return [file for one in parts.values() for file in one.files], n_clips


def _copy_weights(source: NewestRows | SnapshotRows, dest: Store) -> list[FileRecord]:
    """Copy the weights if the source has them: a search for a new video needs them."""
    sha256 = source.job.recipe.weights_sha256
    key = f"weights/{sha256}.safetensors"
    if source.store.head(key) is None:
        return []
    with dest.temp_file() as path:
        source.store.download(key, path)
        if sha256_of(path) != sha256:
            raise DamagedJob(f"{source.store.url}/{key} is damaged: its sha256 differs from its name; restore it")
        return [create_file(dest, key, path, None)]


def _versions() -> dict[str, str]:
    """Versions of the software that writes the snapshot."""
    ours = "absent"
    with contextlib.suppress(metadata.PackageNotFoundError):
        ours = metadata.version("p3d-embeddings")
    return {"python": platform.python_version(), "pyarrow": pa.__version__, "p3d-embeddings": ours}


def _tidy(dest: Store) -> None:
    """Remove the empty folders of the temporary files, so that a finished snapshot holds nothing else."""
    if isinstance(dest, LocalStore):
        for folder in ("tmp", "probe", "."):
            with contextlib.suppress(OSError):
                (dest.root / "_job" / folder).rmdir()
