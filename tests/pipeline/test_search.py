"""Exact search: brute force in float64 over the newest rows, whatever the plans, row groups, conditions and metric."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.jobs.api.search import resolve
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.errors import DamagedJob, InputError, as_stored
from p3d.pipeline.results.search import exact as search_module
from p3d.pipeline.results.search.exact import nearest
from p3d.pipeline.results.search.metrics import METRICS, cosines
from p3d.pipeline.results.search.query import position_s, split_position
from p3d.pipeline.results.search.where import parse
from p3d.pipeline.sources.identity import readable
from p3d.pipeline.storage.local import LocalStore
from tests.pipeline.rows import DIM, videos
from tests.pipeline.test_snapshot import add_plan, newest


def brute_force(
    out: LocalStore, queries_QD: np.ndarray, level: str, metric: str, keep: object
) -> list[tuple[float, str, int | None]]:
    """(score, video_id, clip_index) of every newest row that `keep` wants, the nearest first, from the files alone."""
    tables = {
        folder: [row for path in sorted((out.root / folder).iterdir()) for row in pq.read_table(path).to_pylist()]
        for folder in ("clips", "videos", "failures")
    }
    seq_of: dict[str, int] = {}
    for row in tables["videos"] + tables["failures"]:
        seq_of[row["video_id"]] = max(row["plan_seq"], seq_of.get(row["video_id"], 0))
    video_of = {row["video_id"]: row for row in tables["videos"] if seq_of[row["video_id"]] == row["plan_seq"]}
    found = []
    for row in tables[f"{level}s"]:
        if seq_of[row["video_id"]] != row["plan_seq"] or not keep({**video_of[row["video_id"]], **row}):  # type: ignore[operator]
            continue
        x, q = np.array(row["embedding"], np.float64), queries_QD.astype(np.float64)
        if metric == "cosine":
            score = (q @ x / np.linalg.norm(q, axis=1) / np.linalg.norm(x)).max()
        else:
            score = np.linalg.norm(q - x, axis=1).min()
        found.append((float(score), row["video_id"], row.get("clip_index")))
    return sorted(found, key=lambda one: -one[0] if metric == "cosine" else one[0])


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """For any plans, shards, row groups, queries, level, metric and conditions, of a job and of its snapshot."""
    print(f"{seed = }")
    rng, np_rng = Random(seed), np.random.default_rng(seed)
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", rng.randint(1, 40))
    monkeypatch.setattr(search_module, "PAIRS", rng.choice((1, 7, 512)))
    monkeypatch.setattr(search_module, "SCORES", (1, 17, search_module.SCORES)[seed % 3])
    monkeypatch.setattr(search_module, "FEW", (0, 8)[seed % 2])
    out = LocalStore(str(tmp_path / "out"))
    names = [f"v{at:02d}" for at in range(20)]
    for seq in (1, 2):
        frames = [*(rng.choice((0, 9, 40, 200)) for _ in range(5)), 40]
        add_plan(out, videos(rng.sample(names, 12)), seq=seq, shard_videos=rng.randint(1, 9), frames=frames)
    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(newest(out), dest)
    queries_QD = np_rng.standard_normal((rng.choice((1, 1, 5)), DIM)).astype(np.float32)
    for level in ("clip", "video"):
        for metric in METRICS:
            where, keep = rng.choice(
                [
                    ([], lambda row: True),
                    (["n_frames>=40", "label!=label of v03"], lambda r: r["n_frames"] >= 40 and r["video_id"] != "v03"),
                    (["plan_seq=2"], lambda row: row["plan_seq"] == 2),
                    (["codec=vp9"], lambda row: False),
                ]
            )
            top = rng.choice((1, 3, 50))
            expected = brute_force(out, queries_QD, level, metric, keep)
            for source in (newest(out), SnapshotRows(dest)):
                for per_video in (False, True):
                    best = list({one[1]: one for one in reversed(expected)}.values()) if per_video else expected
                    best.sort(key=lambda one: -one[0] if metric == "cosine" else one[0])
                    how = {"metric": metric, "top": top, "where": where, "per_video": per_video}
                    found = nearest(source, queries_QD, level=level, **how)  # type: ignore[arg-type]
                    assert [(hit.video_id, hit.clip_index) for hit in found.hits] == [one[1:] for one in best[:top]]
                    assert [hit.score for hit in found.hits] == pytest.approx([one[0] for one in best[:top]], abs=1e-12)
                    assert found.n_rows == len(expected)
                    assert all(hit.uri == f"file:///v/{hit.video_id}.mp4" for hit in found.hits)


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """Videos a to j with 3, 0, 1 and 1 clips in turn; b, f and j failed."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("abcdefghij"))
    return store


def rows_of(source: NewestRows | SnapshotRows, folder: str) -> pa.Table:
    return pa.concat_tables([table for name, table in source.rows() if name == folder])


