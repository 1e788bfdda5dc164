"""What a sound shard is: every rule for its three files, from their footers alone or from all of their rows.

`verify` counts the problems of a shard, and a reader of its rows stops at the first. Rows are checked as they are read,
so both get the very bytes that were checked. Memory holds one row group, and the pooled rows of the shard.

Legend: R clip rows of a row group, V videos of the shard, N rows of a table.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import Pooling, clips_key, derived, failures_key, videos_key
from p3d.pipeline.dataset.files import UNREADABLE, check, local_path, sha256_of
from p3d.pipeline.dataset.outcomes import Outcomes, parse
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.errors import StoreMissing
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.local import writing
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import FLOAT32, INT64, ShardPlan, shard_name

Kind = Literal["lost", "duplicated", "unexpected", "changed", "underived"]
Footer = tuple[pq.ParquetFile, int] | Exception  # a file of which the footer alone is read, and its bytes; or the error


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that a shard breaks: its class and number in `verify`, the key of the file, and what is wrong with it.

    "underived" is a videos or failures file that is missing, as after a kill. `verify` does not count it as damage.
    """

    kind: Kind
    count: int
    key: str
    text: str


def name_of(manifest: Manifest, at: int) -> str:
    """The name of a shard, which costs less than the shard itself."""
    return shard_name(manifest.plan.plan8, at)


def keys_of(name: str) -> tuple[str, str, str]:
    """The keys of a shard's clips, videos and failures files."""
    return clips_key(name), videos_key(name), failures_key(name)


def lost_clips(name: str, n_videos: int, found: Container[str]) -> Problem | None:
    """The problem of a shard whose clips file is not in `found`, although files that were made from it are."""
    clips, *others = keys_of(name)
    made = [key for key in others if key in found and clips not in found]
    return Problem("lost", n_videos, clips, f"is gone, but {' and '.join(made)} were made from it") if made else None


def read_footer(store: Store, key: str) -> Footer:
    """The footer of a data file. Errors of the store other than StoreMissing are raised."""
    try:
        with store.open(key) as content, schema.open_parquet(content) as file:
            return file, content.seek(0, io.SEEK_END)
    except (StoreMissing, *UNREADABLE) as error:
        return error


