"""Read what a job has stored, from Python. Needs neither torch nor Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from p3d.jobs.api.keywords import listed, path_of
from p3d.jobs.job import read_job, rows_of
from p3d.jobs.monitor.outputs import outputs_of
from p3d.jobs.monitor.status import Status, read_status
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.several import SeveralRows, refuse_other_recipes
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.results.evaluation.classes import class_names
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FLOAT32


def status(out: str | os.PathLike[str], *, s3: StoreOptions = DEFAULTS) -> Status:
    """The progress of the job at `out`, as `p3d status` shows it. Reads only the store.

    NoSuchJob, DamagedJob, OtherVersion or StoreError if it cannot be read.
    """
    store = open_store(path_of(out, "out"), s3)
    return read_status(store, read_job(store))


def open_dataset(
    out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, s3: StoreOptions = DEFAULTS
) -> Dataset:
    """The rows of the job or the snapshot at `out`, which may still be running. Reads the plans, and no rows yet.

    `out` may be several outputs of one recipe, or a folder of them. Then each row also has the column `out`, the output
    that it is from, as ids are unique in one output only.

    NoSuchJob, OtherRecipe, DamagedJob, OtherVersion or StoreError if it cannot be read.
    """
    sources = several_rows(out, s3)
    return Dataset(sources[0] if len(sources) == 1 else SeveralRows(sources))


def several_rows(
    out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], s3: StoreOptions
) -> list[NewestRows | SnapshotRows]:
    """The newest rows of each output named, all of one recipe. InputError, OtherRecipe, and what `rows_of` raises."""
    named = [path_of(one, "out") for one in (out if isinstance(out, list | tuple) else [out])]
    if not named:
        raise InputError("out must be a path or a URL, or several, not an empty list")
    sources = [rows_of(store) for store in outputs_of(named, s3)]
    refuse_other_recipes(sources)
    return sources


@dataclass(frozen=True, slots=True, repr=False)
class Dataset:
    """The newest row of each video: a retry or a new version of a file replaces older rows.

    Every row is checked against its shard before it is returned: DamagedJob names a damaged file. Rows of an older
    schema version have the columns of this one, too.
    """

    source: NewestRows | SnapshotRows | SeveralRows

    def __repr__(self) -> str:
        recipe, pending = self.recipe, f", {self.n_pending} pending" if self.n_pending else ""
        return f"Dataset({self.out!r}: {self.n_videos} videos{pending}, {recipe.model}, {recipe.feature_dim} features)"

    @property
    def out(self) -> str:
        """The absolute path or URL of the output; of several, separated by commas."""
        several = self.source.sources if isinstance(self.source, SeveralRows) else [self.source]
        return ", ".join(one.store.url for one in several)

    @property
    def recipe(self) -> Recipe:
        """What decided the numbers of the rows: network, weights, clips, precision."""
        return self.source.job.recipe

    @property
    def n_videos(self) -> int:
        """Videos that have rows or a failure."""
        return self.source.n_videos

    @property
    def n_pending(self) -> int:
        """Videos that are planned and not computed yet."""
        return self.source.pending

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes of `probs`, by class number; empty if the weights have none."""
        return class_names(self.source.store, self.recipe)

    def clips(self, columns: str | Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of clips/, in batches of at most 4096. InputError for a column that does not exist."""
        return self._batches("clips", listed(columns))

    def videos(self, columns: str | Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of videos/ with the user's own columns, in batches of at most 4096. InputError as for `clips`."""
        return self._batches("videos", listed(columns))

    def failures(self) -> pa.Table:
        """The videos that have no rows, with the reason, a detail for people, and the number of attempts."""
        return pa.Table.from_batches(self._batches("failures", []), self.source.schemas["failures"])

    def vectors(
        self, level: Literal["clip", "video"] = "video", column: str = "embedding"
    ) -> tuple[list[str], FLOAT32]:
        """The video_id of each row and its vector, as (N texts, float32 [N, D]). All of it is in memory.

        `column` is "embedding", the one of a further pooling such as "embedding_max", or "probs" ([N, K]). Of several
        outputs the rows come one output after the other, and an id may be in more than one: `clips` and `videos` say
        which output a row is from.
        """
        folder = {"clip": "clips", "video": "videos"}.get(level)
        if folder is None:
            raise InputError(f"level must be clip or video, not {level!r}")
        ids, parts = list[str](), [np.empty((0, self._width(folder, column)), np.float32)]
        for batch in self._batches(folder, ["video_id", column]):
            ids += batch["video_id"].to_pylist()
            parts.append(schema.features_of(batch[column], parts[0].shape[1]))
        return ids, np.concatenate(parts)

    def _width(self, folder: str, column: str) -> int:
        field = self._schema(folder, [column]).field(column)
        if not pa.types.is_fixed_size_list(field.type):
            raise InputError(f"column {column!r} of {folder}/ does not hold vectors")
        return int(field.type.list_size)

    def _schema(self, folder: str, columns: Sequence[str]) -> pa.Schema:
        known = self.source.schemas[folder]
        if unknown := sorted(set(columns) - set(known.names)):
            raise InputError(f"{folder}/ has no column {unknown[0]!r}; it has {', '.join(known.names)}")
        return known

    def _batches(self, folder: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if folder == "clips" and not self.source.with_clips:
            raise InputError(f"{self.out} is a snapshot without clips")
        names = list(columns or self._schema(folder, columns).names)

        def rows() -> Iterator[pa.RecordBatch]:
            for name, table in self.source.rows(clips=folder == "clips"):
                if name == folder:
                    yield from table.select(names).to_batches(max_chunksize=schema.ROW_GROUP_ROWS)

        self._schema(folder, columns)
        return rows()
