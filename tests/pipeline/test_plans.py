"""Plans: rows in fixed shards, a digest of their values, and files that exist whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p3d.pipeline.dataset import plans as manifest_module
from p3d.pipeline.dataset import superseded
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, load_plans, plan_digest, read_part, write_plan
from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.summaries import content_of
from p3d.pipeline.errors import AlreadyRunning, DamagedJob, InputError, StrayFile
from p3d.pipeline.recipe import SHARD_S, PartRecord, PlanRecord, ShardSizing
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Created, Store
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import VideoRef
from tests.pipeline.rows import recipe, videos
from tests.sim.store import MemoryStore

RECIPE = recipe()
DIGEST = "f" * 64  # of another one
NAMES = tuple("abcdefghijk")


def table(names: Any = NAMES, shard_videos: int = 4) -> pa.Table:
    return with_shards(videos(names), ShardSizing(shard_videos))


def put(rows: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The rows with other values in one column."""
    at = rows.column_names.index(name)
    return rows.set_column(at, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))


def files_of(store: LocalStore) -> dict[str, tuple[bytes, int]]:
    """Every file below plans/: content and time of writing."""
    return {info.key: (store.read(info.key), info.mtime_ns) for info in store.list("plans/")}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


# --- shards -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-1, 20), st.integers(-1, 150)), min_size=1, max_size=60), st.integers(1, 10))
@example([-1] * 5 + [50, 52], 10)  # an unknown size, -1, counts as 0 bytes
def test_every_row_is_in_one_shard_and_shards_are_consecutive(sizes: list[int], shard_videos: int) -> None:
    """Shards count from 0 without gaps; none has more rows than asked for or more bytes than the limit (unless it is
    one video), and none is closed before it had to be."""
    rows = put(videos([f"v{at:03d}" for at in range(len(sizes))]), "size_bytes", sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p3d.pipeline.dataset.sharding.SHARD_BYTES", 100)
        sharded = with_shards(rows, ShardSizing(shard_videos))
    assert sharded.drop_columns(["shard"]).equals(rows)
    assert sharded.column_names[: len(MANIFEST)] == MANIFEST.names
    of = sharded["shard"].to_pylist()
    assert of[0] == 0 and all(after - before in (0, 1) for before, after in pairwise(of))
    runs = [[size for shard, size in zip(of, sizes, strict=True) if shard == at] for at in range(of[-1] + 1)]
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        assert len(run) <= shard_videos
        assert sum(max(size, 0) for size in run) <= 100 or sum(size > 0 for size in run) == 1
        if following is not None:
            assert len(run) == shard_videos or sum(max(size, 0) for size in run) + following[0] > 100


@settings(deadline=None)
@given(
    st.lists(st.integers(-1, 150), min_size=1, max_size=60), st.sampled_from([0.0, 7.0]), st.sampled_from([0.0, 1.0])
)
def test_a_shard_is_about_a_minute_where_the_cost_of_a_video_is_known(
    megabytes: list[int], per_video: float, per_mb: float
) -> None:
    """No shard exceeds SHARD_S seconds by its estimate, unless it is one video, and none is closed before it had to."""
    sizing = ShardSizing(40, "cpu", per_video, per_mb)
    sizes = [size * 1_000_000 for size in megabytes]
    of = with_shards(put(videos([f"v{at:03d}" for at in range(len(sizes))]), "size_bytes", sizes), sizing)["shard"]
    runs = [list(map(sizing.seconds, sizes))[at:end] for at, end in pairwise([*_starts(of.to_pylist()), len(sizes)])]
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        assert sum(run) <= SHARD_S or len(run) == 1
        assert following is None or len(run) == 40 or sum(run) + following[0] > SHARD_S


def _starts(shards: list[int]) -> list[int]:
    return [at for at, shard in enumerate(shards) if at == 0 or shard != shards[at - 1]]


def test_shards_do_not_depend_on_how_the_table_is_stored() -> None:
    """Rows in many chunks give the shards of rows in one."""
    rows = videos(NAMES)
    chunked = pa.concat_tables([rows.slice(at, 1) for at in range(len(rows))])
    assert (
        with_shards(chunked, ShardSizing(3))["shard"].to_pylist()
        == with_shards(rows, ShardSizing(3))["shard"].to_pylist()
    )
    assert with_shards(rows, ShardSizing(3))["shard"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


# --- digest -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(1, 12),
    st.sampled_from(["none", "snappy", "zstd"]),
    st.booleans(),
)
def test_the_digest_is_of_values_not_of_files(chunks: list[int], group: int, codec: str, dictionary: bool) -> None:
    """Chunks, row groups, compression and encoding of a table do not change its digest."""
    rows = table()
    ends = [min(sum(chunks[:at]), len(rows)) for at in range(len(chunks) + 1)] + [len(rows)]
    chunked = pa.concat_tables([rows.slice(a, b - a) for a, b in pairwise(ends)])
    out = io.BytesIO()
    pq.write_table(chunked, out, row_group_size=group, compression=codec, use_dictionary=dictionary)
    assert plan_digest(DIGEST, 1, chunked) == plan_digest(DIGEST, 1, pq.read_table(out)) == plan_digest(DIGEST, 1, rows)


def test_the_digest_is_of_every_value_and_of_the_order() -> None:
    """The recipe, any one value of any column (ours or the user's, null or not), a column's name, a row more or less
    and two rows swapped each give another digest."""
    rows = put(put(table(), "mtime_ns", [*range(10), None]), "etag", [None, *map(str, range(10))])
    digests = [
        plan_digest(DIGEST, 1, rows),
        plan_digest("e" * 64, 1, rows),
        plan_digest(DIGEST, 2, rows),
        plan_digest(DIGEST, 1, rows.slice(1)),
        plan_digest(DIGEST, 1, rows.slice(0, 10)),
        plan_digest(DIGEST, 1, rows.take([1, 0, *range(2, 11)])),
        plan_digest(DIGEST, 1, rows.rename_columns([*rows.column_names[:-1], "Label"])),
    ]
    for name in rows.column_names:
        values = rows[name].to_pylist()
        for at in range(len(values)):
            other = 99 if pa.types.is_integer(rows.schema.field(name).type) else "other"
            digests.append(plan_digest(DIGEST, 1, put(rows, name, [*values[:at], other, *values[at + 1 :]])))
            if rows.schema.field(name).nullable and values[at] is not None:
                digests.append(plan_digest(DIGEST, 1, put(rows, name, [*values[:at], None, *values[at + 1 :]])))
    assert len(set(digests)) == len(digests) > 100


def test_the_digest_of_these_rows_never_changes() -> None:
    """An output planned by an older version stays readable: the canonical encoding is fixed."""
    assert plan_digest(DIGEST, 1, table()) == "1a79578f9f5e72705542bbf073ba1702e3fb5313cf7b54a07142fc52c9673f4e"


USERS = {
    "timestamp": pa.array([datetime(2024, 1, 1, 0, 0, 0, 5), None], pa.timestamp("us")),
    "timestamp with zone": pa.array([datetime(2024, 1, 1), None], pa.timestamp("ms", "Europe/Berlin")),
    "seconds": pa.array([datetime(2024, 1, 1), None], pa.timestamp("s")),
    "date": pa.array([date(2024, 1, 1), None]),
    "time": pa.array([time(1, 2, 3), None]),
    "duration": pa.array([timedelta(seconds=1.5), None]),
    "decimal": pa.array([Decimal("1.50"), None]),
    "bytes": pa.array([b"\xff\0", None]),
    "dictionary": pa.array(["x", None]).dictionary_encode(),
    "large string": pa.array(["x", None], pa.large_string()),
    "half": pa.array([1.5, None], pa.float16()),
    "float": pa.array([float("nan"), -0.0], pa.float32()),
    "infinity": pa.array([float("inf"), None]),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "list": pa.array([[1, None], None], pa.list_(pa.int8())),
    "fixed list": pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"b": 1, "a": "x"}, None]),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("kind", USERS)