@dataclass(slots=True)
class ShardCheck:
    """The check of shard `at` of a plan, by `footers` or by `rows`.

    `problems` is what was found; `refuse` gets each at once, and may raise to end the check. `outcomes` with their
    numbers of clips `n_V`, `stats`, `n_clips` and `source` (the size, and the sha256 if known) are those of the clips
    file; there are no outcomes if it cannot be read. `confirmed` says of each derived file that can be read whether it
    was made from these clips.
    """

    manifest: Manifest
    at: int
    recipe: Recipe
    refuse: Callable[[Problem], None] | None = None
    problems: list[Problem] = field(default_factory=list)
    outcomes: Outcomes | None = None
    n_V: INT64 = field(default_factory=lambda: np.empty(0, np.int64))
    stats: dict[str, Any] = field(default_factory=dict)
    n_clips: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    confirmed: list[bool] = field(default_factory=list)
    name: str = field(init=False)
    n_videos: int = field(init=False)
    _columns: dict[str, pa.Schema] = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.n_videos = name_of(self.manifest, self.at), self.manifest.n_videos(self.at)
        self._columns = schema.schemas_of(self.recipe, self.manifest.own_fields)

    def footers(self, read: dict[str, Footer]) -> None:
        """Check the footers of the three files by key, and the size of the clips file."""
        clips, *others = keys_of(self.name)
        with self._reading(clips):
            self._check_clips(*_readable(read[clips]))
            for key in others:
                with self._reading(key):
                    self._check_derived(key, _readable(read[key])[0])

    def rows(self, store: Store, *, clips: bool, again: Path | None = None) -> Iterator[tuple[str, pa.Table, INT64]]:
        """Sound rows with their folder, and the position in the shard of the video of each row, [N].

        With `clips`, every page of the three files is read and the pooled rows are computed again. Without it, only
        the footer of the clips file is read. With `again`, the path of a temporary file, derived files of this version
        of Arrow must be the same to the byte as what the clips give.
        """
        key, vectors, files = clips_key(self.name), None, list[tuple[str, pa.Table, dict[str, str]]]()
        with self._reading(key):
            if not clips:
                self._check_clips(*_readable(read_footer(store, key)))
            else:
                with local_path(store, key) as path, schema.open_parquet(path) as file:
                    self._check_clips(file, path.stat().st_size, sha256_of(path))
                    vectors = yield from self._clip_rows(file)
            if not self.problems and self.outcomes is not None:
                own = self.manifest.user_columns(self.at)
                files = derived(self._place, self.source, self.outcomes, vectors, self.recipe, own)
        for key, made, footer in files:
            with self._reading(key):
                held = store.read(key)
                with schema.open_parquet(pa.BufferReader(held)) as file:
                    writer = self._check_derived(key, file)
                    table = file.read(use_threads=False).combine_chunks()
                _check_values(table.select(made.column_names), made)
                if again is not None and writer == pa.cpp_version:
                    with writing(again):
                        schema.write_parquet(again, made, footer)
                    check(again.read_bytes() == held, "it does not hold what its clips give, to the byte")
                yield key.partition("/")[0], table, self._videos_of(key)

    @property
    def _place(self) -> ShardPlan:
        """The shard without its videos."""
        return ShardPlan(self.manifest.plan.seq, self.manifest.plan.plan8, self.at, ())

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """Turn an error of reading a file into a problem. If it is the clips file, nothing in it is counted."""
        try:
            yield
        except (StoreMissing, *UNREADABLE) as error:
            missing, clips = isinstance(error, StoreMissing), key.startswith("clips/")
            kind: Kind = "changed" if not missing else "lost" if clips else "underived"
            count = self.n_videos if clips else 1 if missing else len(self._videos_of(key)) or 1
            self.outcomes = None if clips else self.outcomes
            self._found(kind, count, "is missing" if missing else f"is damaged: {error}", key)

    def _found(self, kind: Kind, count: int, text: str, key: str = "") -> None:
        self.problems.append(Problem(kind, count, key or clips_key(self.name), text))
        if self.refuse is not None:
            self.refuse(self.problems[-1])

    def _found_some(self, rule: str, otherwise: int, counts: Iterable[tuple[Kind, int, str]] = ()) -> None:
        """A rule that the clips file breaks: how many videos or rows of each kind, or else how many have changed."""
        kinds = [(kind, count, f"; {what}") for kind, count, what in counts if count]
        for kind, count, what in kinds or [("changed", otherwise, "")]:
            self._found(kind, count, f"is damaged: {rule}{what}")

    def _check_clips(self, file: pq.ParquetFile, size_bytes: int, sha256: str | None = None) -> None:
        """I1: check the footer of a clips file, whose rows are read if its sha256 is given.

        ValueError if nothing in it can be used.
        """
        footer = schema.read_footer(file)
        outcomes = parse(footer[schema.OUTCOMES_KEY], self.recipe.schema_version)
        stats = json.loads(footer[schema.STATS_KEY])
        self._check_columns("clips/", file)
        n_V, failed = np.array(outcomes.n_clips, np.int64), [failure is not None for failure in outcomes.failures]
        check(np.array_equal(n_V == 0, failed), "the outcome of a video is impossible")
        check(isinstance(stats, dict) and isinstance(stats.get("software", {}), dict), "its stats are not a record")
        self.outcomes, self.n_V, self.stats, self.n_clips = outcomes, n_V, stats, file.metadata.num_rows
        self.source = ({"sha256": sha256} if sha256 else {}) | {"size_bytes": size_bytes}
        planned = self.manifest.rows(self.at)
        if not outcomes.are_of(planned):
            ids = set(planned["video_id"].to_pylist())
            held = Counter(video["video_id"] for video in outcomes.videos)
            kinds: dict[Kind, set[str]] = {"lost": ids - held.keys(), "unexpected": held.keys() - ids}
            kinds["duplicated"] = {one for one, n in held.items() if n > 1}
            counts = [(kind, len(ids), f"{kind}: {len(ids)}, such as {min(ids)}") for kind, ids in kinds.items() if ids]
            self._found_some("the videos of its outcomes are not those of its plan", len(outcomes), counts)
        elif json.loads(footer[schema.SHARD_KEY]) != schema.shard_record(self._place):
            self._found_some("its footer names another shard", len(outcomes))
        if not sha256 and self.n_clips != (n_clips := int(n_V.sum())):
            self._found_some(f"it has {self.n_clips} rows, and its outcomes {n_clips} clips", self.n_videos)

    def _clip_rows(self, file: pq.ParquetFile) -> Generator[tuple[str, pa.Table, INT64], None, list[FLOAT32]]:
        """The rows of a clips file, until the first problem. Returns the pooled vectors of the videos."""
        assert self.outcomes is not None, "those of this very file"
        ids_V, paths_V = (
            np.array([video[name] for video in self.outcomes.videos], object) for name in ("video_id", "path")
        )
        first_V = np.cumsum([0, *self.n_V])
        pooling, first, possible, same = Pooling(self.n_V, self.recipe), 0, True, self.n_clips == first_V[-1]
        if not same:
            self._count_rows(file)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            table.validate(full=True)  # of text that is not UTF-8
            row_R = np.arange(first, first + table.num_rows)
            video_R, first = np.searchsorted(first_V[1:], row_R, side="right"), first + table.num_rows
            if same:
                same = table["video_id"].to_pylist() == ids_V[video_R].tolist()
                same &= table["path"].to_pylist() == paths_V[video_R].tolist()
                same &= np.array_equal(table["clip_index"].to_numpy(), row_R - first_V[video_R])
                same &= bool((table["plan_seq"].to_numpy() == self.manifest.plan.seq).all())
                if not same:
                    self._count_rows(file)
            features_RD = schema.features_of(table["embedding"], self.recipe.feature_dim)
            probs_RK = schema.probs_of(table, self.recipe.n_scores)
            if possible and not _possible(table, video_R, features_RD, probs_RK, self.recipe.clip_frames):
                possible = False
                self._found_some(f"rows {first - len(row_R)} to {first} hold impossible values", 1)
            if not self.problems:
                pooling.add(features_RD, probs_RK)
                yield "clips", table, video_R
        check(first == self.n_clips, "its row groups have other rows than its footer says")
        return pooling.vectors

    def _count_rows(self, file: pq.ParquetFile) -> None:
        """I2: count how the rows of a clips file differ from clips 0 .. n - 1 of each video, each once and in order."""
        table = file.read(columns=["video_id", "clip_index"], use_threads=False)
        rows = set(zip(table["video_id"].to_pylist(), table["clip_index"].to_pylist(), strict=True))
        assert self.outcomes is not None, "those of this very file"
        planned = {video["video_id"]: n for video, n in zip(self.outcomes.videos, self.n_V.tolist(), strict=True)}
        known = {(video, at) for video, at in rows if 0 <= at < planned.get(video, 0)}
        held, more = Counter(video for video, _ in known), {video for video, _ in rows - known}
        lost, twice = {video for video, n in planned.items() if held[video] < n}, table.num_rows - len(rows)
        counts: list[tuple[Kind, int, str]] = [("duplicated", twice, f"duplicated rows: {twice}")]
        counts.append(("lost", len(lost), f"videos with lost rows: {len(lost)}"))
        counts.append(("unexpected", len(more), f"videos with unexpected rows: {len(more)}"))
        self._found_some("its rows are not those of its outcomes", 1, counts)

    def _check_derived(self, key: str, file: pq.ParquetFile) -> Any:
        """I5: check the footer of a derived file. Returns the version of Arrow that wrote it. ValueError."""
        stated = json.loads(schema.read_footer(file)[schema.SOURCE_KEY])
        writer, n_rows = stated["writer"], len(self._videos_of(key))
        self.confirmed.append(stated == {"sha256": stated["sha256"], **self.source, "writer": writer})
        check(self.confirmed[-1], "it was made from other clips than those that are stored now")
        self._check_columns(key, file)
        check(file.metadata.num_rows == n_rows, f"it does not hold what its clips give, which is {n_rows} rows")
        check(file.metadata.created_by.endswith(f" {writer}"), "it was written by other software than it says")
        return writer

    def _check_columns(self, key: str, file: pq.ParquetFile) -> None:
        columns = self._columns[key.partition("/")[0]]
        check(file.schema_arrow.equals(columns), "it has other columns than this job writes")

    def _videos_of(self, key: str) -> INT64:
        """The positions in the shard of the videos that have a row in a derived file."""
        found_N: INT64 = np.flatnonzero((self.n_V == 0) == key.startswith("failures/"))
        return found_N


