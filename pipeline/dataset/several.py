"""Several outputs of one recipe as one dataset: their rows one output after the other, each with the `out` it is from.

A large source is divided into several outputs (docs/explanation/scale.md). Ids are unique in one output only, so (out,
video_id) names a video. Each output is read, checked and trusted as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from p3d.pipeline.dataset.newest_rows import NewestRows, Rows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.dataset.user_columns import conform
from p3d.pipeline.errors import InputError, OtherRecipe, escape

OUT = "out"  # the column that says which output a row is from


def refuse_other_recipes(sources: Sequence[NewestRows | SnapshotRows]) -> None:
    """OtherRecipe, with the settings that differ, unless the rows of all sources are comparable."""
    newest = max(sources, key=lambda one: one.job.recipe.schema_version)
    for one in sources:
        origins = newest.job.weights_origin, one.job.weights_origin
        if differences := newest.job.recipe.differences(one.job.recipe, origins):
            raise OtherRecipe(
                f"the rows of {newest.store.url} are not comparable with those of {one.store.url}, which has other "
                f"settings: {differences}. Name outputs of one recipe"
            )


class SeveralRows:
    """The rows of several outputs, in the order of `sources`, with the column `out` before all others.

    A column of the user's own that an output lacks is null in its rows. OtherRecipe; InputError if such columns have
    different types.
    """

    def __init__(self, sources: Sequence[NewestRows | SnapshotRows]) -> None:
        refuse_other_recipes(sources)
        self.sources = tuple(sources)
        self.store, self.job = sources[0].store, sources[0].job
        self.with_clips = all(one.with_clips for one in sources)
        self.pending = sum(one.pending for one in sources)
        self.n_videos = sum(one.n_videos for one in sources)
        self.schemas = {folder: self._schema(folder) for folder in sources[0].schemas}

    def rows(self, *, clips: bool = True, on_step: Callable[[int, int], None] | None = None) -> Rows:
        """As of one output; `on_step` counts outputs."""
        for done, source in enumerate(self.sources):
            for folder, table in source.rows(clips=clips):
                name = escape(source.store.url)  # that of a folder may not be UTF-8
                out = pa.array([name], pa.string()).take(pa.array([0] * table.num_rows, pa.int64()))
                rows = conform(table, pa.schema(list(self.schemas[folder])[1:]))
                yield folder, rows.add_column(0, self.schemas[folder].field(OUT), out)
            if on_step is not None:
                on_step(done + 1, len(self.sources))

    def _schema(self, folder: str) -> pa.Schema:
        fields: dict[str, list[pa.Field]] = {}
        for source in self.sources:
            for field in source.schemas[folder]:
                fields.setdefault(field.name, []).append(field)
        if OUT in fields:
            raise InputError(f"your list has a column {OUT!r}, which several outputs need: open them one by one")
        for name, of_name in fields.items():
            if len(types := {str(one.type) for one in of_name}) > 1:
                raise InputError(
                    f"column {name!r} is {' and '.join(sorted(types))} in these outputs: open them one by one"
                )
        everywhere = len(self.sources)
        joined = [one[0].with_nullable(len(one) < everywhere or one[0].nullable) for one in fields.values()]
        return pa.schema([pa.field(OUT, pa.string(), nullable=False), *joined])