def test_a_row_finds_itself_exactly(out: LocalStore) -> None:
    """A stored vector has cosine 1.0 and distance 0.0 to itself, not nearly; of equal queries the first is reported."""
    clips = rows_of(newest(out), "clips")
    for at, vector in enumerate(schema.features_of(clips["embedding"], DIM)):
        for metric, score in (("cosine", 1.0), ("l2", 0.0)):
            found = nearest(newest(out), np.stack([-vector, vector, vector]), level="clip", metric=metric, top=2)  # type: ignore[arg-type]
            assert (found.hits[0].score, found.hits[0].query) == (score, 1)
            assert found.hits[0].clip_index == clips["clip_index"][at].as_py()
            assert found.hits[1].score != score


@given(st.lists(st.floats(-1e3, 1e3, width=32).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=50))
def test_the_cosine_of_equal_rows_is_one(row: list[float]) -> None:
    """No rounding: sqrt(s * s) is s."""
    x = np.array([row], np.float64)
    assert cosines(x, x.copy()).tolist() == [1.0]
    assert cosines(x, -x).tolist() == [-1.0]


def test_every_half_is_widened_exactly() -> None:
    """All 65536 values of float16, NaN and infinities included, as Arrow and numpy widen them."""
    bits = np.arange(2**16, dtype=np.uint16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(bits.view(np.float16)), 256)
    found = schema.features_of(column, 256)
    expected = bits.view(np.float16).astype(np.float32).reshape(-1, 256)
    assert found.dtype == np.float32 and np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("order", [(0, 6, 12), (12, 6, 0), (6, 12, 0)])
def test_equal_rows_are_in_the_order_of_their_paths(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Copies of one video, of two clips each, come out by path and time, in whatever order they are read."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("abcdefgh"), frames=(32,), shard_videos=8)
    source = newest(store)
    clips = rows_of(source, "clips")
    vector = schema.features_of(clips["embedding"], DIM)[0]
    same = schema.vector_array(np.tile(vector, (16, 1)), clips.schema.field("embedding").type)
    table = clips.set_column(clips.schema.get_field_index("embedding"), clips.schema.field("embedding"), same)
    source.rows = lambda **_: iter([("clips", table.slice(at, 6)) for at in order])  # type: ignore[method-assign]
    for top in (1, 2, 5, 8):
        found = nearest(source, vector[None], level="clip", top=top)
        assert [(hit.video_id, hit.clip_index) for hit in found.hits] == [
            ("abcdefgh"[n // 2], n % 2) for n in range(top)
        ]
        found = nearest(source, vector[None], level="clip", top=top, per_video=True)
        assert [(hit.video_id, hit.clip_index) for hit in found.hits] == [(name, 0) for name in "abcdefgh"[:top]]


def test_near_duplicates_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hit is as near as `distinct` to the query or to a better hit; the first that are not are the hits."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos([f"v{at:02d}" for at in range(40)]), frames=(200,))
    source = newest(store)
    query = schema.features_of(rows_of(source, "clips")["embedding"], DIM)[:1]
    ranked = nearest(source, query, level="clip", top=1000).hits
    found = nearest(source, query, level="clip", top=5, distinct=0.8)
    expected: list[np.ndarray] = [query[0]]
    ids = []
    for hit in ranked:
        x = hit.embedding_D.astype(np.float64)
        if all(x @ y / np.linalg.norm(x) / np.linalg.norm(y) < 0.8 for y in expected):
            expected.append(x)
            ids.append((hit.video_id, hit.clip_index))
    assert [(hit.video_id, hit.clip_index) for hit in found.hits] == ids[:5]
    assert not found.cut_short
    monkeypatch.setattr(search_module, "POOL", 6)
    assert nearest(source, query, level="clip", top=5, distinct=0.8).cut_short


def test_only_the_wanted_shards_are_read(out: LocalStore) -> None:
    """`only` reads no shard that has none of its videos, and `skip` none of its pieces: damage there has no effect."""
    source = newest(out)
    last = out.root / "clips" / f"{source.pieces[-1]}.parquet"
    last.write_bytes(b"damage")
    query = np.ones((1, DIM), np.float32)
    found = nearest(source, query, level="clip", only=frozenset("ac"))
    assert {hit.video_id for hit in found.hits} == {"a", "c"}
    found = nearest(source, query, level="clip", skip=frozenset(source.pieces[1:]))
    assert {hit.video_id for hit in found.hits} == {"a", "c", "d"}
    with pytest.raises(DamagedJob, match=last.name):
        nearest(source, query, level="clip", only=frozenset("ij"))


def test_a_snapshot_gives_single_videos(out: LocalStore, tmp_path: Path) -> None:
    """`only` of a snapshot gives the rows of these videos and no others; a full pass still verifies whole files."""
    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(newest(out), dest)
    source = SnapshotRows(dest)
    got = {folder: table for folder, table in source.rows(only=frozenset("ag")) if table.num_rows}
    assert set(got["clips"]["video_id"].to_pylist()) == {"a", "g"}
    assert source.find("file:///v/a.mp4") == source.find("a.mp4") == source.find("a") == ("a",)
    assert source.find("zebra") == ()
    path = dest.root / "clips" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"X" + path.read_bytes()[-8:])
    with pytest.raises(DamagedJob, match="part-00000"):
        list(source.rows())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("codec", "not like codec=h264"),
        ("=h264", "not like"),
        ("colour=red", "no column 'colour'; there are video_id, path"),
        ("embedding=1", "no column 'embedding'"),
        ("fps>fast", "column fps holds numbers; compare it with one instead of 'fast'"),
    ],
)
def test_a_wrong_condition_is_an_error(out: LocalStore, text: str, says: str) -> None:
    """Wrong form, column or value: refused before a row is read, with what is allowed."""
    with pytest.raises(InputError, match=says):
        nearest(newest(out), np.ones((1, DIM), np.float32), level="clip", where=[text])


