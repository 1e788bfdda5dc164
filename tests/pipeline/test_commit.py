"""The commit protocol: one shard, one object, created once; everything else is derived from it, by any process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.pipeline.clips.pool import maximum, mean, mean_probs, pool
from p3d.pipeline.dataset import commit, schema
from p3d.pipeline.dataset.columns import embedding_type
from p3d.pipeline.dataset.commit import (
    CommitUnknown,
    clips_key,
    commit_shard,
    committed_names,
    derive,
    read_committed,
    videos_key,
)
from p3d.pipeline.errors import DamagedJob, InputError, StoreMissing, StoreUnknown
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Created
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import ShardRows
from tests.pipeline.rows import CLASSES, DIM, planned, recipe, shard_rows

NAMES = ("a", "b", "c", "d", "e", "f")
SCORED = recipe(scores=True)


def commit_all(store: LocalStore, seed: int = 0) -> None:
    manifest = planned(store, NAMES)
    for shard in range(manifest.plan.n_shards):
        commit_shard(store, shard_rows(manifest, shard, seed=seed), recipe(), manifest.user_columns(shard))


def bytes_of(store: LocalStore) -> dict[str, bytes]:
    return {
        info.key: store.read(info.key) for folder in ("clips/", "videos/", "failures/") for info in store.list(folder)
    }


def read(store: LocalStore, folder: str) -> list[dict]:
    return [
        row
        for info in store.list(f"{folder}/")
        for row in schema.read_parquet(io.BytesIO(store.read(info.key))).to_pylist()
    ]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_every_video_is_in_the_dataset_once(store: LocalStore) -> None:
    """Videos with rows and failures together are the manifest; clip rows are numbered without gaps (I1, I2)."""
    commit_all(store)
    videos, failures, clips = (read(store, folder) for folder in ("videos", "failures", "clips"))
    assert sorted(row["video_id"] for row in videos + failures) == sorted(NAMES)
    for row in videos:
        of_video = [clip["clip_index"] for clip in clips if clip["video_id"] == row["video_id"]]
        assert of_video == list(range(row["n_clips"]))


def test_users_columns_reach_the_videos_file(store: LocalStore) -> None:
    """A column of the user's list is in the row of its video, not shifted by a failed video before it."""
    commit_all(store)
    assert all(row["label"] == f"label of {row['video_id']}" for row in read(store, "videos"))


@pytest.mark.parametrize("how", ["mean", "max", "mean+max"])
def test_the_pooled_row_is_the_pool_of_the_stored_clips(store: LocalStore, how: str) -> None:
    """The videos rows are the pooled stored clips, bit for bit (I5); `mean+max` has both vectors."""
    chosen = recipe(pool=how, embedding_dtype="float16")
    manifest = planned(store, NAMES, recipe_=chosen)
    rows = shard_rows(manifest, 0)
    rounded = replace(rows, features_RD=rows.features_RD.astype(np.float16).astype(np.float32))
    commit_shard(store, rounded, chosen, manifest.user_columns(0))
    clips = read(store, "clips")
    for row in read(store, "videos"):
        features = np.array([c["embedding"] for c in clips if c["video_id"] == row["video_id"]], np.float32)
        names = ["embedding", "embedding_max"][: len(how.split("+"))]
        for name, vector in zip(names, pool(features, how), strict=True):
            assert np.array_equal(np.array(row[name], np.float16), vector.astype(np.float16))
        assert ("embedding_max" in row) == (how == "mean+max")


