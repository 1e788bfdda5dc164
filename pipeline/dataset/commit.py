"""The whole commit protocol: one shard, one object, created once.

The clips file *is* the commit: a complete Parquet object created only if absent. Its existence says that the shard is
done, so there is no marker that could disagree with the data. The videos and failures files are pure functions of it:
any process may make them, any number of times.

    rows ──check──> temp file ──create──> created            derive from the very file that was accepted
                                          exists             adopt: derive from the stored object, discard ours
                                          unknown, then HEAD exists: adopt · absent: retry, bounded · else CommitUnknown
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.clips.pool import means_of_probs, pool_each
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.files import UNREADABLE
from p3d.pipeline.dataset.outcomes import Outcomes, parse
from p3d.pipeline.errors import DamagedJob, InputError, StoreUnknown, StrayFile
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import CREATED, ObjectInfo, Store
from p3d.pipeline.types import FLOAT32, ShardPlan, ShardRows, VideoOutcome

CREATE_TRIES = 4  # attempts if the response to a create is lost
PAUSE_S = 0.5  # before the second try; doubles


class CommitUnknown(StoreUnknown):
    """The store did not report whether the shard is committed. The shard stays open, and a resume checks again."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What the store now holds for a shard. `adopted` if another process committed the shard first."""

    adopted: bool
    n_clips: int
    size_bytes: int
    outcomes: tuple[VideoOutcome, ...]

    @property
    def failures(self) -> Counter[str]:
        """Failed videos by reason."""
        return Counter(str(outcome.failure.reason) for outcome in self.outcomes if outcome.failure)


def clips_key(name: str) -> str:
    return f"clips/{name}.parquet"


def videos_key(name: str) -> str:
    return f"videos/{name}.parquet"


def failures_key(name: str) -> str:
    return f"failures/{name}.parquet"


def commit_shard(store: Store, rows: ShardRows, recipe: Recipe, user_columns: pa.Table) -> Committed:
    """Make the shard's rows durable and visible, once. Idempotent. CommitUnknown if the store does not answer."""
    schema.check_rows(rows, recipe.feature_dim, recipe.clip_frames, recipe.n_scores)
    with store.temp_file() as path:
        _write_clips(path, rows, recipe)
        created = _create(store, clips_key(rows.shard.name), path)
        return derive(store, rows.shard, recipe, user_columns, clips=path if created else None)


def derive(
    store: Store, shard: ShardPlan, recipe: Recipe, user_columns: pa.Table, *, clips: Path | None = None
) -> Committed:
    """Create the videos and failures files of a committed shard, from its clips file and its manifest rows alone.

    `clips` is a local copy of the bytes that the store accepted; without it the stored object is read back.
    `user_columns` are from the shard's manifest rows, which never change: `video_id` and the user's own columns.
    """
    content = clips.read_bytes() if clips is not None else store.read(clips_key(shard.name))
    with _reading(shard.name):
        file = schema.open_parquet(io.BytesIO(content))
        outcomes = parse(schema.read_footer(file)[schema.OUTCOMES_KEY], recipe.schema_version)
        columns = ["embedding", "probs"] if recipe.scores else ["embedding"]
        table = file.read(columns=columns, use_threads=False)
        features_RD = schema.features_of(table["embedding"], recipe.feature_dim)
        pooling = Pooling(outcomes.n_clips, recipe)
        pooling.add(features_RD, schema.probs_of(table, recipe.n_scores))
        source = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        files = derived(shard, source, outcomes, pooling.vectors, recipe, user_columns)
    for key, rows, footer in files:
        with store.temp_file() as path:
            schema.write_parquet(path, rows, footer)
            _create(store, key, path)
    return Committed(clips is None, len(features_RD), len(content), outcomes.each)


def derived(
    shard: ShardPlan,
    source: dict[str, Any],
    outcomes: Outcomes,
    vectors: list[FLOAT32] | None,
    recipe: Recipe,
    user_columns: pa.Table,
) -> list[tuple[str, pa.Table, dict[str, str]]]:
    """(key, rows, footer) of the two files derived from a clips file, which has this sha256, size and outcomes.

    The rows of videos/ are the pooled stored clips, bit for bit (invariant I5). `vectors` are those of the videos
    that have clips, as `Pooling` gives them. Without them their columns are absent.
    """
    columns = schema.videos_schema(recipe)
    known = outcomes.video_columns(shard.plan_seq)
    kinds = [one.type for one in columns if pa.types.is_fixed_size_list(one.type)]
    for kind, rows_VW in zip(kinds, vectors, strict=True) if vectors is not None else ():
        known.append(schema.vector_array(rows_VW.reshape(-1, kind.list_size), kind))
    videos = pa.table(known, schema=pa.schema(list(columns)[: len(known)]))
    own = user_columns.filter(pa.array([failure is None for failure in outcomes.failures], pa.bool_()))
    for name in own.column_names:
        if name != "video_id":
            videos = videos.append_column(own.schema.field(name), own[name])
    failures = outcomes.failures_table(shard.plan_seq)
    footer = _footer(shard) | {schema.SOURCE_KEY: json.dumps(source | {"writer": pa.cpp_version})}
    return [(videos_key(shard.name), videos, footer), (failures_key(shard.name), failures, footer)]


