"""Records and rows of somebody else: other types and impossible numbers are damage, and odd columns can be shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import commit_shard, failures_key
from p3d.pipeline.dataset.files import sha256_of
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.dataset.snapshot_record import SnapshotRecord, read_snapshot
from p3d.pipeline.dataset.verify import current_failures
from p3d.pipeline.errors import MALFORMED, DamagedJob, StoreUnsafe
from p3d.pipeline.recipe import JobRecord, PlanRecord, Recipe, ShardSizing, digest
from p3d.pipeline.results.page.archive import read_archive
from p3d.pipeline.results.search.exact import nearest
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DATA_BYTES, Store
from tests.pipeline.rows import DIM, outcome, planned, recipe, shard_rows, videos


def finished(root: Path, table: pa.Table | None = None) -> LocalStore:
    """An output of one shard, whose second video has failed."""
    store = LocalStore(str(root / "out"))
    if table is None:
        manifest = planned(store, "abcd")
    else:
        store.create("job.json", JobRecord(recipe(), "random:0", {}).to_json())
        manifest = Manifest(store, write_plan(store, 1, recipe(), with_shards(table, ShardSizing(4)), 0, ShardSizing()))
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    return store


def newest(store: Store) -> NewestRows:
    return NewestRows(store, JobRecord.from_json(store.read("job.json"), store.url))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("crop_hw", odd) for odd in ((), (160,), (160, 160, 160), (160.0, 160), 5, "ab", ("1", "1"))),
        *(("model", odd) for odd in (5, None, ["x"], {}, True)),
        *(("feature_dim", odd) for odd in (2**31, 10**30, 8.0, True, "8")),
        *(("num_classes", odd) for odd in (2**40, -1, None, 3.5)),
        *(("frame_step", odd) for odd in (10**30, 1.5, True)),
        ("fps", 10**400),
        ("fps", "25"),
        ("clips", ["every:16"]),
        ("scores", 0),
        ("short_side", [1]),
    ],
)
def test_a_recipe_of_other_types_is_damage(name: str, value: Any) -> None:
    """Each value of a recipe is of its type and possible, although the digest is right."""
    record = json.loads(JobRecord(recipe(), "random:0", {}).to_json())
    record["recipe"][name] = value
    record["recipe_digest"] = digest(record["recipe"])
    with pytest.raises(DamagedJob, match=r"job\.json"):
        JobRecord.from_json(json.dumps(record).encode(), "OUT")
    assert Recipe.from_dict(recipe().to_dict()) == recipe()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("video", "path"), 5),
        (("video", "size_bytes"), 2**63),
        (("video", "mtime_ns"), "0"),
        (("n_clips",), 10**12),
        (("n_clips",), -1),
        (("n_clips",), 2.0),
        (("n_clips",), True),
        (("info", "codec"), None),
        (("info", "width"), 1.5),
        (("info", "fps"), "25"),
        (("end", "truncated"), 1),
        (("end", "n_frames"), 10**30),
        (("info",), [1]),
        (("video",), None),
        ((), []),
    ],
)
def test_an_outcome_of_other_types_is_malformed(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    """What readers do with an outcome is only done with values of the right types."""
    manifest = planned(LocalStore(str(tmp_path / "out")), "a")
    records = json.loads(schema.outcomes_json((outcome(manifest.shard(0).videos[0], 16),), 1))
    assert schema.parse_outcomes(json.dumps(records), 1)
    if path:
        held = records[0]
        for name in path[:-1]:
            held = held[name]
        held[path[-1]] = value
    else:
        records[0] = value
    with pytest.raises(MALFORMED):
        schema.parse_outcomes(json.dumps(records), 1)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}"])
def test_a_damaged_failures_file_is_named(tmp_path: Path, content: bytes) -> None:
    """The list of failures names a file that cannot be read, and says what to do."""
    store = finished(tmp_path)
    key = next(info.key for info in store.list("failures/"))
    (store.root / key).write_bytes(content)
    with pytest.raises(DamagedJob, match=r"failures/.* is damaged.*--repair"):
        current_failures(store)
    schema.write_parquet(store.root / key, pa.table({"video_id": ["a"]}), {})
    with pytest.raises(DamagedJob, match="other columns"):
        current_failures(store)
    assert key == failures_key(key.removeprefix("failures/").removesuffix(".parquet"))


@pytest.mark.parametrize("text", ["null", "[]", "5", '{"sha256": null, "size_bytes": null}', "[" * 9000])
def test_a_footer_of_another_type_is_damage(tmp_path: Path, text: str) -> None:
    """A derived file whose footer holds another JSON value than an object is named as damaged."""
    store = finished(tmp_path)
    key = next(info.key for info in store.list("videos/"))
    table = schema.read_parquet(store.root / key)
    schema.write_parquet(store.root / key, table, {schema.SOURCE_KEY: text})
    with pytest.raises(DamagedJob, match=f"{key} is damaged"):
        list(newest(store).rows())


def test_columns_that_python_cannot_hold_are_shown_and_searched(tmp_path: Path) -> None:
    """Times in nanoseconds of the user's own list neither end a search nor an answer of the page."""
    when = pa.array([2**62 + 1, None, 0, 1], pa.timestamp("ns"))
    part = pa.array([float("nan"), 0.5, None, float("nan")])  # NaN is not equal to itself
    store = finished(tmp_path, videos("abcd").append_column("when", when).append_column("part", part))
    found = nearest(newest(store), np.ones((1, DIM), np.float32), level="video")
    assert len(found.hits) == 3
    archive = read_archive(newest(store))
    row = archive.row("a")
    assert row is not None and row["when"] == "2116-02-20 23:53:38.427387905" and row["label"] == "label of a"
    assert "when" not in (archive.row("b") or {})