def test_a_users_column_of_any_type_comes_back(store: LocalStore, kind: str) -> None:
    """What a Parquet list may hold is in the manifest with its values, and the plan still matches its digest."""
    rows = table(("a", "b")).append_column("own", USERS[kind])
    plan = write_plan(store, 1, RECIPE, rows, 0, ShardSizing())
    own = Manifest(store, plan).videos["own"]
    assert repr(own.to_pylist()) == repr(USERS[kind].to_pylist())  # repr, because NaN is not NaN


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.duration("ns")])
def test_a_users_column_of_nanoseconds_comes_back(store: LocalStore, kind: pa.DataType) -> None:
    """`2024-01-01 00:00:00.123456789` in a CSV list is a timestamp of nanoseconds, and gives no traceback."""
    rows = table(("a", "b")).append_column("own", pa.array([1704067200123456789, None], pa.int64()).cast(kind))
    plan = write_plan(store, 1, RECIPE, rows, 0, ShardSizing())
    assert Manifest(store, plan).videos["own"].cast(pa.int64()).to_pylist() == [1704067200123456789, None]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (123_456_789, pa.time64("ns")),
        ([123_456_789], pa.list_(pa.timestamp("ns"))),
        ({"at": 123_456_789}, pa.struct([("at", pa.timestamp("ns"))])),
    ],
)
def test_nanoseconds_of_other_columns_are_no_traceback(store: LocalStore, value: Any, kind: pa.DataType) -> None:
    """Times of day and nested times of nanoseconds are kept, or refused with a message."""
    rows = table(("a", "b")).append_column("own", pa.array([value, None], kind))
    with contextlib.suppress(InputError):
        assert Manifest(store, write_plan(store, 1, RECIPE, rows, 0, ShardSizing())).videos.equals(rows)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_written_and_read_back(store: LocalStore) -> None:
    """A plan's record says how many videos, shards and bytes; the manifest gives the rows back."""
    rows = put(table(), "size_bytes", [*range(10), -1])
    plan = write_plan(store, 3, RECIPE, rows, 7, ShardSizing())
    assert plan.digest == plan_digest(RECIPE.digest, 3, rows) and plan.folder == f"plans/0003-{plan.digest[:8]}"
    assert (plan.seq, plan.n_videos, plan.n_shards, plan.size_bytes, plan.n_skipped) == (3, 11, 3, 45, 7)
    assert load_plans(store) == [plan]
    assert Manifest(store, plan).videos.equals(rows)
    assert sorted(files_of(store)) == [f"{plan.folder}/manifest-00000.parquet", plan.key]
    assert list(store.list("_job/tmp/")) == []