class Pooling:
    """Pools each video's clips as they are read, in order; the clips of one video may arrive in several pieces.

    `vectors` are those of the videos whose clips have all arrived, [V, W], in the order of their columns in videos/.
    """

    def __init__(self, n_clips: Iterable[int], recipe: Recipe) -> None:
        self._recipe, self._n_rows, self._n_pooled = recipe, 0, 0
        self._ends = np.cumsum([n for n in n_clips if n], dtype=np.int64)  # of the videos' rows
        self._pieces = list[tuple[FLOAT32, FLOAT32]]()  # of a video that has begun
        self._pooled = list[list[FLOAT32]]()

    @property
    def vectors(self) -> list[FLOAT32]:
        n_columns = len(self._recipe.pool.split("+")) + self._recipe.scores
        none = [np.empty(0, np.float32)] * n_columns
        return [np.concatenate(parts) for parts in zip(*(self._pooled or [none]), strict=True)]

    def add(self, features_RD: FLOAT32, probs_RK: FLOAT32) -> None:
        """Add the next rows. IndexError if the outcomes have no more."""
        first, self._n_rows = self._n_rows, self._n_rows + len(features_RD)
        if self._n_rows > (self._ends[-1] if len(self._ends) else 0):
            raise IndexError("there are more rows than its outcomes have")
        at = 0
        if self._pieces:  # the rest of a video that has begun
            at = min(int(self._ends[self._n_pooled]) - first, len(features_RD))
            self._pieces.append((features_RD[:at], probs_RK[:at]))
            if first + at < self._ends[self._n_pooled]:
                return
            features_ND, probs_NK = (np.concatenate(pieces) for pieces in zip(*self._pieces, strict=True))
            self._pool(features_ND, probs_NK, 1)
            self._pieces = []
        n_whole = int(np.searchsorted(self._ends, self._n_rows, side="right")) - self._n_pooled
        if n_whole:
            end = int(self._ends[self._n_pooled + n_whole - 1]) - first
            self._pool(features_RD[at:end], probs_RK[at:end], n_whole)
            at = end
        if at < len(features_RD):
            self._pieces = [(features_RD[at:], probs_RK[at:])]

    def _pool(self, features_ND: FLOAT32, probs_NK: FLOAT32, n_videos: int) -> None:
        """Pool the rows of the next videos."""
        ends = self._ends[self._n_pooled : self._n_pooled + n_videos]
        n_V = np.diff(ends, prepend=self._ends[self._n_pooled - 1] if self._n_pooled else 0)
        vectors = pool_each(features_ND, n_V, self._recipe.pool)
        self._pooled.append([*vectors, means_of_probs(probs_NK, n_V)] if self._recipe.scores else vectors)
        self._n_pooled += n_videos


def _write_clips(path: Path, rows: ShardRows, recipe: Recipe) -> None:
    """Write the commit object, and read it back before any other process can see it."""
    table = schema.clips_table(rows, recipe)
    footer = _footer(rows.shard) | {
        schema.OUTCOMES_KEY: schema.outcomes_json(rows.outcomes, recipe.schema_version),
        schema.STATS_KEY: json.dumps(rows.stats),
    }
    schema.write_parquet(path, table, footer)
    if path.stat().st_size > schema.MAX_OBJECT_BYTES:
        raise InputError(
            f"shard {rows.shard.name} would be one object of {path.stat().st_size / 1024**3:.1f} GiB (at most 4); "
            "launch at a new output with a smaller --shard-videos, a larger --clips stride or --embedding-dtype float16"
        )
    with schema.open_parquet(path) as file:
        if file.metadata.num_rows != table.num_rows or not footer.items() <= schema.read_footer(file).items():
            raise StoreUnknown(f"{path}: the shard that was written does not read back; is the disk failing?")


def _footer(shard: ShardPlan) -> dict[str, str]:
    return {schema.SHARD_KEY: json.dumps(schema.shard_record(shard))}


def _create(store: Store, key: str, path: Path) -> bool:
    """Create as in the diagram above. True if this file was accepted, False if the key already exists."""
    for attempt in range(CREATE_TRIES):
        try:
            return store.create(key, path) == CREATED
        except StoreUnknown:
            with contextlib.suppress(StoreUnknown):
                if store.head(key) is not None:
                    return False
            time.sleep(PAUSE_S * 2**attempt)
    raise CommitUnknown(f"{store.url}/{key}: the store did not say whether it took the shard; resume to look again")


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise DamagedJob(f"clips/{name}.parquet is damaged ({error}); run verify") from None


def read_committed(store: Store, name: str, version: int) -> Committed:
    """The outcomes and sizes of a committed shard, from its footer in a schema version. StoreMissing."""
    with _reading(name), store.open(clips_key(name)) as content, schema.open_parquet(content) as file:
        outcomes = schema.parse_outcomes(schema.read_footer(file)[schema.OUTCOMES_KEY], version)
        return Committed(True, file.metadata.num_rows, content.seek(0, io.SEEK_END), outcomes)


def committed_names(store: Store) -> tuple[set[str], set[str]]:
    """Names of the committed shards, and of those whose derived files exist too."""
    return stored_names(store)[:2]


def data_files(store: Store, folder: str) -> Iterator[ObjectInfo]:
    """The Parquet files below a folder such as `clips/`. No reader reads other files there: they are named once."""
    for info in store.list(folder):
        if info.key.endswith(".parquet"):
            yield info
        else:
            warnings.warn(f"{store.url}/{info.key} is not a Parquet file and is skipped", StrayFile, stacklevel=2)


def stored_names(store: Store) -> tuple[set[str], set[str], set[str]]:
    """As `committed_names`, and names of shards that have lost their clips file: only files made from it exist.

    Derived files are listed first. So a shard that is committed meanwhile may lack them here, but never its clips file.
    """
    videos, failures, clips = (
        {info.key.removeprefix(folder).removesuffix(".parquet") for info in data_files(store, folder)}
        for folder in ("videos/", "failures/", "clips/")
    )
    return clips, clips & videos & failures, (videos | failures) - clips
