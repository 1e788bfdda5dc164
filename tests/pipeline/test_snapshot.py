"""Snapshots: only the newest rows, nothing of an excluded video, no snapshot.json before every file is verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset import snapshot_parts as parts
from p3d.pipeline.dataset.commit import clips_key, commit_shard, derive, failures_key, videos_key
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, load_plans, write_plan
from p3d.pipeline.dataset.schema import open_parquet, read_footer, write_parquet
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY, SnapshotRecord, problems_of, read_snapshot
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.errors import (
    AlreadyRunning,
    DamagedJob,
    InputError,
    OtherRecipe,
    StoreCorrupt,
    StoreUnknown,
    Unfinished,
)
from p3d.pipeline.recipe import JobRecord, Recipe, ShardSizing, digest
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Created, Store
from p3d.pipeline.storage.urls import open_store
from tests.conftest import REPO
from tests.pipeline.rows import DIM, recipe, shard_rows, videos

WEIGHTS = b"the weights, as far as these tests go"
NAMES = tuple("abcdefghij")
FOLDERS = ("clips", "videos", "failures")


def recipe_(**changes: object) -> Recipe:
    """A recipe that stores scores, with weights that exist."""
    return recipe(**({"weights_sha256": hashlib.sha256(WEIGHTS).hexdigest(), "scores": True} | changes))


def add_plan(
    store: Store,
    table: pa.Table,
    *,
    chosen: Recipe | None = None,
    seq: int = 1,
    shard_videos: int = 4,
    frames: Sequence[int] = (40, 0, 16, 9),
    commit: bool = True,
) -> Manifest:
    """Add a plan to the job at `store`, which is created if it does not exist; committed, or not yet."""
    chosen = chosen or recipe_()
    store.create("job.json", JobRecord(chosen, "random:0", {"numpy": "2"}).to_json())
    store.create(f"weights/{chosen.weights_sha256}.safetensors", WEIGHTS)
    manifest = Manifest(
        store, write_plan(store, seq, chosen, with_shards(table, ShardSizing(shard_videos)), 0, ShardSizing())
    )
    for shard in range(manifest.plan.n_shards if commit else 0):
        rows = shard_rows(manifest, shard, seed=seq, frames=frames, n_scores=chosen.n_scores)
        commit_shard(store, rows, chosen, manifest.user_columns(shard))
    return manifest


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """Ten videos; a second plan has the failed b and f and the replaced c again, and a new video x."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos(NAMES))
    add_plan(store, videos(("b", "f", "c", "x")), seq=2, frames=(33, 0, 50, 64), shard_videos=3)
    return store


@pytest.fixture
def dest(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "dest"))


def newest(store: Store, leave_out: Sequence[str] = ()) -> NewestRows:
    job = JobRecord.from_json(store.read("job.json"), store.url)
    return NewestRows(store, job, frozenset(leave_out))


def counts(record: SnapshotRecord) -> tuple[int, ...]:
    found = record.counts
    return found.videos, found.clips, found.failures, found.excluded, found.pending, found.superseded