def test_a_plan_on_s3_is_the_same(store: LocalStore, bucket: str) -> None:
    """Both kinds of store give one plan of the same digest."""
    far = open_store(f"s3://{bucket}/out")
    plan = write_plan(far, 1, RECIPE, table(), 0, ShardSizing())
    assert load_plans(far) == [plan] == [write_plan(store, 1, RECIPE, table(), 0, ShardSizing())]
    assert Manifest(far, plan).videos.equals(table())


def test_writing_a_plan_again_changes_nothing(store: LocalStore) -> None:
    """The second time gives the same record and touches no file."""
    first = write_plan(store, 1, RECIPE, table(), 2, ShardSizing())
    before = files_of(store)
    assert write_plan(store, 1, RECIPE, table(), 2, ShardSizing()) == first
    assert files_of(store) == before


class Killed(Exception):
    """The simulated process was killed."""


class Dying(LocalStore):
    """A store whose process is killed before its n-th create, or right after it."""

    def __init__(self, url: str, creates: int, *, after: bool) -> None:
        super().__init__(url)
        self.left, self.after = creates, after

    def create(self, key: str, source: bytes | Path) -> Created:
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Killed
        done = super().create(key, source)
        if self.left < 0:
            raise Killed
        return done


def test_a_plan_exists_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any create, there is no plan until its record is there; doing it again completes the same files."""
    monkeypatch.setattr(manifest_module, "PART_ROWS", 4)
    whole = LocalStore(str(tmp_path / "whole"))
    plan = write_plan(whole, 1, RECIPE, table(), 0, ShardSizing())
    contents = {key: content for key, (content, _) in files_of(whole).items()}
    assert len(contents) == 4
    for creates in range(4):
        for after in (False, True):
            url = str(tmp_path / f"{creates}{after}")
            with pytest.raises(Killed):
                write_plan(Dying(url, creates, after=after), 1, RECIPE, table(), 0, ShardSizing())
            store = LocalStore(url)
            assert load_plans(store) == ([plan] if (creates, after) == (3, True) else [])
            assert write_plan(store, 1, RECIPE, table(), 0, ShardSizing()) == plan and load_plans(store) == [plan]
            assert {key: content for key, (content, _) in files_of(store).items()} == contents


def test_parts_of_another_writer_are_kept(store: LocalStore, tmp_path: Path) -> None:
    """A part left by an interrupted run with another Parquet library is adopted: the record has its sha256."""
    rows = table()
    whole = plan_digest(DIGEST, 1, rows)
    path = tmp_path / "part"
    pq.write_table(rows, path, compression="gzip", row_group_size=2)
    key = f"plans/0001-{whole[:8]}/manifest-00000.parquet"
    store.create(key, path)
    plan = write_plan(store, 1, RECIPE, rows, 0, ShardSizing())
    assert store.read(key) == path.read_bytes() and Manifest(store, plan).videos.equals(rows)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(7, 20))
def test_parts_end_where_shards_end(n_videos: int, shard_videos: int, part_rows: int) -> None:
    """No part has more than PART_ROWS rows, no shard is in two, together they are the plan, none could be longer."""
    rows = table([f"v{at}" for at in range(n_videos)], shard_videos)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "PART_ROWS", part_rows)
        store = LocalStore(folder)
        plan = write_plan(store, 1, RECIPE, rows, 0, ShardSizing())
        parts = [read_part(store, plan, part) for part in plan.parts]
        assert Manifest(store, plan).videos.equals(rows)
    assert pa.concat_tables(parts).equals(rows)
    assert [part.name for part in plan.parts] == [f"manifest-{at:05d}.parquet" for at in range(len(parts))]
    shards = [part["shard"].to_pylist() for part in parts]
    assert [(part.n_videos, part.first_shard, part.end_shard) for part in plan.parts] == [
        (len(of), of[0], of[-1] + 1) for of in shards
    ]
    assert all(after[0] == before[-1] + 1 for before, after in pairwise(shards))
    assert all(len(of) <= part_rows for of in shards)
    for before, after in pairwise(shards):
        assert len(before) + after.count(after[0]) > part_rows
    assert plan.n_shards == shards[-1][-1] + 1


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_shard_holds_its_videos(store: LocalStore) -> None:
    """Manifest.shard gives back the references that were planned, nulls and all; shards together are the plan."""
    refs = [
        VideoRef(f"id{at}", f"p{at}.mp4", f"file:///p{at}.mp4", f"{at:016d}", at - 1, *marks)
        for at, marks in enumerate([(None, None), (5, None), (2**62, '"etag"'), (None, '"e"'), (-1, None)])
    ]
    fields = [field for field in MANIFEST if field.name != "shard"]
    rows = pa.table([pa.array([getattr(r, f.name) for r in refs], f.type) for f in fields], schema=pa.schema(fields))
    plan = write_plan(store, 12, RECIPE, with_shards(rows, ShardSizing(2)), 0, ShardSizing())
    manifest = Manifest(store, plan)
    shards = [manifest.shard(at) for at in range(plan.n_shards)]
    assert [ref for shard in shards for ref in shard.videos] == refs
    assert [len(shard.videos) for shard in shards] == [manifest.n_videos(at) for at in range(3)] == [2, 2, 1]
    assert [(s.plan_seq, s.plan8, s.shard) for s in shards] == [(12, plan.digest[:8], at) for at in range(3)]
    assert shards[1].name == f"{plan.digest[:8]}-000000001"
    assert manifest.rows(1)["path"].to_pylist() == ["p2.mp4", "p3.mp4"]


def test_users_columns_of_a_shard_are_those_of_its_videos(store: LocalStore) -> None:
    """user_columns has video_id and the user's columns, and none of ours."""
    manifest = Manifest(store, write_plan(store, 1, RECIPE, table(), 0, ShardSizing()))
    own = manifest.user_columns(1)
    assert own.column_names == ["video_id", "label"]
    assert own.to_pylist() == [{"video_id": name, "label": f"label of {name}"} for name in "efgh"]


