"""Rows that are read ahead, checked by columns and compared in groups are those of one shard and video at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.pipeline.clips.pool import pool_each
from p3d.pipeline.dataset import outcomes as by_columns
from p3d.pipeline.dataset import read_ahead as ahead
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import Pooling
from p3d.pipeline.dataset.finding import shards_with
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.results.search.exact import nearest
from p3d.pipeline.storage.local import LocalStore
from tests.pipeline.rows import DIM, planned, recipe, shard_rows, videos
from tests.pipeline.test_snapshot import add_plan, newest


def tables(shard: int, n: int) -> Iterator[tuple[str, pa.Table]]:
    for at in range(n):
        yield f"{shard}", pa.table({"at": np.full(1000, at)})


@pytest.mark.parametrize("batch_rows", [1, 2500, 10**9])
def test_tables_come_in_order(monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    """Whatever a batch holds and however many threads read: each shard's tables, in order."""
    monkeypatch.setattr(ahead, "BATCH_ROWS", batch_rows)
    sizes = [3, 0, 7, 1, 0, 0, 12, 2]
    for threads in (1, 2, 5):
        read = ahead.read_ahead((tables(shard, n) for shard, n in enumerate(sizes)), threads)
        found = [[(name, table["at"][0].as_py()) for name, table in shard] for shard in read]
        assert found == [[(f"{shard}", at) for at in range(n)] for shard, n in enumerate(sizes)]


def test_an_error_comes_in_its_place_and_nothing_reads_on() -> None:
    """The tables before a damaged shard arrive, then its error; no thread is left, also if the caller stops."""

    def damaged() -> Iterator[tuple[str, pa.Table]]:
        raise DamagedJob("this one")
        yield

    read = ahead.read_ahead(iter([tables(0, 2), damaged(), tables(2, 1)]), 3)
    assert len(list(next(read))) == 2
    with pytest.raises(DamagedJob, match="this one"):
        list(next(read))
    read.close()
    some = ahead.read_ahead((tables(0, 5) for _ in range(50)), 3)
    next(some)
    some.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("read")]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(1, 7)), st.integers(0, 99))
def test_pooled_in_pieces_is_pooled_one_by_one(counts: list[int], cuts: list[int], seed: int) -> None:
    """For any numbers of clips and any pieces: bit for bit the sums of one clip after another."""
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((sum(counts), DIM)) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    probs = rng.random((sum(counts), 3)).astype(np.float32)
    pooling, at = Pooling(counts, recipe(pool="mean+max", scores=True)), 0
    for cut in [*cuts, sum(counts)]:
        pooling.add(features[at : at + cut], probs[at : at + cut])
        at = min(at + cut, sum(counts))
    means, tops, scores = pooling.vectors
    first, row = 0, 0
    for n in counts:
        mine, first = slice(first, first + n), first + n
        if not n:
            continue
        total, of_probs = np.zeros(DIM, np.float32), np.zeros(3, np.float64)
        for vector, prob in zip(features[mine], probs[mine], strict=True):
            total += vector
            of_probs += prob
        assert means[row].tobytes() == (total / np.float32(n)).tobytes()
        assert tops[row].tobytes() == features[mine].max(axis=0).tobytes()
        assert scores[row].tobytes() == (of_probs / n).astype(np.float32).tobytes()
        row += 1
    assert row == len(means) if row else means.size == 0
    with pytest.raises(IndexError):
        pooling.add(features[:1], probs[:1]) if len(features) else pooling.add(np.ones((1, DIM), np.float32), probs)


def test_pooling_needs_clips() -> None:
    """A video without clips has no vector."""
    with pytest.raises(ValueError, match="without clips"):
        pool_each(np.ones((1, DIM), np.float32), np.array([1, 0]), "mean")


