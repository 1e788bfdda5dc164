"""Which newest clips are drawn for `recompute`, and their rows, read from the shards that have drawn ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.clips.draw import numbers_drawn
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import clips_key
from p3d.pipeline.dataset.files import reading
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.types import INT64, VideoRef

READERS, AHEAD = 16, 1024  # threads that read footers, and footers that are read or wait to be read
# videos that share a child process, and the bytes of their rows, which are in memory until all are compared
GROUP, GROUP_BYTES = 64, 256 << 20


def rows_drawn(seed: int, n_drawn: int, n_rows: int) -> INT64:
    """The numbers of the drawn rows among all newest clips in order, sorted. All if there are no more."""
    return np.array(numbers_drawn(f"rows {seed}", n_drawn, n_rows), np.int64)


def rows_per_shard(source: NewestRows) -> dict[str, int]:
    """The number of newest clips in each finished shard, in order, from footers; DamagedJob."""
    if not source.superseded:  # every row is a newest one
        counts, names = dict[str, int](), iter(source.pieces)
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(islice(names, AHEAD)):
                counts.update(zip(some, pool.map(lambda name: _footer(source, name)[0], some), strict=True))
        return counts
    tables = (table for folder, table in source.rows(clips=False) if folder == "videos")  # one of each shard
    return {name: int(table["n_clips"].to_numpy().sum()) for name, table in zip(source.pieces, tables, strict=True)}


def _footer(source: NewestRows, name: str) -> tuple[int, dict[str, str]]:
    """The number of rows of a shard's clips file, and the records of its footer."""
    key = clips_key(name)
    remedy = f"`p3d verify {source.store.words()} --repair` repairs what can be repaired"
    with (
        reading(source.store, key, remedy),
        source.store.open(key) as content,
        schema.open_parquet(content) as file,
    ):
        return file.metadata.num_rows, schema.read_footer(file)


def stats_of(source: NewestRows, name: str) -> dict[str, Any]:
    try:
        stats = json.loads(_footer(source, name)[1].get(schema.STATS_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return stats if isinstance(stats, dict) else {}


@dataclass(slots=True)
class Drawn:
    """A video with drawn clips: its shard, its clip rows, the positions among them that were drawn, and where it is.

    `stats` are those of the shard's footer.
    """

    shard: str
    stats: dict[str, Any]
    rows: pa.Table
    wanted: list[int]
    video: VideoRef | None = None

    @property
    def video_id(self) -> str:
        return str(self.rows["video_id"][0].as_py())

    @property
    def path(self) -> str:
        return str(self.rows["path"][0].as_py())

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the encoder needs to know."""
        return tuple(map(str, (self.stats.get(name) for name in ("device", "batch_size", "threads"))))


def groups_of(drawn: Iterator[Drawn]) -> Iterator[list[Drawn]]:
    """Videos that are computed together, in order: their shards were made with the same settings."""
    group, n_bytes = list[Drawn](), 0
    for one in drawn:
        if group and (len(group) == GROUP or n_bytes > GROUP_BYTES or one.settings != group[0].settings):
            yield group
            group, n_bytes = [], 0
        group.append(one)
        n_bytes += one.rows.nbytes
    if group:
        yield group


def drawn_videos(source: NewestRows, counts: dict[str, int], numbers: INT64) -> Iterator[Drawn]:
    """The videos with drawn rows. `numbers` count all newest clips."""
    ends = np.cumsum([0, *counts.values()])
    edges = pairwise(np.searchsorted(numbers, ends).tolist())
    drawn = {
        name: numbers[begin:end] - first
        for name, first, (begin, end) in zip(counts, ends[:-1].tolist(), edges, strict=True)
        if begin < end
    }
    nothing, shards, shard = frozenset(counts.keys() - drawn.keys()), iter(drawn), ""
    first, held, found = 0, list[pa.Table](), list[Drawn]()
    for folder, table in source.rows(skip=nothing):
        if folder == "failures":
            continue
        if not shard:  # the next one begins, with a table of clips, as some are drawn
            shard = next(shards)
            stats = stats_of(source, shard)
        for rows in _by_video(held, table if folder == "clips" else None):
            inside = drawn[shard][slice(*np.searchsorted(drawn[shard], (first, first + rows.num_rows)))] - first
            first += rows.num_rows
            if len(inside):  # copied, because a slice would keep its whole row group in memory
                found.append(Drawn(shard, stats, rows.take(np.arange(rows.num_rows)), inside.tolist()))
        if folder == "videos":
            _place(source, found, table)
            yield from found
            first, shard, found = 0, "", []


def _by_video(held: list[pa.Table], table: pa.Table | None) -> Iterator[pa.Table]:
    """The rows of each video that is complete: all but the last one of `table`, and that one if `table` is None.

    `held` has rows of a video that more rows may follow, in another row group.
    """
    tables = [*held, *([] if table is None else [table])]
    held.clear()
    if not tables:
        return
    rows = pa.concat_tables(tables)
    ids = rows["video_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    for start, end in pairwise(edges):
        if end == len(ids) and table is not None:
            held.append(rows.slice(start))
        else:
            yield rows.slice(start, end - start)


def _place(source: NewestRows, found: list[Drawn], videos: pa.Table) -> None:
    """Set where each video is, from the rows of videos/."""
    names = ("path", "uri", "version")
    columns = {name: videos[name] for name in names}
    at = {video_id: at for at, video_id in enumerate(videos["video_id"].to_pylist())}
    for one in found:
        path, uri, version = (columns[name][at[one.video_id]].as_py() for name in names)
        one.video = source.place(VideoRef(one.video_id, path, uri, version, size_bytes=0))