def test_a_shard_is_handed_over_without_the_rest_of_its_plan(store: LocalStore) -> None:
    """What is pickled for a worker is as large for a shard of a thousand as for one of three, and comes back equal."""
    sizes = []
    for seq, n_shards in ((1, 3), (2, 1000)):
        names = [f"{at:032x}" for at in range(4 * n_shards)]
        manifest = Manifest(store, write_plan(store, seq, RECIPE, table(names), 0, ShardSizing()))
        given = (manifest.shard(2), manifest.user_columns(2))
        content = pickle.dumps(given, protocol=5)
        assert pickle.loads(content) == given
        assert given[1].to_pylist() == [{"video_id": name, "label": f"label of {name}"} for name in names[8:12]]
        sizes.append(len(content))
    assert max(sizes) - min(sizes) < 100, sizes


def test_the_newest_plan_that_names_a_video_wins(store: LocalStore) -> None:
    """Every video of every plan has the number and the version of its newest plan; plans are in order of seq."""
    rows = videos(("a", "b", "c"))
    for seq, names, version in (
        (10_000, ["a"], "2" * 16),
        (1, ["a", "b", "c"], "0" * 16),
        (9999, ["a", "b"], "1" * 16),
    ):
        kept = rows.filter(pc.is_in(rows["video_id"], pa.array(names)))
        write_plan(
            store,
            seq,
            RECIPE,
            with_shards(put(kept, "version", [version] * len(kept)), ShardSizing(4)),
            0,
            ShardSizing(),
        )
    plans = load_plans(store)
    assert [plan.seq for plan in plans] == [1, 9999, 10_000]
    manifests = [Manifest(store, plan) for plan in reversed(plans)]
    newest = NewestPlans(manifests)
    seqs, rows = newest.find(pa.array(["a", "b", "c", "d"]))
    assert (seqs.tolist(), rows.tolist()) == ([10_000, 9999, 1, -1], [0, 1, 2, -1])
    assert (newest.n_videos, newest.n_superseded) == (3, 3)
    assert [newest.current(plan.seq, 0, plan.n_videos).tolist() for plan in plans] == [
        [False, False, True],
        [False, True],
        [True],
    ]
    assert NewestPlans([]).n_videos == 0