def files(store: LocalStore) -> list[str]:
    """Every file and folder under a folder, relative to it."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*"))


def by_sql(out: Path, folder: str, leave_out: Sequence[str]) -> list[tuple[object, ...]]:
    """The rows of a folder by the rule of docs/how-to/results.md: only the newest plan that names a video counts."""
    chosen = ", ".join(f"'{one}'" for one in ("", *leave_out))
    return duckdb.sql(
        f"""SELECT v.* FROM read_parquet('{out}/{folder}/*.parquet', union_by_name=true) v WHERE NOT EXISTS (
          FROM (SELECT video_id, plan_seq FROM '{out}/videos/*.parquet'
                UNION ALL SELECT video_id, plan_seq FROM '{out}/failures/*.parquet') newer
          WHERE newer.video_id = v.video_id AND newer.plan_seq > v.plan_seq)
        AND v.video_id NOT IN ({chosen}) ORDER BY ALL"""
    ).fetchall()


@pytest.mark.parametrize("seed", range(8))
def test_a_snapshot_is_the_newest_rows_of_sql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """For any plans, shards and excluded ids, DEST holds what the SQL of how-to/results.md finds, in plan order."""
    print(f"{seed = }")
    rng = Random(seed)
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", rng.randint(1, 40))
    monkeypatch.setattr(parts, "GROUP_ROWS", rng.randint(1, 40))
    monkeypatch.setattr(parts, "FILE_BYTES", rng.choice((1, 20_000, 1024**3)))
    out, dest = LocalStore(str(tmp_path / "out")), LocalStore(str(tmp_path / "dest"))
    chosen = recipe_(pool=rng.choice(("mean", "mean+max")), embedding_dtype=rng.choice(("float32", "float16")))
    chosen = replace(chosen, scores=rng.choice((False, True)))
    state: dict[str, tuple[int, int]] = {}  # video_id -> its newest plan, and position in it
    n_planned = 0
    for seq in range(1, rng.randint(1, 4) + 1):
        names = rng.sample([f"v{at:02d}" for at in range(20)], rng.randint(1, 20))
        frames = [rng.choice((0, 9, 16, 40, 200)) for _ in range(rng.randint(1, 6))]
        add_plan(out, videos(names), chosen=chosen, seq=seq, shard_videos=rng.randint(1, 9), frames=frames)
        state |= {name: (seq, at) for at, name in enumerate(names)}
        n_planned += len(names)
    leave_out = rng.sample(sorted(state), rng.randint(0, len(state) // 2))

    record = snapshot(newest(out, leave_out), dest)

    for folder in FOLDERS:
        expected = by_sql(out.root, folder, leave_out)
        assert duckdb.sql(f"FROM '{dest.root}/{folder}/*.parquet' ORDER BY ALL").fetchall() == expected, folder
        assert getattr(record.counts, folder) == len(expected)
        ids = pl.read_parquet(dest.root / folder / "*.parquet")["video_id"].to_list()
        assert ids == sorted(ids, key=lambda one: state[one]), "not in plan order"
        for at, path in enumerate(sorted((dest.root / folder).iterdir())):
            file = pq.ParquetFile(path)
            assert path.name == f"part-{at:05d}.parquet"
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            assert max(groups) <= parts.GROUP_ROWS
            source = next((out.root / folder).iterdir())
            assert file.schema_arrow.equals(pq.read_schema(source))
    assert counts(record)[3:] == (len(leave_out), 0, n_planned - len(state))
    assert read_snapshot(dest) == record
    assert problems_of(dest, record) == []


def test_a_snapshot_is_whole_files_and_a_record(out: LocalStore, dest: LocalStore) -> None:
    """DEST holds one file per folder, the weights and snapshot.json, and nothing else; the record verifies each."""
    record = snapshot(newest(out), dest)
    weights = f"weights/{recipe_().weights_sha256}.safetensors"
    keys = [*(f"{folder}/part-00000.parquet" for folder in FOLDERS), weights]
    assert [one.key for one in record.files] == keys
    assert files(dest) == sorted([*FOLDERS, "weights", *keys, SNAPSHOT_KEY])
    assert [one.sha256 for one in record.files] == [hashlib.sha256(dest.read(key)).hexdigest() for key in keys]
    assert counts(record) == (9, 22, 2, 0, 0, 3)
    assert (record.job.recipe, record.source) == (recipe_(), out.url)
    assert "canary" not in dest.read(SNAPSHOT_KEY).decode()


def test_pages_of_a_snapshot_have_checksums(out: LocalStore, dest: LocalStore) -> None:
    """A bit that flips inside a page of DEST is found by any reader that checks checksums; rows are zstd."""
    snapshot(newest(out), dest)
    path = dest.root / "clips" / "part-00000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(at) for at in range(group.num_columns)][-2:]
    assert [column.path_in_schema for column in columns] == ["embedding.list.element", "probs.list.element"]
    for column in columns:
        assert column.compression == "ZSTD" and "BYTE_STREAM_SPLIT" in column.encodings
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 4
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        open_parquet(path).read()


def dictionaries(array: pa.Array) -> list[object]:
    """All values in the dictionaries of an array, at any depth, used or not."""
    if pa.types.is_dictionary(array.type):
        return array.dictionary.to_pylist()
    return dictionaries(array.values) if pa.types.is_list(array.type) else []


def secrets_in(store: LocalStore, words: Sequence[str]) -> list[str]:
    """Where any of the words occurs: names, bytes, and the values, dictionaries and metadata of Parquet files."""
    found = [name for name in files(store) if any(word in name for word in words)]
    for path in (path for path in store.root.rglob("*") if path.is_file()):
        texts = [path.read_bytes().decode("latin-1")]
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            texts += [repr(file.metadata.metadata), repr(file.schema_arrow.metadata), repr(file.read().to_pylist())]
            texts += [repr(dictionaries(chunk)) for column in file.read().columns for chunk in column.chunks]
            strings = [name for name in file.schema_arrow.names if file.schema_arrow.field(name).type == pa.string()]
            encoded = pq.read_table(path, columns=strings, read_dictionary=strings)
            texts += [repr(dictionaries(chunk)) for column in encoded.columns for chunk in column.chunks]
            for group in range(file.num_row_groups):
                row_group = file.metadata.row_group(group)
                texts += [repr(row_group.column(at).statistics) for at in range(row_group.num_columns)]
        found += [str(path) for text in texts if any(word in text for word in words)]
    return found


def test_nothing_of_an_excluded_video_is_in_a_snapshot(tmp_path: Path, dest: LocalStore) -> None:
    """An excluded id, its path and its user columns occur in no byte of DEST: not even in a dictionary or metadata."""
    out = LocalStore(str(tmp_path / "out"))
    names = [f"{kind}{at}" for at in range(4) for kind in ("kept", "GONE")]
    table = videos(names)
    owners = pa.array([f"owner of {name}" for name in names])
    nested = pa.ListArray.from_arrays(pa.array(range(len(names) + 1), pa.int32()), owners.dictionary_encode())
    table = table.append_column("owner", owners.dictionary_encode()).append_column("tags", nested)
    table = table.replace_schema_metadata({"pandas": "{'GONE1': 1}"})
    add_plan(out, table, shard_videos=3, frames=(40, 16, 0))
    add_plan(out, videos(names[:3]), seq=2)
    gone = [name for name in names if name.startswith("GONE")]
    assert secrets_in(out, gone), "the search finds nothing where there is something"

    record = snapshot(newest(out, gone), dest)

    assert secrets_in(dest, ["GONE"]) == []
    assert record.counts.excluded == 4
    assert record.counts.videos + record.counts.failures == 4
    owners_there = duckdb.sql(f"SELECT owner, tags FROM '{dest.root}/videos/*.parquet'").fetchall()
    assert all(owner is None or tags == [owner] for owner, tags in owners_there)
    assert any(owner for owner, _ in owners_there)


@pytest.mark.fault(45)
def test_a_flipped_bit_in_the_source_never_becomes_a_row(out: LocalStore, tmp_path: Path) -> None:
    """Each random flip in a data file of OUT is reported as damage, or the snapshot equals that of the undamaged OUT.
    With damage there is never a snapshot.json. A flip in a clips file is always damage."""
    seed = 20261124
    print(f"{seed = }")
    rng = Random(seed)
    keys = [info.key for folder in FOLDERS for info in out.list(f"{folder}/")]
    whole = {one.key: one.sha256 for one in snapshot(newest(out), LocalStore(str(tmp_path / "whole"))).files}
    found = 0
    for trial in range(60):
        key = rng.choice(keys)
        content = out.read(key)
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (out.root / key).write_bytes(flipped)
        dest = LocalStore(str(tmp_path / f"dest{trial}"))
        try:
            record = snapshot(newest(out), dest)
        except DamagedJob as error:
            found += 1
            assert key in str(error) or key.startswith("clips/"), f"flip {trial} of {key}: {error}"
            assert dest.head(SNAPSHOT_KEY) is None
        else:
            assert not key.startswith("clips/"), f"flip {trial} of {key}"
            assert {one.key: one.sha256 for one in record.files} == whole, f"flip {trial} of {key}"
        (out.root / key).write_bytes(content)
    assert found > 40


class Dies(LocalStore):
    """A store whose process is killed after a number of creates."""

    left = 10**9

    def create(self, key: str, source: bytes | Path) -> Created:
        self.left -= 1
        if self.left < 0:
            raise StoreUnknown("killed")
        return super().create(key, source)


def test_a_snapshot_that_is_killed_has_no_record(
    out: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill before any of its creates, there is no snapshot.json and no temporary file, and DEST is refused next
    time with a remedy. After the last create the snapshot is complete."""
    monkeypatch.setattr(parts, "GROUP_ROWS", 9)
    monkeypatch.setattr(parts, "FILE_BYTES", 1)
    for steps in range(30):
        dest = Dies(str(tmp_path / f"dest{steps}"))
        dest.left = steps
        try:
            snapshot(newest(out), dest)
        except StoreUnknown:
            assert dest.head(SNAPSHOT_KEY) is None
            assert not list(dest.root.rglob("*.tmp"))
            dest.left = 10**9
            if list(dest.list()):
                with pytest.raises(OtherRecipe, match="not finished; remove it"):
                    snapshot(newest(out), dest)
            continue
        assert problems_of(dest, read_snapshot(dest)) == []
        break
    assert 8 <= steps < 29, "the kill points were not all there are"