def test_scores_of_a_video_are_the_mean_of_its_clips_in_float64(store: LocalStore) -> None:
    """videos.probs is the nearest float32 to the mean of the stored clips' distributions, bit for bit, whatever the
    dtype of the embedding; DuckDB reads both columns and finds the same (I5)."""
    chosen = recipe(scores=True, embedding_dtype="float16", pool="mean+max")
    manifest = planned(store, NAMES, recipe_=chosen)
    rows = shard_rows(manifest, 0, n_scores=CLASSES, frames=(400, 0, 16, 39))
    stored = rows.features_RD.astype(np.float16).astype(np.float32)
    commit_shard(store, replace(rows, features_RD=stored), chosen, manifest.user_columns(0))
    kind = embedding_type(CLASSES, "float32")
    for folder in ("clips", "videos"):
        columns = pq.read_schema(next((store.root / folder).iterdir()))
        assert (columns.field("probs").type, columns.field("probs").nullable) == (kind, False)
    clips = read(store, "clips")
    assert np.array_equal(np.array([clip["probs"] for clip in clips], np.float32), rows.probs_RK)
    found = {row["video_id"]: np.array(row["probs"], np.float32) for row in read(store, "videos")}
    assert list(found) == ["a", "c", "d"]
    for name, probs_K in found.items():
        of_video = [clip["probs"] for clip in clips if clip["video_id"] == name]
        exact = [
            float(sum(map(Fraction, column), Fraction()) / len(of_video)) for column in zip(*of_video, strict=True)
        ]
        assert np.array_equal(probs_K, np.array(exact).astype(np.float32))
    reader = duckdb.connect(config={"threads": 1})  # more would be missing in the forks of `make mutants`
    sql = f"SELECT video_id, probs FROM '{store.root}/videos/*.parquet' ORDER BY video_id"
    assert [(name, list(found[name])) for name in found] == [
        (name, list(one)) for name, one in reader.sql(sql).fetchall()
    ]


def test_without_scores_no_file_has_a_column_of_them(store: LocalStore) -> None:
    """Without scores there are no columns for them, and rows with scores are refused."""
    commit_all(store)
    for folder in ("clips", "videos"):
        names = pq.read_schema(next((store.root / folder).iterdir())).names
        assert "probs" not in names and "embedding" in names
    manifest = planned(LocalStore(str(store.root / "other")), NAMES)
    with pytest.raises(ValueError, match=r"scores are \(5, 3\) float32, not 5 x 0"):
        commit_shard(store, shard_rows(manifest, 0, n_scores=CLASSES), recipe(), manifest.user_columns(0))


def test_pools_are_what_they_say() -> None:
    """Mean and maximum over clips, in float32."""
    features = np.array([[1, 5], [3, 1], [2, 3]], np.float32)
    assert mean(features).tolist() == [2, 3]
    assert maximum(features).tolist() == [3, 5]
    third, huge = np.float32(1 / 3), np.float32(2**24)  # in float32 the sums below would be off
    assert mean_probs(np.array([[third, huge], [third, 1], [third, 1]], np.float32)).tolist() == [third, 5592406.0]
    with pytest.raises(ValueError, match=r"^a video without clips has no video feature$"):
        pool(features[:0], "mean")


def test_what_is_committed_never_changes(store: LocalStore) -> None:
    """A second commit of a shard with other numbers is discarded: no byte of the dataset changes (I4)."""
    commit_all(store, seed=0)
    before = bytes_of(store)
    commit_all(store, seed=1)
    assert bytes_of(store) == before


@pytest.mark.fault(41)
def test_two_writers_agree_on_one_shard(store: LocalStore) -> None:
    """Writers with different numbers race; the videos file is derived from whichever clips won (I5)."""
    manifest = planned(store, NAMES)
    for shard in range(manifest.plan.n_shards):
        barrier = threading.Barrier(4)

        def write(seed: int, shard: int = shard, barrier: threading.Barrier = barrier) -> None:
            rows = shard_rows(manifest, shard, seed=seed)
            barrier.wait()
            commit_shard(store, rows, recipe(), manifest.user_columns(shard))

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    clips = read(store, "clips")
    for row in read(store, "videos"):
        features = np.array([c["embedding"] for c in clips if c["video_id"] == row["video_id"]], np.float32)
        assert np.array_equal(np.array(row["embedding"], np.float32), mean(features))


@pytest.mark.fault(1, 4)
def test_a_kill_between_commit_and_derive_is_repaired_to_the_same_bytes(tmp_path: Path) -> None:
    """Derived files made later, from the stored object, equal those made at once."""
    whole, cut = LocalStore(str(tmp_path / "whole")), LocalStore(str(tmp_path / "cut"))
    commit_all(whole)
    commit_all(cut)
    for info in [*cut.list("videos/"), *cut.list("failures/")]:
        (cut.root / info.key).unlink()
    manifest = planned(cut, NAMES)
    assert committed_names(cut)[1] == set()
    for shard in range(manifest.plan.n_shards):
        derive(cut, manifest.shard(shard), recipe(), manifest.user_columns(shard))
    assert bytes_of(cut) == bytes_of(whole)