def test_the_superseded_rows_of_a_large_job_are_kept_in_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run writes them once. A file that is cut, of other plans or of other types is as if absent."""
    store = MemoryStore()
    plans = [
        Manifest(store, write_plan(store, seq, RECIPE, with_shards(videos(names), ShardSizing(4)), 0, ShardSizing()))
        for seq, names in ((1, "abcdefghijk"), (2, "ck"))
    ]
    newest = superseded.newest_plans(store, plans, write=True)
    assert not any(key.startswith(superseded.FOLDER) for key in store.objects), "so few rows are sorted each time"
    monkeypatch.setattr(superseded, "LEAST_ROWS", 1)
    superseded.newest_plans(store, plans, write=False)
    assert not any(key.startswith(superseded.FOLDER) for key in store.objects)
    superseded.newest_plans(store, plans, write=True)
    (key,) = (key for key in store.objects if key.startswith(superseded.FOLDER))
    good = store.objects[key]
    monkeypatch.setattr(NewestPlans, "_sorted", None)  # a caller that sorts ids gets a TypeError
    kept = superseded.newest_plans(store, plans, write=False)
    for one in plans:
        rows = (one.plan.seq, 0, one.plan.n_videos)
        assert kept.current(*rows).tolist() == newest.current(*rows).tolist()
    assert (kept.n_videos, kept.n_superseded) == (newest.n_videos, newest.n_superseded) == (11, 2)
    digests = [one.plan.digest for one in plans]
    bits, wide = pa.table([pa.array(newest.superseded)], schema=superseded.SCHEMA), pa.array([0, 0], pa.int64())
    others = (
        content_of(bits, {"plan_digests": digests[::-1]}),
        content_of(pa.table({"bits": wide}), {"plan_digests": digests}),
        content_of(bits.slice(1), {"plan_digests": digests}),
    )
    for bad in (good[:-9], b"", *others):
        store.objects[key] = bad
        with pytest.raises(TypeError):
            superseded.newest_plans(store, plans, write=False)


# --- damage -----------------------------------------------------------------------------------------------------------


def read_all(store: Store) -> list[tuple[PlanRecord, pa.Table]]:
    return [(plan, Manifest(store, plan).videos) for plan in load_plans(store)]


def flips(store: LocalStore, key: str, step: int, check: Callable[[], None]) -> None:
    """Flip one bit in every `step`-th byte of an object, and call `check` each time."""
    path, content = store.root / key, store.read(key)
    for at in range(0, len(content), step):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << (at // step) % 8]) + content[at + 1 :])
        check()
    path.write_bytes(content)


@pytest.mark.fault(44)
def test_a_flipped_bit_of_a_part_is_damage(store: LocalStore) -> None:
    """Whatever bit of a manifest part flips, the manifest is refused and the file named."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())

    def check() -> None:
        with pytest.raises(DamagedJob, match=r"manifest-00000\.parquet is not the file that was planned; restore it"):
            Manifest(store, plan)

    flips(store, f"{plan.folder}/manifest-00000.parquet", 16, check)
    assert Manifest(store, plan).videos.equals(table())