def test_a_table_becomes_python_values_whatever_it_holds() -> None:
    """Values that no Python type has become text, also nested ones; all others are themselves."""
    far = pa.array([2**62, None, 5], pa.int64())
    table = pa.table(
        {
            "days": pa.array([2**31 - 1, None, 0], pa.int32()).view(pa.date32()),
            "tz": pa.array([1, None, 2], pa.timestamp("us", tz="No/Where")),
            "nested": pa.StructArray.from_arrays([far.view(pa.duration("s"))], names=["a"]),
            "plain": ["x", None, "y"],
        }
    )
    rows = schema.records(table)
    assert [row["plain"] for row in rows] == ["x", None, "y"] and rows[1]["days"] is None and rows[1]["tz"] is None
    assert "2147483647" in rows[0]["days"] and isinstance(rows[0]["tz"], str) and str(2**62) in str(rows[0]["nested"])
    assert schema.records(table.select(["plain"])) == table.select(["plain"]).to_pylist()


def change_snapshot(root: Path, change: Any) -> LocalStore:
    """A snapshot with other videos, whose record was made right again."""
    copied = LocalStore(str(root / "copy"))
    snapshot(newest(finished(root)), copied)
    record = read_snapshot(copied)
    files = []
    for one in record.files:
        if one.folder == "videos":
            table = change(schema.read_parquet(copied.root / one.key))
            schema.write_parquet(copied.root / one.key, table, {})
            path = copied.root / one.key
            one = replace(one, sha256=sha256_of(path), size_bytes=path.stat().st_size)
        files.append(one)
    (copied.root / "snapshot.json").write_bytes(replace(record, files=tuple(files)).to_json())
    return copied


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["duration_s"]),
        lambda table: table.append_column("label", table["path"]),
        lambda table: table.set_column(0, "video_id", pa.array(range(table.num_rows))),
        lambda table: table.rename_columns(["id", *table.column_names[1:]]),
    ],
)
def test_a_snapshot_with_other_columns_is_damage(tmp_path: Path, change: Any) -> None:
    """Columns that are missing, twice there, or of other types are damage, although each checksum is right."""
    with pytest.raises(DamagedJob, match=r"videos/part-00000\.parquet is damaged"):
        SnapshotRows(change_snapshot(tmp_path, change))


def test_text_that_is_not_utf8_is_damage(tmp_path: Path) -> None:
    """A string column that holds other bytes than text is found where it is read."""

    def change(table: pa.Table) -> pa.Table:
        ends = np.arange(table.num_rows + 1, dtype=np.int32)
        text = pa.Array.from_buffers(
            pa.string(), table.num_rows, [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"\xff" * table.num_rows)]
        )
        return table.set_column(table.column_names.index("label"), "label", text)

    with pytest.raises(DamagedJob, match="UTF8"):
        list(SnapshotRows(change_snapshot(tmp_path, change)).rows())


@pytest.mark.parametrize(
    ("name", "value"), [("source", 5), ("created_at", []), ("plans", {"1": 5}), ("versions", {"x": 1})]
)
def test_a_snapshot_record_of_other_types_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    """Its texts are text and its counts numbers, although its own digest is right."""
    copied = LocalStore(str(tmp_path / "copy"))
    snapshot(newest(finished(tmp_path)), copied)
    record = {**json.loads(copied.read("snapshot.json")), name: value}
    del record["digest"]
    with pytest.raises(DamagedJob, match="cannot be trusted"):
        SnapshotRecord.from_json(json.dumps({**record, "digest": digest(record)}).encode(), "OUT")


def test_a_sparse_data_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A file larger than any that p3d writes is not read into memory, nor hashed."""
    store = finished(tmp_path)
    key = next(info.key for info in store.list("clips/"))
    with (store.root / key).open("wb") as file:
        file.truncate(DATA_BYTES + 1)
    with pytest.raises(StoreUnsafe, match=str(DATA_BYTES + 1)):
        store.read(key)


def test_a_manifest_with_a_column_twice_is_damage(tmp_path: Path) -> None:
    """A part whose checksum and digest are right may still not have two columns of one name."""
    store = finished(tmp_path)
    (key,) = (info.key for info in store.list("plans/") if info.key.endswith(".parquet"))
    table = schema.read_parquet(store.root / key)
    for name in ("mtime_ns", "label"):
        schema.write_parquet(store.root / key, table.append_column(name, table[name]), {})
        sha256 = sha256_of(store.root / key)
        record = json.loads(store.read("plans/0001.json"))
        record["plan"]["parts"][0]["sha256"] = sha256
        plan = PlanRecord.from_dict(record["plan"])
        with pytest.raises(DamagedJob, match="is no manifest"):
            Manifest(store, plan)