def test_columns_of_outcomes_are_those_of_their_records(tmp_path: Path) -> None:
    """Outcomes from records and from JSON give the same rows as one record after the other."""
    manifest = planned(LocalStore(str(tmp_path / "out")), "abcd")
    each = tuple(
        replace(one, end=replace(one.end, n_frames=one.end.n_frames - 1, duration_s=0.1)) if one.end else one
        for one in shard_rows(manifest, 0).outcomes
    )  # the truth differs from what the container declares
    parsed = by_columns.parse(schema.outcomes_json(each, 1), 1)
    assert parsed.each == each and len(parsed) == 4 and parsed.are_of(manifest.rows(0))
    assert json.loads(json.dumps(asdict(parsed))) == json.loads(json.dumps(asdict(by_columns.Outcomes.of(each, 1))))
    fields = schema.videos_schema(recipe()).names[:-1]
    rows = pa.table(dict(zip(fields, parsed.video_columns(3), strict=True))).to_pylist()
    for row, one in zip(rows, (one for one in each if one.info), strict=True):
        assert one.info and one.end
        merged = {**asdict(one.video), **asdict(one.info), **asdict(one.end), "n_clips": one.n_clips, "plan_seq": 3}
        assert row == {name: merged[name] for name in fields}
    (failed,) = parsed.failures_table(3).to_pylist()
    (one,) = (one for one in each if one.failure)
    assert failed["detail"] == "ends early" and failed["reason"] == "truncated" and failed["path"] == one.video.path


@pytest.mark.parametrize("name", ["video_id", "path", "uri", "version", "size_bytes", "mtime_ns", "etag"])
def test_outcomes_of_another_video_are_noticed(tmp_path: Path, name: str) -> None:
    """Each value of each video is compared with the plan, also one that no plan can have."""
    manifest = planned(LocalStore(str(tmp_path / "out")), "ab")
    records = json.loads(schema.outcomes_json(shard_rows(manifest, 0).outcomes, 1))
    for value in (7, 8) if name in ("size_bytes", "mtime_ns") else ("x", "\ud800"):
        records[1]["video"][name] = value
        assert not by_columns.parse(json.dumps(records), 1).are_of(manifest.rows(0))


def test_the_shards_of_some_videos(tmp_path: Path) -> None:
    """Exactly those that hold one of them; an id that no plan names is in none."""
    manifest = planned(LocalStore(str(tmp_path / "out")), "abcdefgh", shard_videos=2)
    for ids, shards in (("ch", {1, 3}), ("a", {0}), ("", set()), ("xyz", set()), ("cdx", {1})):
        assert shards_with(manifest, frozenset(ids)) == shards


def noted(opened: list[str], read: Callable[..., Any], *given: Any) -> Any:
    """Read a shard, and note its place."""
    opened.append(f"{given[0].plan.seq} {given[1]}")
    return read(*given)


@pytest.mark.parametrize("where", [["video_id=v03"], ["path=v03.mp4"], ["path=v03.mp4", "n_frames>=1"], ["path=none"]])
def test_a_condition_on_an_id_or_a_path_reads_only_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    """The hits are those of a search that reads all shards, and no file of another shard is opened."""
    out = LocalStore(str(tmp_path / "out"))
    for seq in (1, 2):
        add_plan(out, videos([f"v{at:02d}" for at in range(3 * seq, 9)]), seq=seq, shard_videos=2, frames=[40])
    source, query = newest(out), np.ones((1, DIM), np.float32)
    for level in ("clip", "video"):
        every = nearest(source, query, level=level, top=50).hits  # type: ignore[arg-type]
        slow = [hit for hit in every if hit.video_id == "v03" and where != ["path=none"]]
        opened: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(source, "_shard", partial(noted, opened, source._shard))
            fast = nearest(source, query, level=level, where=where, top=50)  # type: ignore[arg-type]
        assert [(hit.video_id, hit.clip_index, hit.score) for hit in fast.hits] == [
            (hit.video_id, hit.clip_index, hit.score) for hit in slow
        ]
        assert bool(fast.hits) == (where != ["path=none"]) and len(set(opened)) == bool(fast.hits)