@pytest.mark.fault(44)
def test_a_missing_part_is_damage(store: LocalStore) -> None:
    """A missing part is reported, with a remedy."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    (store.root / plan.folder / "manifest-00000.parquet").unlink()
    with pytest.raises(DamagedJob, match=r"manifest-00000\.parquet is missing; restore it, or start at another output"):
        Manifest(store, plan)


@pytest.mark.fault(44)
def test_a_flipped_bit_of_a_plans_record_is_damage(store: LocalStore) -> None:
    """Whatever bit of a plan's record flips, the plan is refused; status and progress rest on its numbers."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())

    def check() -> None:
        with pytest.raises(DamagedJob, match=r"0001\.json"):
            load_plans(store)

    flips(store, plan.key, 1, check)
    assert load_plans(store) == [plan]


@pytest.mark.parametrize(
    "name", ["n_videos", "size_bytes", "n_skipped", "schema_version", "part.n_videos", "part.end_shard"]
)
@pytest.mark.fault(44)
def test_an_edited_record_is_damage(store: LocalStore, name: str) -> None:
    """A value that was edited by hand is found, whichever it was, and the file is named."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    path = store.root / plan.key
    given = json.loads(path.read_text())
    record = given["plan"]["parts"][0] if name.startswith("part.") else given["plan"]
    record[name.removeprefix("part.")] = 99
    path.write_text(json.dumps(given))
    with pytest.raises(DamagedJob, match=r"0001\.json was edited"):
        load_plans(store)


@pytest.mark.parametrize("name", ["digest", "recipe_digest", "n_shards", "seq"])
def test_a_record_of_other_rows_is_damage(store: LocalStore, name: str) -> None:
    """A valid record that does not belong to these parts is found: other digest (its end, too), recipe or counts."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    value = getattr(plan, name)
    other = replace(plan, **{name: value[:-1] + "_" if isinstance(value, str) else value + 1})
    (store.root / plan.key).write_bytes(other.to_json())
    with pytest.raises(DamagedJob):
        read_all(store)