def test_conditions_know_types_and_nulls() -> None:
    """Values are read as the column's type, with spaces and operators in text; null satisfies nothing, not even !=."""
    table = pa.table({"n": pa.array([1, 10, None]), "s": ["a = b", "1", None], "t": pa.array([True, False, None])})
    for text, rows in (
        ("n<10", [0]),
        ("n >= 1", [0, 1]),
        ("n!=1", [1]),
        ("s=a = b", [0]),
        ("s!=1", [0]),
        ("t=true", [0]),
    ):
        (condition,) = parse([text], table.schema)
        assert np.flatnonzero(condition.holds(table).to_numpy()).tolist() == rows, text


def test_a_snapshot_without_clips_says_so(out: LocalStore, tmp_path: Path) -> None:
    """Its videos can be searched; a search of its clips is an error."""
    dest = LocalStore(str(tmp_path / "bare"))
    snapshot(newest(out), dest, clips=False)
    query = np.ones((1, DIM), np.float32)
    assert nearest(SnapshotRows(dest), query, level="video").n_rows == 7
    with pytest.raises(InputError, match="has no clips"):
        nearest(SnapshotRows(dest), query, level="clip")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("12.5", 12.5), ("12.5s", 12.5), ("0", 0), (".5", 0.5), ("7.", 7), ("90", 90), ("3600s", 3600)),
        *(("1:05", 65), ("1:05.25s", 65.25), ("90:00", 5400), ("1:02:03.5", 3723.5), ("0:00:00", 0)),
    ],
)
def test_a_position_is_read(text: str, seconds: float) -> None:
    """Seconds, minutes and hours, with or without an s; the name before the last @ may contain anything."""
    for name in ("a.mp4", "a@2.mp4", "a@1:05", "@", "a\nb"):
        assert split_position(f"{name}@{text}") == (name, text)
    assert position_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["1:75", "1:60:00", "1.5:00", "1:2:3:4", "1.2.3", "5:", ":5", "1:05ss", "-1", "1e3", "", "٣"]
)
def test_what_is_not_a_position_is_refused(text: str) -> None:
    """The message shows the forms that are read."""
    with pytest.raises(InputError, match=r"is not a position: write seconds, as 12\.5, or 1:05, or 1:02:03\.5"):
        position_s(text)


def test_a_name_without_a_position_stays_whole() -> None:
    """What follows an @ belongs to the name unless only digits, points, colons and an s follow."""
    for name in ("a@b.mp4", "a@", "@12", "a@s", "a@12.mp4", "a@.", "user@host"):
        assert split_position(name) == (name, None)


@pytest.mark.parametrize("name", ["\udcff.mp4", "\ud800", "a\nb", "x" * 5000])
def test_any_text_may_be_asked_for(out: LocalStore, tmp_path: Path, name: str) -> None:
    """A query or condition that is not UTF-8, or is longer than any name, finds nothing, without a traceback."""
    dest = LocalStore(str(tmp_path / "snapshot"))
    snapshot(newest(out), dest)
    for source in (newest(out), SnapshotRows(dest)):
        with pytest.raises(InputError, match="is neither a file nor a video"):
            resolve(source, name)
    (condition,) = parse([f"path={name}"], pa.schema([("path", pa.string())]))
    assert condition.holds(pa.table({"path": ["a", as_stored(name)]})).to_pylist() == [False, True]


def test_a_name_that_is_not_utf8_finds_its_row() -> None:
    """The columns show other bytes as \\xNN, and so does what is compared with them."""
    assert as_stored(os.fsdecode(b"a\xff.mp4")) == readable(b"a\xff.mp4") == "a\\xff.mp4"


def test_an_unknown_metric_is_an_error() -> None:
    """It was taken for l2."""
    with pytest.raises(ValueError, match="unknown metric 'dot'"):
        search_module._Best(np.ones((1, DIM), np.float32), "dot", 1, False)