def _readable(footer: Footer) -> tuple[pq.ParquetFile, int]:
    if isinstance(footer, Exception):
        raise footer
    return footer


def _possible(table: pa.Table, video_R: INT64, features_RD: FLOAT32, probs_RK: FLOAT32, clip_frames: int) -> bool:
    """I6: whether all vectors of clip rows can be used, and the times of all clips are possible.

    Clips start at 0 or later and end after they start. None starts before the previous one of its video.
    """
    usable = np.isfinite(features_RD).all() and (features_RD != 0).any(axis=1).all()
    usable = usable and schema.sound_probs(probs_RK).all()
    for start, end in (("start_frame", "end_frame"), ("start_s", "end_s")):
        usable = (
            usable and (table[start].to_numpy() < table[end].to_numpy()).all() and (table[start].to_numpy() >= 0).all()
        )
    same_video, step = np.diff(video_R) == 0, np.diff(table["start_frame"].to_numpy())
    usable = usable and not (same_video & (step < 0)).any()
    n_padded_R = table["n_padded"].to_numpy()
    return bool(usable and (n_padded_R >= 0).all() and (n_padded_R < clip_frames).all())


def _check_values(held: pa.Table, made: pa.Table) -> None:
    """ValueError, which names the column, unless both hold the same. Unlike in Arrow, NaN is then the same as NaN."""
    for name in made.column_names if not held.equals(made) else ():
        one, other = held.select([name]), made.select([name])
        same = one.equals(other) or repr(schema.records(one)) == repr(schema.records(other))
        check(same, f"its column {name} does not hold what its clips give")