def test_a_record_under_another_number_is_damage(store: LocalStore) -> None:
    """A record that was renamed, or copied from another output, is found before any manifest is read."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    (store.root / plan.key).rename(store.root / "plans" / "0002.json")
    with pytest.raises(DamagedJob, match="not the record of that number"):
        load_plans(store)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"plan": {"parts": 5}}', b"{"])
def test_a_record_that_cannot_be_read_is_damage(store: LocalStore, content: bytes) -> None:
    """Anything that is not a plan is DamagedJob with a remedy."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    (store.root / plan.key).write_bytes(content)
    with pytest.raises(DamagedJob, match=r"0001\.json cannot be read .*restore it"):
        load_plans(store)


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"plan": 5}', '{"plan": []}', '{"plan": {"parts": [5]}}'])
def test_a_record_of_another_shape_is_damage(store: LocalStore, content: str) -> None:
    """Valid JSON that is not a plan is DamagedJob too, not a traceback."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    (store.root / plan.key).write_text(content)
    with pytest.raises(DamagedJob):
        load_plans(store)


def test_of_two_that_plan_at_once_one_is_told(store: LocalStore) -> None:
    """A number belongs to the plan whose record was created first; the other run stops, and the job continues."""
    first = write_plan(store, 1, RECIPE, table(("a", "b")), 0, ShardSizing())
    with pytest.raises(AlreadyRunning, match="planned at this moment"):
        write_plan(store, 1, RECIPE, table(("a", "c")), 0, ShardSizing())
    assert load_plans(store) == [first]
    second = write_plan(store, 2, RECIPE, table(("a", "c")), 0, ShardSizing())
    assert load_plans(store) == [first, second]


def test_the_same_videos_planned_again_are_other_shards(store: LocalStore) -> None:
    """A second retry of an unchanged file is a plan with new shards, not those of the first retry."""
    plans = [write_plan(store, seq, RECIPE, table(), 0, ShardSizing()) for seq in (1, 2)]
    names = [Manifest(store, plan).shard(0).name for plan in plans]
    assert names[0] != names[1]


def test_no_plans_are_no_damage(store: LocalStore) -> None:
    """An output without plans has none."""
    assert load_plans(store) == []


# --- records that somebody else wrote ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        *[("part", "name", name) for name in ("../../secret.parquet", "/etc/passwd", "", ".", "manifest-0.parquet", 7)],
        ("part", "name", "manifest-00000.parquet\n"),
        ("part", "sha256", "../.."),
        ("part", "n_videos", 10**12),
        ("part", "first_shard", -1),
        ("part", "end_shard", True),
        ("plan", "digest", "../../x" + "0" * 57),
        ("plan", "recipe_digest", "x"),
        ("plan", "n_shards", 10**15),
        ("plan", "n_videos", 10**15),
        ("plan", "size_bytes", None),
        ("plan", "parts", ()),
    ],
)
@pytest.mark.fault(57)
def test_a_record_names_only_files_of_its_own_plan(store: LocalStore, where: str, name: str, value: Any) -> None:
    """A record with a correct digest, as a stranger can write it, is refused if a name or count is not one of ours."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    if where == "part":
        plan = replace(plan, parts=(replace(plan.parts[0], **{name: value}), *plan.parts[1:]))
    else:
        plan = replace(plan, **{name: value})
    (store.root / "plans" / "0001.json").write_bytes(plan.to_json())
    with pytest.raises(DamagedJob, match=r"plans/0001\.json cannot be read \(.*\); restore it"):
        load_plans(store)