def test_a_snapshot_that_is_killed_outright_is_seen_as_unfinished(out: LocalStore, dest: LocalStore) -> None:
    """SIGKILL leaves at most temporary files and finished parts: no snapshot.json, and a refusal with a remedy."""
    code = f"""
import os, signal
from tests.pipeline.test_snapshot import LocalStore, newest, snapshot
class Dies(LocalStore):
    def create(self, key, source):
        if key.startswith("videos/"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(key, source)
snapshot(newest(LocalStore({out.url!r})), Dies({dest.url!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False)
    assert done.returncode == -9
    assert [key for key in files(dest) if key.endswith((".parquet", ".json"))] == ["clips/part-00000.parquet"]
    assert list(dest.root.rglob("*.tmp"))
    with pytest.raises(OtherRecipe, match="not finished; remove it"):
        snapshot(newest(out), dest)


def test_progress_is_told_step_by_step(out: LocalStore, dest: LocalStore) -> None:
    """Shards as they are copied, then files as they are read back, each up to its number."""
    steps: list[tuple[str, int, int]] = []
    record = snapshot(newest(out), dest, on_step=lambda *step: steps.append(step))
    n_files = len(record.files)
    assert steps == [
        *(("copied", at, 5) for at in range(1, 6)),
        *(("read back", at, n_files) for at in range(1, n_files + 1)),
    ]


class Spoils(LocalStore):
    """A store that stores wrong bytes for one key."""

    spoiled = ""

    def create(self, key: str, source: bytes | Path) -> Created:
        made = super().create(key, source)
        if key == self.spoiled:
            path = self.root / key
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.unlink()
            path.write_bytes(content)
        return made


@pytest.mark.parametrize("key", [*(f"{folder}/part-00000.parquet" for folder in FOLDERS), "weights"])
def test_corruption_by_the_store_is_found_before_the_record(out: LocalStore, tmp_path: Path, key: str) -> None:
    """Every file is read back: a bit that changed on its way to DEST ends the snapshot without snapshot.json."""
    dest = Spoils(str(tmp_path / "dest"))
    dest.spoiled = f"weights/{recipe_().weights_sha256}.safetensors" if key == "weights" else key
    with pytest.raises(StoreCorrupt, match=key):
        snapshot(newest(out), dest)
    assert dest.head(SNAPSHOT_KEY) is None


class Races(LocalStore):
    """A store in which another process creates one key first."""

    def create(self, key: str, source: bytes | Path) -> Created:
        if key == "videos/part-00000.parquet":
            super().create(key, b"mine")
        return super().create(key, source)


def test_two_snapshots_into_one_folder_do_not_mix(out: LocalStore, tmp_path: Path) -> None:
    """A file made by another process meanwhile ends the snapshot; an own file whose response was lost does not."""
    dest = Races(str(tmp_path / "dest"))
    with pytest.raises(AlreadyRunning, match="videos/part-00000"):
        snapshot(newest(out), dest)
    assert dest.head(SNAPSHOT_KEY) is None

    class LostReply(LocalStore):
        def create(self, key: str, source: bytes | Path) -> Created:
            if not key.startswith("_job/"):
                super().create(key, source.read_bytes() if isinstance(source, Path) else source)
            return super().create(key, source)

    again = LostReply(str(tmp_path / "again"))
    assert snapshot(newest(out), again).counts.videos == 9


def test_videos_that_are_not_done_are_refused_or_counted(tmp_path: Path, dest: LocalStore) -> None:
    """Pending videos and shards without derived files prevent a snapshot; with skip_pending they are counted and left
    out, and an older row never replaces one. Excluded videos do not matter."""
    out = LocalStore(str(tmp_path / "out"))
    manifest = add_plan(out, videos(NAMES))
    add_plan(out, videos(("a", "b")), seq=2, commit=False)
    (out.root / videos_key(manifest.shard(1).name)).unlink()
    with pytest.raises(Unfinished, match=r"6 of the videos .*`p3d resume"):
        snapshot(newest(out), dest)
    assert not dest.root.exists()
    assert newest(out, ("a", "b", *"efgh")).pending == 0
    record = snapshot(newest(out, ["h"]), dest, skip_pending=True)
    assert counts(record)[2:] == (1, 1, 5, 2)
    assert pl.read_parquet(dest.root / "videos/*.parquet")["video_id"].to_list() == ["c", "d", "i"]


def test_unknown_ids_are_refused(out: LocalStore, dest: LocalStore) -> None:
    """A typing mistake in a takedown list must not pass unnoticed, unless allow_unknown is set."""
    rows = newest(out, ["a", "zebra", "yak"])
    with pytest.raises(InputError, match=r"2 of the ids .* 'yak', 'zebra'"):
        snapshot(rows, dest)
    assert not dest.root.exists()
    assert snapshot(rows, dest, allow_unknown=True).counts.excluded == 1


def test_all_videos_may_be_excluded(out: LocalStore, dest: LocalStore) -> None:
    """The result is tables without rows, which readers can open."""
    record = snapshot(newest(out, [*NAMES, "x"]), dest)
    assert counts(record) == (0, 0, 0, 11, 0, 3)
    assert pl.read_parquet(dest.root / "clips/*.parquet").shape == (0, 11)
    assert duckdb.sql(f"SELECT count(*), any_value(label) FROM '{dest.root}/videos/*.parquet'").fetchall() == [
        (0, None)
    ]


def test_a_snapshot_of_a_snapshot_is_that_of_the_job(out: LocalStore, dest: LocalStore, tmp_path: Path) -> None:
    """Ids can be taken down later, when OUT is gone: rows and counts are those of one snapshot without both lists."""
    both, second = LocalStore(str(tmp_path / "both")), LocalStore(str(tmp_path / "second"))
    expected = snapshot(newest(out, ["a", "f", "x"]), both)
    snapshot(newest(out, ["a"]), dest)
    with pytest.raises(InputError, match="'a'"):
        snapshot(SnapshotRows(dest, frozenset({"a"})), second)
    record = snapshot(SnapshotRows(dest, frozenset({"f", "x"})), second)
    assert record.counts == expected.counts
    assert (record.job, record.plans, record.source) == (expected.job, expected.plans, dest.url)
    for folder in FOLDERS:
        tables = [pq.read_table(store.root / folder / "part-00000.parquet") for store in (both, second)]
        assert tables[0].equals(tables[1], check_metadata=True), folder
    path = dest.root / "videos" / "part-00000.parquet"
    path.write_bytes(path.read_bytes().replace(b"h264", b"h265"))
    with pytest.raises(DamagedJob, match="not the file that"):
        snapshot(SnapshotRows(dest), LocalStore(str(tmp_path / "third")))
    path.unlink()
    with pytest.raises(DamagedJob, match=r"part-00000.parquet does not exist, but it should be there. Restore it"):
        SnapshotRows(dest)


def test_without_clips_they_are_neither_read_nor_written(out: LocalStore, dest: LocalStore, tmp_path: Path) -> None:
    """--no-clips reads only the footers of clips files; videos and failures are the same as with them."""
    snapshot(newest(out), dest)
    for info in list(out.list("clips/")):
        content = bytearray(out.read(info.key))
        content[40] ^= 1  # in the first page
        (out.root / info.key).write_bytes(content)
    slim = LocalStore(str(tmp_path / "slim"))
    record = snapshot(newest(out), slim, clips=False)
    assert (record.counts.clips, record.with_clips) == (0, False)
    assert not (slim.root / "clips").exists()
    for folder in ("videos", "failures"):
        assert slim.read(f"{folder}/part-00000.parquet") == dest.read(f"{folder}/part-00000.parquet")
    again = snapshot(SnapshotRows(slim), LocalStore(str(tmp_path / "again")))
    assert not again.with_clips
    with pytest.raises(DamagedJob):
        snapshot(newest(out), LocalStore(str(tmp_path / "damaged")))


def test_other_damage_in_the_source_is_told_with_a_remedy(out: LocalStore, dest: LocalStore) -> None:
    """A missing clips file, rows of other clips, or wrong weights: DamagedJob, and no snapshot.json."""
    first, second = sorted(info.key for info in out.list("videos/"))[:2]
    content = out.read(first)
    (out.root / first).write_bytes(out.read(second))
    with pytest.raises(DamagedJob, match="--repair"):
        snapshot(newest(out), dest)
    (out.root / first).write_bytes(content)
    weights = out.root / "weights" / f"{recipe_().weights_sha256}.safetensors"
    weights.write_bytes(b"others")
    with pytest.raises(DamagedJob, match="sha256 differs"):
        snapshot(newest(out), LocalStore(dest.url + "2"))
    (out.root / first.replace("videos", "clips")).unlink()
    with pytest.raises(DamagedJob, match=r"is gone.*--repair"):
        newest(out)


def put(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    at = table.schema.get_field_index(column)
    return table.set_column(at, table.schema.field(at), values.cast(table.schema.field(at).type))


def reversed_rows(table: pa.Table) -> pa.Table:
    return table.take(list(reversed(range(table.num_rows))))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda clips: clips.slice(1), "are not those of its outcomes; videos with lost rows: 1"),
        (reversed_rows, "are not those of its outcomes"),
        (lambda clips: put(clips, "clip_index", pa.array([1, *clips["clip_index"].to_pylist()[1:]])), "are not those"),
        (lambda clips: put(clips, "video_id", pa.array(["c", *clips["video_id"].to_pylist()[1:]])), "are not those"),
        (lambda clips: put(clips, "plan_seq", pa.array([2] * clips.num_rows)), "are not those"),
        (lambda clips: put(clips, "end_frame", clips["start_frame"].combine_chunks()), "impossible"),
        (lambda clips: put(clips, "embedding", pa.array([[0.0] * DIM] * clips.num_rows)), "impossible"),
        (lambda clips: put(clips, "embedding", pa.array([[float("nan")] * DIM] * clips.num_rows)), "impossible"),
        (lambda clips: put(clips, "probs", pa.array([[0.5, 0.4, 0.0]] * clips.num_rows)), "impossible"),
        (lambda clips: put(clips, "path", pa.array([b"\xff"] * clips.num_rows).view(pa.string())), "UTF8"),
        (lambda clips: clips.drop_columns(["n_padded"]), "other columns"),
        (lambda clips: clips.drop_columns(["probs"]), "other columns"),
    ],
)
def test_whole_files_with_wrong_clips_are_damage(
    out: LocalStore, dest: LocalStore, spoil: Callable[[pa.Table], pa.Table], says: str
) -> None:
    """A readable clips file, with matching derived files, is still checked against its plan and outcomes."""
    manifest = Manifest(out, load_plans(out)[0])
    shard = manifest.shard(0)
    path = out.root / clips_key(shard.name)
    with open_parquet(path) as file:
        table, footer = file.read(), read_footer(file)
    path.unlink()
    write_parquet(path, spoil(table), footer)
    for key in (videos_key(shard.name), failures_key(shard.name)):
        (out.root / key).unlink()
    with contextlib.suppress(ValueError, KeyError, DamagedJob):
        derive(out, shard, recipe_(), manifest.user_columns(0))
    for key in (videos_key(shard.name), failures_key(shard.name)):
        out.create(key, b"what derive could not make")
    with pytest.raises(DamagedJob, match=says) as caught:
        snapshot(newest(out), dest)
    assert dest.head(SNAPSHOT_KEY) is None
    assert str(caught.value).startswith(f"{out.url}/{audit(out, newest(out).job).problems[0]}. ")


@pytest.mark.parametrize(
    ("key", "spoil", "says"),
    [
        (
            videos_key,
            lambda rows: put(rows, "embedding", pa.array([[1.0] * DIM] * rows.num_rows)),
            "embedding does not",
        ),
        (
            videos_key,
            lambda rows: put(rows, "probs", pa.array([[0.5, 0.5, 0]] * rows.num_rows)),
            "probs does not hold what its clips give",
        ),
        (videos_key, lambda rows: rows.drop_columns(["probs"]), "other columns"),
        (videos_key, lambda rows: put(rows, "n_clips", pa.array([7] * rows.num_rows)), "does not hold what its clips"),
        (videos_key, lambda rows: rows.slice(1), "does not hold what its clips"),
        (videos_key, lambda rows: rows.drop_columns(["codec"]), "other columns"),
        (videos_key, lambda rows: put(rows, "label", pa.array(["mine"] * rows.num_rows)), "column label does not hold"),
        (failures_key, lambda rows: put(rows, "reason", pa.array(["internal"])), "does not hold what its clips"),
        (failures_key, lambda rows: rows.slice(1), "does not hold what its clips"),
    ],
)
def test_whole_files_with_wrong_derived_rows_are_damage(
    out: LocalStore, dest: LocalStore, key: Callable[[str], str], spoil: Callable[[pa.Table], pa.Table], says: str
) -> None:
    """A readable videos or failures file that names the right clips must hold what is derived from them."""
    path = out.root / key(Manifest(out, load_plans(out)[0]).shard(0).name)
    with open_parquet(path) as file:
        table, footer = file.read(), read_footer(file)
    path.unlink()
    write_parquet(path, spoil(table), footer)
    with pytest.raises(DamagedJob, match=says) as caught:
        snapshot(newest(out), dest)
    assert dest.head(SNAPSHOT_KEY) is None
    assert str(caught.value).startswith(f"{out.url}/{audit(out, newest(out).job).problems[0]}. ")


def test_a_used_destination_is_refused(out: LocalStore, dest: LocalStore, tmp_path: Path) -> None:
    """DEST must be empty or absent and outside OUT; each refusal says what DEST holds, and nothing is touched."""
    snapshot(newest(out), dest)
    before = files(dest), files(out)
    for url, says in (
        (dest.url, "holds a snapshot already"),
        (out.url, "lies in"),
        (f"{out.url}/clips", "lies in"),
    ):
        with pytest.raises(OtherRecipe, match=says):
            snapshot(newest(out), LocalStore(url))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "aunt.txt").write_text("dear aunt")
    with pytest.raises(OtherRecipe, match=r"not empty \(aunt.txt\)"):
        snapshot(newest(out), LocalStore(str(tmp_path / "letters")))
    assert (files(dest), files(out)) == before


def test_columns_of_the_users_lists_become_one_table(tmp_path: Path, dest: LocalStore) -> None:
    """A column that a plan lacks is null there; whole numbers and fractions become fractions; numbers too large for
    that, and other differences, become text; no value changes."""
    out = LocalStore(str(tmp_path / "out"))
    first = videos(("a", "b")).append_column("score", pa.array([1, 2])).append_column("year", pa.array([1999, 2001]))
    first = first.append_column("big", pa.array([2**60 + 1, None]))
    second = videos(("c", "d")).drop_columns(["label"])
    second = second.append_column("year", pa.array(["2003", "unknown"])).append_column("score", pa.array([0.5, None]))
    second = second.append_column("big", pa.array([0.25, 1.5]))
    add_plan(out, first, frames=(16,))
    add_plan(out, second, seq=2, frames=(16,))
    snapshot(newest(out), dest)
    rows = duckdb.sql(f"SELECT video_id, label, score, year, big FROM '{dest.root}/videos/*.parquet'").fetchall()
    assert rows == [
        ("a", "label of a", 1.0, "1999", str(2**60 + 1)),
        ("b", "label of b", 2.0, "2001", None),
        ("c", None, 0.5, "2003", "0.25"),
        ("d", None, None, "unknown", "1.5"),
    ]


def test_an_output_without_weights_gives_a_snapshot_without(out: LocalStore, dest: LocalStore) -> None:
    """Weights are optional in an output, and so in a snapshot."""
    (out.root / "weights" / f"{recipe_().weights_sha256}.safetensors").unlink()
    record = snapshot(newest(out), dest)
    assert {one.folder for one in record.files} == set(FOLDERS)


def test_every_change_to_a_finished_snapshot_is_found(out: LocalStore, dest: LocalStore) -> None:
    """A flip in any file, a missing file, an additional file, and an edited snapshot.json."""
    record = snapshot(newest(out), dest)
    rng = Random(7)
    for one in record.files:
        content = dest.read(one.key)
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for spoiled in (bytes(flipped), content[:-1]):
            (dest.root / one.key).write_bytes(spoiled)
            assert [text.split()[0] for text in problems_of(dest, record)] == [one.key]
        (dest.root / one.key).unlink()
        assert problems_of(dest, record) == [f"{one.key} is gone"]
        (dest.root / one.key).write_bytes(content)
    (dest.root / "clips" / "part-00001.parquet").write_bytes(b"")
    assert problems_of(dest, record) == ["clips/part-00001.parquet belongs to no snapshot"]
    path = dest.root / SNAPSHOT_KEY
    path.write_text(path.read_text().replace('"excluded": 0', '"excluded": 1'))
    with pytest.raises(DamagedJob, match="its own digest"):
        read_snapshot(dest)


def test_snapshots_go_between_folders_and_s3(out: LocalStore, tmp_path: Path, real_bucket: str) -> None:
    """Folder to S3, S3 to S3 and back to a folder: the same files each time, and the same refusals."""
    places = [open_store(f"s3://{real_bucket}/{name}") for name in ("one", "deep/two")]
    back = LocalStore(str(tmp_path / "back"))
    first = snapshot(newest(out, ["a"]), places[0])
    assert sorted(info.key for info in places[0].list()) == sorted([*(one.key for one in first.files), SNAPSHOT_KEY])
    with pytest.raises(OtherRecipe, match="holds a snapshot already"):
        snapshot(newest(out), places[0])
    second = snapshot(SnapshotRows(places[0]), places[1])
    third = snapshot(SnapshotRows(places[1]), back)
    assert first.files == second.files == third.files
    assert problems_of(places[1], second) == []
    copy = open_store(f"s3://{real_bucket}/out")
    for info in out.list():
        copy.create(info.key, out.read(info.key))
    assert snapshot(newest(copy, ["a"]), LocalStore(str(tmp_path / "from-s3"))).files == first.files
    slim = snapshot(newest(copy, ["a"]), LocalStore(str(tmp_path / "slim")), clips=False)
    assert slim.files == tuple(one for one in first.files if one.folder != "clips")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("key", key) for key in ("../../secret", "/etc/passwd", "clips/../../x", "job.json", "clips/part-0.parquet")],
        ("sha256", "x"),
        ("size_bytes", -1),
        ("n_rows", "many"),
    ],
)
@pytest.mark.fault(57)
def test_a_record_names_only_files_of_a_snapshot(out: LocalStore, dest: LocalStore, name: str, value: object) -> None:
    """A snapshot.json with a correct digest, as a stranger can write it, is refused if it names any other file."""
    snapshot(newest(out), dest)
    record = json.loads(dest.read("snapshot.json"))
    del record["digest"]
    record["files"][0][name] = value
    (dest.root / "snapshot.json").write_text(json.dumps(record | {"digest": digest(record)}))
    with pytest.raises(DamagedJob, match=r"snapshot\.json cannot be trusted"):
        read_snapshot(dest)


@pytest.mark.parametrize(
    "change",
    [
        {"note": "mine"},
        {"recipe_digest": "0" * 64},
        {"recipe_digest": None},
        {"weights_sha256": "0" * 64},
        {"schema_version": 1.0},
    ],
)
def test_a_record_whose_parts_do_not_fit_is_refused(
    out: LocalStore, dest: LocalStore, change: dict[str, object]
) -> None:
    """A snapshot.json of a correct digest is damage if it has a field too many, too few (None) or of another recipe."""
    snapshot(newest(out), dest)
    record = {
        name: value for name, value in (json.loads(dest.read("snapshot.json")) | change).items() if value is not None
    }
    del record["digest"]
    (dest.root / "snapshot.json").write_text(json.dumps(record | {"digest": digest(record)}))
    with pytest.raises(DamagedJob, match="cannot be trusted"):
        read_snapshot(dest)


@pytest.mark.parametrize("folder", ["clips", "videos", "failures"])
def test_other_columns_are_found_by_verify(out: LocalStore, dest: LocalStore, folder: str) -> None:
    """A file without one of our columns is a problem of the snapshot, although its record was made to fit."""
    record = snapshot(newest(out), dest)
    (one,) = (file for file in record.files if file.folder == folder)
    path = dest.root / one.key
    table = pq.read_table(path)
    write_parquet(path, table.drop_columns(["path"]), {})
    changed = replace(one, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
    edited = replace(record, files=tuple(changed if file is one else file for file in record.files))
    assert problems_of(dest, edited) == [f"{one.key} cannot be read: it has other columns than p3d writes"]