def failing(store: LocalStore, errors: list[Exception | None], *, after: bool) -> Callable[..., Created]:
    """`store.create` that raises the next error of the list before, or after, it really creates."""
    create = store.create

    def wrapped(key: str, source: bytes | Path) -> Created:
        error = errors.pop(0) if errors and key.startswith("clips/") else None
        if error is None:
            return create(key, source)
        if after:
            create(key, source)
        raise error

    return wrapped


@pytest.mark.parametrize("after", [False, True], ids=["request lost", "reply lost"])
@pytest.mark.fault(32)
def test_an_unknown_create_is_resolved_by_looking(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """A lost request is sent again; after a lost reply the object is adopted. One commit either way (row 32)."""
    manifest = planned(store, NAMES)
    monkeypatch.setattr(commit, "PAUSE_S", 0.0)
    monkeypatch.setattr(store, "create", failing(store, [StoreUnknown("time-out")], after=after))
    rows = shard_rows(manifest, 0)
    committed = commit_shard(store, rows, recipe(), manifest.user_columns(0))
    assert committed.adopted is after
    assert committed.n_clips == len(rows.clips)
    assert committed_names(store)[1] == {rows.shard.name}


@pytest.mark.fault(28)
def test_a_store_that_never_says_leaves_the_shard_open(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After bounded tries the commit is unknown, not failed: nothing is visible, a resume looks again."""
    manifest = planned(store, NAMES)
    monkeypatch.setattr(commit, "PAUSE_S", 0.0)
    errors: list[Exception | None] = [StoreUnknown("gone")] * commit.CREATE_TRIES
    monkeypatch.setattr(store, "create", failing(store, errors, after=False))
    with pytest.raises(CommitUnknown):
        commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    assert not errors
    assert committed_names(store) == (set(), set())


def test_the_footer_says_what_became_of_every_video(store: LocalStore) -> None:
    """Outcomes are read back as they were written, without reading a row."""
    manifest = planned(store, NAMES)
    rows = shard_rows(manifest, 0)
    commit_shard(store, rows, recipe(), manifest.user_columns(0))
    committed = read_committed(store, rows.shard.name, 1)
    assert committed.outcomes == rows.outcomes
    assert committed.n_clips == len(rows.clips)
    assert committed.failures == {"truncated": 1}
    with pytest.raises(StoreMissing):
        read_committed(store, "00000000-000000009", 1)


def test_a_shard_in_which_every_video_failed_is_still_a_commit(store: LocalStore) -> None:
    """No clip rows, no video rows, all failures: three whole files."""
    manifest = planned(store, NAMES)
    commit_shard(store, shard_rows(manifest, 0, frames=(0,)), recipe(), manifest.user_columns(0))
    assert len(read(store, "failures")) == 4
    assert read(store, "clips") == read(store, "videos") == []


def test_files_have_the_documented_encodings(store: LocalStore) -> None:
    """zstd, byte stream split, page checksums, fixed-size lists of non-null floats, and footer keys."""
    commit_all(store)
    info = next(store.list("clips/"))
    file = pq.ParquetFile(io.BytesIO(store.read(info.key)))
    column = {
        file.metadata.row_group(0).column(i).path_in_schema: file.metadata.row_group(0).column(i) for i in range(10)
    }
    vector = column["embedding.list.element"]
    assert vector.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in vector.encodings
    assert file.schema_arrow.field("embedding").type == embedding_type(DIM, "float32")
    assert {"p3d.outcomes", "p3d.stats", "p3d.shard"} <= schema.read_footer(file).keys()
    derived = pq.ParquetFile(io.BytesIO(store.read(info.key.replace("clips/", "videos/"))))
    assert json.loads(schema.read_footer(derived)["p3d.clips"])["size_bytes"] == info.size_bytes


@pytest.mark.fault(45)
def test_a_flipped_bit_does_not_read_back(store: LocalStore) -> None:
    """With page checksums, a flip in a data page is an error and not a wrong number (row 45).

    The checksum does not cover a page's header, some 60 bytes; `verify` finds those flips by sha256.
    """
    manifest = planned(store, NAMES)
    commit_shard(store, shard_rows(manifest, 0, frames=(4000,)), recipe(), manifest.user_columns(0))
    content = bytearray(store.read(next(store.list("clips/")).key))
    file = schema.open_parquet(io.BytesIO(content))
    clean, vectors = file.read(), file.metadata.row_group(0).column(9)
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(60):
        flipped, header = bytearray(content), 100
        at = vectors.data_page_offset + int(rng.integers(header, vectors.total_compressed_size))
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            silent += not schema.open_parquet(io.BytesIO(flipped)).read().equals(clean)
        except Exception:  # noqa: BLE001 - any error will do; silence is the defect
            continue
    assert silent == 0


def test_an_object_too_large_is_refused_with_a_remedy(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the limit nothing is created, and the message says how large it is and names the options that help."""
    manifest = planned(store, NAMES)
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    size_bytes = store.head(clips_key(manifest.shard(0).name)).size_bytes  # type: ignore[union-attr]
    monkeypatch.setattr(schema, "MAX_OBJECT_BYTES", size_bytes)
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))  # the largest size that is allowed
    monkeypatch.setattr(schema, "MAX_OBJECT_BYTES", size_bytes - 1)
    with pytest.raises(InputError, match=r"would be one object of 0\.0 GiB \(at most 4\); launch at a new output with"):
        commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    true = schema.write_parquet

    def large(path: Path, table: pa.Table, footer: dict[str, str]) -> None:
        true(path, table, footer)
        os.truncate(path, 9 * 1024**3 // 2)  # a sparse file takes no disk space

    monkeypatch.setattr(schema, "write_parquet", large)
    with pytest.raises(InputError, match=r"one object of 4\.5 GiB .* --shard-videos"):
        commit_shard(store, shard_rows(manifest, 1), recipe(), manifest.user_columns(1))
    assert committed_names(store)[0] == {manifest.shard(0).name}


@pytest.mark.fault(36, 38)
@pytest.mark.parametrize("loss", ["rows", "footer"])
def test_a_shard_that_does_not_read_back_is_not_committed(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Data that a failing disk lost is noticed before it becomes visible; the shard stays open."""
    manifest, true = planned(store, NAMES), schema.write_parquet

    def lossy(path: Path, table: pa.Table, footer: dict[str, str]) -> None:
        kept = {key: value for key, value in footer.items() if loss != "footer" or key != schema.STATS_KEY}
        true(path, table[: -1 if loss == "rows" else None], kept)

    monkeypatch.setattr(schema, "write_parquet", lossy)
    with pytest.raises(StoreUnknown, match="does not read back"):
        commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    assert committed_names(store) == (set(), set())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: replace(rows, outcomes=rows.outcomes[1:]),
        lambda rows: replace(rows, clips=rows.clips[1:], features_RD=rows.features_RD[1:], probs_RK=rows.probs_RK[1:]),
        lambda rows: replace(rows, clips=rows.clips[::-1]),
        lambda rows: replace(rows, features_RD=rows.features_RD * np.nan),
        lambda rows: replace(rows, features_RD=rows.features_RD * 0),
        lambda rows: replace(rows, features_RD=rows.features_RD[:, :4]),
        lambda rows: replace(rows, probs_RK=rows.probs_RK * np.nan),
        lambda rows: replace(rows, probs_RK=rows.probs_RK * np.float32(1.002)),
        lambda rows: replace(rows, probs_RK=rows.probs_RK * np.float32(0.998)),
        lambda rows: replace(rows, probs_RK=np.array([[-0.25, 0.75, 0.5]] * len(rows.clips), np.float32)),
        lambda rows: replace(rows, probs_RK=np.array([[1.0005, 0, 0]] * len(rows.clips), np.float32)),
        lambda rows: replace(rows, probs_RK=rows.probs_RK[:, :2]),
        lambda rows: replace(rows, probs_RK=rows.probs_RK[1:]),
        lambda rows: replace(rows, probs_RK=rows.probs_RK.astype(np.float64)),
    ],
    ids=(
        "a video is missing,a clip is missing,clips out of order,NaN,zeros,wrong dimension,NaN scores,scores above 1,"
        "scores below 1,a negative score,a score above 1,wrong number of classes,a row of scores is missing,wrong type"
    ).split(","),
)
def test_rows_that_break_an_invariant_are_not_committed(
    store: LocalStore, spoil: Callable[[ShardRows], ShardRows]
) -> None:
    """check_rows refuses before anything is written (I1, I2, I6)."""
    manifest = planned(store, NAMES, recipe_=SCORED)
    rows = shard_rows(manifest, 0, n_scores=CLASSES)
    with pytest.raises(ValueError):
        commit_shard(store, spoil(rows), SCORED, manifest.user_columns(0))
    assert committed_names(store) == (set(), set())
    assert not commit_shard(store, rows, SCORED, manifest.user_columns(0)).adopted


def test_a_damaged_commit_is_named(store: LocalStore) -> None:
    """A clips file that cannot be read is DamagedJob with its name, not a traceback."""
    manifest = planned(store, NAMES)
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    name = manifest.shard(0).name
    (store.root / clips_key(name)).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DamagedJob, match=name):
        read_committed(store, name, 1)
    with pytest.raises(DamagedJob, match=f"^clips/{name}.parquet is damaged "):
        derive(store, manifest.shard(0), recipe(), manifest.user_columns(0))


def test_what_was_just_committed_is_not_read_back(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Derived files come from the local copy that the store accepted: a commit to S3 downloads nothing."""
    manifest = planned(store, NAMES)
    monkeypatch.setattr(store, "read", lambda key: pytest.fail(f"{key} was read"))
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    assert len(committed_names(store)[1]) == 1


def test_the_protocol_holds_on_s3(bucket: str) -> None:
    """Commit, adopt and derive against a real S3 server."""
    store = open_store(f"s3://{bucket}/out")
    manifest = planned(store, NAMES)
    first = commit_shard(store, shard_rows(manifest, 0, seed=0), recipe(), manifest.user_columns(0))
    before = store.read(clips_key(manifest.shard(0).name)), store.read(videos_key(manifest.shard(0).name))
    second = commit_shard(store, shard_rows(manifest, 0, seed=1), recipe(), manifest.user_columns(0))
    assert (first.adopted, second.adopted) == (False, True)
    assert before == (store.read(clips_key(manifest.shard(0).name)), store.read(videos_key(manifest.shard(0).name)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_commit_says_what_it_holds_and_what_was_made_from_it(store: LocalStore, dtype: str) -> None:
    """The reply, the footer read back and the three files agree, to the last key; embeddings have the job's type."""
    manifest, chosen = planned(store, NAMES, recipe_=recipe(embedding_dtype=dtype)), recipe(embedding_dtype=dtype)
    rows, own = shard_rows(manifest, 0), manifest.user_columns(0)
    name = rows.shard.name
    made = commit_shard(store, rows, chosen, own)
    content = store.read(clips_key(name))
    whole = (len(rows.clips), len(content), rows.outcomes)
    assert (made.adopted, made.n_clips, made.size_bytes, made.outcomes) == (False, *whole)
    assert derive(store, rows.shard, chosen, own) == commit.Committed(True, *whole)
    assert read_committed(store, name, 1) == commit.Committed(True, *whole)
    shard = {"plan_seq": rows.shard.plan_seq, "plan8": rows.shard.plan8, "shard": 0}
    source = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content), "writer": pa.cpp_version}
    for key in (clips_key(name), videos_key(name), commit.failures_key(name)):
        with schema.open_parquet(io.BytesIO(store.read(key))) as file:
            footer = schema.read_footer(file)
            assert json.loads(footer[schema.SHARD_KEY]) == shard
            if key == clips_key(name):
                assert json.loads(footer[schema.STATS_KEY]) == rows.stats
            else:
                assert json.loads(footer[schema.SOURCE_KEY]) == source
            if not key.startswith("failures/"):
                assert file.schema_arrow.field("embedding").type.value_type == getattr(pa, dtype)()


@pytest.mark.parametrize("missing", ["clips", "videos", "failures"])
def test_a_shard_is_whole_with_all_three_files(store: LocalStore, missing: str) -> None:
    """Committed is what has clips; derived is what has the other two as well."""
    commit_all(store)
    both = committed_names(store)[0]
    (store.root / missing / f"{min(both)}.parquet").unlink()
    one = {max(both)}
    assert len(both) == 2
    assert committed_names(store) == ((one if missing == "clips" else both), one)


def test_a_store_that_says_nothing_at_all_is_asked_at_growing_intervals(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither create nor head answers: four tries, pauses that double, and a message with the object's URL."""
    manifest, slept = planned(store, NAMES), list[float]()

    def fail(*_: object) -> None:
        raise StoreUnknown("gone")

    monkeypatch.setattr(store, "create", fail)
    monkeypatch.setattr(store, "head", fail)
    monkeypatch.setattr(commit.time, "sleep", slept.append)
    name = manifest.shard(0).name
    with pytest.raises(CommitUnknown, match=f"{store.url}/clips/{name}.parquet: the store did not say whether"):
        commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    assert slept == [0.5, 1.0, 2.0, 4.0]