@pytest.mark.fault(57)
def test_a_part_of_other_columns_is_damage(store: LocalStore) -> None:
    """A part whose digest the record states is refused unless it is a manifest: columns, types and number of rows."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    path = store.root / plan.folder / plan.parts[0].name
    for content in (table().drop_columns(["uri"]), table().slice(1), put(table(), "size_bytes", [None] * 11), None):
        if content is None:
            path.write_bytes(b"PAR1 is not all of it")
        elif content["size_bytes"].null_count:
            path.unlink()
            pq.write_table(content.set_column(4, "size_bytes", content["size_bytes"].cast(pa.string())), path)
        else:
            path.unlink()
            pq.write_table(content, path)
        part = replace(plan.parts[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        with pytest.raises(DamagedJob, match=r"manifest-00000\.parquet is no manifest"):
            read_part(store, plan, part)


@pytest.mark.fault(57)
@pytest.mark.parametrize("lost", [False, True])
def test_a_plan_does_not_claim_more_than_its_parts_can_hold(store: LocalStore, lost: bool) -> None:
    """A million shards claimed for a part of eleven rows, or for a missing one, are refused before they are counted."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    part = replace(plan.parts[0], n_videos=10**6, end_shard=10**6)
    claims = replace(plan, n_videos=10**6, n_shards=10**6, parts=(part,))
    (store.root / plan.key).write_bytes(claims.to_json())
    if lost:
        (store.root / plan.folder / part.name).unlink()
    why = "is missing" if lost else r"has \d+ bytes, too few"
    with pytest.raises(DamagedJob, match=rf"plans/0001\.json claims 1000000 videos in manifest-00000\.parquet.*{why}"):
        load_plans(store)
    again = replace(
        claims,
        n_videos=11,
        n_shards=6,
        parts=tuple(replace(part, n_videos=n, first_shard=first, end_shard=first + 3) for n, first in ((5, 0), (6, 3))),
    )
    (store.root / plan.key).write_bytes(again.to_json())
    with pytest.raises(DamagedJob, match=r"cannot be read \(its part 1 is manifest-00000\.parquet\)"):
        load_plans(store)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=8), st.integers(0, 2), st.integers(1, 5))
def test_the_rows_of_a_part_are_in_the_shards_that_its_record_claims(shards: list[int], first: int, end: int) -> None:
    """Of all shard columns, only those that count every claimed shard up, from the first to the last, are read."""
    right = shards == sorted(shards) and set(shards) == set(range(first, end))
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        rows = table(tuple(map(str, range(len(shards)))))
        rows = put(rows, "shard", shards)
        path = Path(folder, "plans/0001-00000000/manifest-00000.parquet")
        path.parent.mkdir(parents=True)
        pq.write_table(rows, path)
        part = PartRecord(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), len(shards), first, end)
        plan = PlanRecord(1, "0" * 64, RECIPE, len(shards), end, 0, 0, (part,), ShardSizing())
        if right:
            assert read_part(store, plan, part)["shard"].to_pylist() == shards
        else:
            with pytest.raises(DamagedJob, match=r"is no manifest \(its rows are not those of shards"):
                read_part(store, plan, part)


@pytest.mark.fault(57)
def test_rows_that_the_record_does_not_claim_are_not_read(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small part that says it has ten million rows is refused before any of them is in memory."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    path = store.root / plan.folder / plan.parts[0].name
    path.unlink()
    pq.write_table(pa.table({"a": pa.repeat(1, 10**7)}), path)
    assert path.stat().st_size < 10**5
    part = replace(plan.parts[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(DamagedJob, match=r"is no manifest \(it has 10000000 rows and not 11\)"):
        read_part(store, plan, part)


@pytest.mark.fault(58)
def test_stray_files_among_the_plans_are_skipped_and_named(store: LocalStore) -> None:
    """Files of a file manager are not plans: each is named, and the plan is read. Half a plan is damage."""
    plan = write_plan(store, 1, RECIPE, table(), 0, ShardSizing())
    strays = [".DS_Store", "._0001.json", "0001.json.swp", "1.json", f"0001-{plan.plan8}/.DS_Store"]
    for name in strays:
        (store.root / "plans" / name).write_bytes(b"\x00\x05\x16\x07")
    with pytest.warns(StrayFile) as warned:
        assert load_plans(store) == [plan]
    assert {str(one.message).partition(" is not")[0].partition("/plans/")[2] for one in warned} == set(strays)
    for content in (b"", b'{"plan": {', b"[" * 100_000, b'{"plan": NaN, "plan_digest": 1}'):
        (store.root / "plans" / "0002.json").write_bytes(content)
        with pytest.raises(DamagedJob, match=r"plans/0002\.json cannot be read"), pytest.warns(StrayFile):
            load_plans(store)
