"""The index of a dataset: it proposes rows, scores come from the dataset; it grows, and is refused elsewhere."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.errors import DamagedJob, InputError, StoreError, StrayFile
from p3d.pipeline.results.sample import Reservoir
from p3d.pipeline.results.search import index, index_cache
from p3d.pipeline.results.search.exact import nearest
from p3d.pipeline.results.search.index import KINDS, IndexRecord, nearest_by_index, opened, read_record
from p3d.pipeline.results.search.index_build import _built, build_index
from p3d.pipeline.results.search.index_cache import IndexFolder
from p3d.pipeline.results.search.metrics import METRICS
from p3d.pipeline.results.search.options import LEVELS
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Store
from p3d.pipeline.storage.urls import open_store
from tests.pipeline.rows import DIM, videos
from tests.pipeline.test_snapshot import add_plan, newest, recipe_

NAMES = tuple(f"v{at:03d}" for at in range(21))
QUERY = np.linspace(-1, 1, DIM, dtype=np.float32)[None]


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """Twenty-one videos of thirteen clips, in three shards."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos(NAMES), shard_videos=7, frames=(200,))
    return store


def folder_of(out: Store) -> IndexFolder:
    return IndexFolder.of(newest(out), "clip", "cosine")


def names(record: IndexRecord) -> list[str]:
    assert record.vectors and record.rows
    return [record.vectors.name, record.rows.name]


def keys(found: object) -> list[tuple[str, int | None]]:
    return [(hit.video_id, hit.clip_index) for hit in found.hits]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_finds_what_exact_search_finds(out: LocalStore, kind: str, metric: str) -> None:
    """Every kind: the best hit by index is the exact one, with its exact score, and the stated recall is true."""
    record = build_index(newest(out), level="clip", metric=metric, kind=kind)  # type: ignore[arg-type]
    assert (record.n_rows, record.kind, record.sample) == (21 * 13, kind, 100)
    assert record.recall_at_10 is not None and record.recall_at_10 > (0.5 if kind == "pq" else 0.9)
    source, hits = newest(out), 0
    vectors = np.concatenate(
        [schema.features_of(table["embedding"], DIM) for folder, table in source.rows() if folder == "clips"]
    )
    for vector in vectors[::40]:
        exact = nearest(source, vector[None], level="clip", metric=metric, top=3)  # type: ignore[arg-type]
        found = nearest_by_index(source, vector[None], level="clip", metric=metric, top=3)  # type: ignore[arg-type]
        assert found.hits[0].score == exact.hits[0].score == (1.0 if metric == "cosine" else 0.0)
        assert keys(found)[0] == keys(exact)[0]
        assert found.n_indexed == record.n_rows
        assert found.n_rows < record.n_rows  # the rows of few videos were read again
        hits += len(set(keys(found)) & set(keys(exact)))
        if kind == "flat":
            assert keys(found) == keys(exact)
    assert hits >= 14  # of 21


def test_the_stated_recall_is_that_of_brute_force(out: LocalStore) -> None:
    """recall@10 of a poor index, counted again by hand over every row of the sample: all of them."""
    record = build_index(newest(out), level="clip", metric="cosine", kind="pq", sample=10_000)
    with opened(newest(out), record) as (index, rows):
        vectors = np.concatenate(
            [schema.features_of(t["embedding"], DIM) for folder, t in newest(out).rows() if folder == "clips"]
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert rows.num_rows == len(vectors) == record.sample == 273
        exact = vectors @ vectors.T
        np.fill_diagonal(exact, -2)
        _, found = index.search(vectors, 11)
    there = 0
    for at, mine in enumerate(found):
        true = set(np.argsort(-exact[at])[:10].tolist())
        there += len(true & set([one for one in mine.tolist() if one != at][:10]))
    assert record.recall_at_10 == pytest.approx(there / 2730, abs=2e-3)


def test_an_index_grows_with_its_dataset(out: LocalStore) -> None:
    """New rows are searched in full before they are added, replaced rows never come out, and adding keeps the rest."""
    first = build_index(newest(out), level="clip", metric="cosine", kind="ivf")
    assert build_index(newest(out), level="clip", metric="cosine") == first
    add_plan(out, videos(["v003", "x0", "x1", "v017"]), seq=2, frames=(200, 200, 200, 0))
    source = newest(out)
    exact = nearest(source, QUERY, level="clip", top=30)
    assert {"v003", "x0"} <= {hit.video_id for hit in nearest(source, QUERY, level="clip", top=900).hits}
    found = nearest_by_index(source, QUERY, level="clip", top=30)
    assert found.n_new == 3
    assert all(hit.plan_seq == 2 for hit in found.hits if hit.video_id == "v003")
    assert not any(hit.video_id == "v017" for hit in found.hits)
    assert keys(found)[0] == keys(exact)[0]
    grown = build_index(source, level="clip", metric="cosine")
    assert (grown.n_rows, grown.nlist, grown.kind) == (first.n_rows + 3 * 13, first.nlist, "ivf")
    assert set(grown.pieces) == set(source.pieces) > set(first.pieces)
    found = nearest_by_index(newest(out), QUERY, level="clip", top=30)
    assert (found.n_new, keys(found)[0]) == (0, keys(exact)[0])
    with opened(newest(out), grown) as (index, rows):
        assert index.ntotal == rows.num_rows == grown.n_rows
        assert rows["video_id"].to_pylist()[-13:] == ["x1"] * 13
    folder = folder_of(out)
    assert {path.name for path in folder.path.iterdir()} == {*names(grown), folder.record.name, "lock"}
    rebuilt = build_index(newest(out), level="clip", metric="cosine", kind="sq8", rebuild=True)
    assert (rebuilt.n_rows, rebuilt.kind) == (first.n_rows - 2 * 13 + 3 * 13, "sq8")  # without the replaced rows


def test_old_and_new_rows_of_a_replaced_video(out: LocalStore) -> None:
    """A new row is found before it is indexed, and the old row never displaces a hit, however near the query is."""
    build_index(newest(out), level="clip", metric="cosine", kind="flat")
    old = first_vector(out, "v003")
    add_plan(out, videos(["v003"]), seq=2, frames=(200,))
    new = first_vector(out, "v003")
    for vector in (old, new):
        exact = nearest(newest(out), vector, level="clip", top=5)
        assert keys(nearest_by_index(newest(out), vector, level="clip", top=5)) == keys(exact)
    assert exact.hits[0].score == 1.0
    build_index(newest(out), level="clip", metric="cosine")
    for vector in (old, new):
        exact = nearest(newest(out), vector, level="clip", top=1)
        assert keys(nearest_by_index(newest(out), vector, level="clip", top=1)) == keys(exact)


def first_vector(store: LocalStore, video_id: str) -> np.ndarray:
    tables = (table for folder, table in newest(store).rows(only=frozenset([video_id])) if folder == "clips")
    return schema.features_of(next(tables)["embedding"], DIM)[:1]


def test_conditions_hold_inside_the_index(out: LocalStore) -> None:
    """With --where the index finds rows of the videos that satisfy it, however low they rank among all rows."""
    build_index(newest(out), level="clip", metric="cosine", kind="flat")
    for where in (["label=label of v014"], ["video_id>=v015", "n_frames=200"], ["label=none"]):
        exact = nearest(newest(out), QUERY, level="clip", top=20, where=where)
        assert keys(nearest_by_index(newest(out), QUERY, level="clip", top=20, where=where)) == keys(exact)
    with pytest.raises(InputError, match=r"no column 'start_s'.*leave out --index"):
        nearest_by_index(newest(out), QUERY, level="clip", where=["start_s>1"])


def test_a_condition_on_the_id_reads_nothing_more(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All videos but one, as the page asks for: correct hits, and only their rows of the dataset are read."""
    build_index(newest(out), level="clip", metric="cosine", kind="flat")
    query, where = first_vector(out, "v003"), ["video_id!=v003"]
    exact = nearest(newest(out), query, level="clip", top=2, where=where)
    read, rows = [], NewestRows.rows

    def spied(self: NewestRows, **how: object) -> Iterator[tuple[str, pa.Table]]:
        for folder, table in rows(self, **how):  # type: ignore[arg-type]
            read.extend(table["video_id"].to_pylist())
            yield folder, table

    monkeypatch.setattr(NewestRows, "rows", spied)
    found = nearest_by_index(newest(out), query, level="clip", top=2, where=where)
    assert keys(found) == keys(exact) and found.hits[0].score < 1
    assert set(read) == {hit.video_id for hit in found.hits}


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_gives_one_hit_per_video(out: LocalStore, kind: str) -> None:
    """As many videos as exact search finds, though the nearest rows are clips of one of them; with a condition, too."""
    build_index(newest(out), level="clip", metric="cosine", kind=kind)
    query = first_vector(out, "v003")
    for where in ([], ["video_id!=v003"], ["video_id=v003"]):
        how = {"level": "clip", "top": 12, "where": where, "per_video": True}
        exact, found = nearest(newest(out), query, **how), nearest_by_index(newest(out), query, **how)  # type: ignore[arg-type]
        ids = [hit.video_id for hit in found.hits]
        assert len(set(ids)) == len(ids) == (1 if where == ["video_id=v003"] else 12)
        assert kind == "ivf" or keys(found) == keys(exact)


def test_near_duplicates_are_left_out_of_what_an_index_gives(out: LocalStore) -> None:
    """--distinct means the same with an index as without."""
    build_index(newest(out), level="clip", metric="cosine", kind="flat")
    exact = nearest(newest(out), QUERY, level="clip", top=5, distinct=0.9)
    assert keys(nearest_by_index(newest(out), QUERY, level="clip", top=5, distinct=0.9)) == keys(exact)


@pytest.mark.parametrize("level", LEVELS)
def test_a_snapshot_has_an_index_of_its_own(out: LocalStore, tmp_path: Path, level: str) -> None:
    """Index and search of a snapshot, by both levels; its own check ignores the index."""
    from p3d.pipeline.dataset.snapshot_record import problems_of, read_snapshot

    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(newest(out), dest)
    build_index(SnapshotRows(dest), level=level, metric="l2")  # type: ignore[arg-type]
    exact = nearest(SnapshotRows(dest), QUERY, level=level, metric="l2")  # type: ignore[arg-type]
    assert keys(nearest_by_index(SnapshotRows(dest), QUERY, level=level, metric="l2")) == keys(exact)  # type: ignore[arg-type]
    assert problems_of(dest, read_snapshot(dest)) == []


def test_an_index_of_another_job_is_not_used(out: LocalStore, tmp_path: Path) -> None:
    """Neither a copy of OUT nor another job in its place gets the index; the next build removes the old one."""
    build_index(newest(out), level="clip", metric="cosine")
    old = set(folder_of(out).path.iterdir())
    moved = LocalStore(str(tmp_path / "moved"))
    out.root.rename(moved.root)
    out = LocalStore(out.url)
    add_plan(out, videos(NAMES), chosen=recipe_(clips="every:8"), frames=(200,))
    for other in (moved, out):
        with pytest.raises(InputError, match="your cache has no index"):
            nearest_by_index(newest(other), QUERY, level="clip")
    record = build_index(newest(out), level="clip", metric="cosine")
    assert {path.name for path in folder_of(out).path.iterdir() if path in old} == {"lock"}
    assert {*names(record)} < {path.name for path in folder_of(out).path.iterdir()}


def test_a_broken_index_is_an_error(out: LocalStore) -> None:
    """No index, another kind, a cut or missing file, an invalid record: each error names the command that helps."""
    with pytest.raises(InputError, match=r"no index of the videos of .* by l2: run `p3d results index .* --level vid"):
        nearest_by_index(newest(out), QUERY, level="video", metric="l2")
    with pytest.raises(InputError, match="pq needs 256 rows"):
        build_index(newest(out), level="video", metric="l2", kind="pq")
    record = build_index(newest(out), level="clip", metric="cosine")
    with pytest.raises(InputError, match="is of kind flat; give --rebuild"):
        build_index(newest(out), level="clip", metric="cosine", kind="ivf")
    folder = folder_of(out)
    for name in names(record):
        content = (folder.path / name).read_bytes()
        for broken in (content[: len(content) // 2], b"", content + b"x", b"x" * len(content)):
            (folder.path / name).write_bytes(broken)
            with pytest.raises(DamagedJob, match=r"its sha256 differs.*--rebuild"):
                nearest_by_index(newest(out), QUERY, level="clip")
        (folder.path / name).write_bytes(content)
    assert nearest_by_index(newest(out), QUERY, level="clip").hits
    (folder.path / names(record)[0]).unlink()
    add_plan(out, videos(["more"]), seq=2)
    for refused in (
        lambda: nearest_by_index(newest(out), QUERY, level="clip"),
        lambda: build_index(newest(out), level="clip", metric="cosine"),
    ):
        with pytest.raises(DamagedJob, match="--rebuild"):
            refused()
    for text in ("{}", "[]", "x", json.dumps({**json.loads(record.to_json()), "vectors": {"name": "/etc/passwd"}})):
        folder.record.write_text(text)
        with pytest.raises(DamagedJob, match="--rebuild"):
            read_record(newest(out), "clip", "cosine")
    assert build_index(newest(out), level="clip", metric="cosine", rebuild=True).recall_at_10 == 1.0


def test_a_name_in_a_record_is_a_name_in_its_folder(out: LocalStore) -> None:
    """A record that names a file elsewhere is damaged: FAISS never sees the file."""
    record = build_index(newest(out), level="clip", metric="cosine")
    folder = folder_of(out)
    given = json.loads(record.to_json())
    for name in ("../x.faiss", "/tmp/x.faiss", names(record)[1], f"{folder.stem}-0123456.faiss", 5, None):
        given["vectors"]["name"] = name
        folder.record.write_text(json.dumps(given))
        with pytest.raises(DamagedJob, match="--rebuild"):
            read_record(newest(out), "clip", "cosine")


def test_an_index_of_another_version_is_refused_with_both(out: LocalStore) -> None:
    """The message has the version of the index, that of this program, and the command that makes it again."""
    record = build_index(newest(out), level="clip", metric="cosine")
    given = json.loads(record.to_json())
    folder_of(out).record.write_text(json.dumps(given | {"schema_version": 99}))
    both = rf"version 99, and this program reads version {given['schema_version']}\)"
    with pytest.raises(DamagedJob, match=f"{both}.*--rebuild"):
        read_record(newest(out), "clip", "cosine")


def test_nothing_of_an_index_is_read_from_an_output(
    out: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An index in `_job/index/` is never opened or changed, whatever it holds, and is named when there is no other."""
    import faiss

    theirs = out.root / "_job" / "index"
    theirs.mkdir(parents=True)
    faiss.write_index(faiss.IndexFlatIP(DIM), str(theirs / "clip-cosine-01234567.faiss"))
    (theirs / "clip-cosine.json").write_text(
        '{"schema_version": 1, "index_key": "_job/index/clip-cosine-01234567.faiss"}'
    )
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in theirs.iterdir()}
    linked, opened_, read = LocalStore(str(tmp_path / "linked")), list[str](), LocalStore.open
    linked.root.symlink_to(out.root)
    monkeypatch.setattr(LocalStore, "open", lambda self, key: (opened_.append(key), read(self, key))[1])
    with pytest.warns(StrayFile, match="is not used"), pytest.raises(InputError, match="your cache has no index"):
        nearest_by_index(newest(out), QUERY, level="clip")
    with pytest.warns(StrayFile, match=r"_job/index/ holds an index of an earlier version.*may be removed"):
        build_index(newest(out), level="clip", metric="cosine")
    with warnings.catch_warnings(action="error"):
        assert keys(nearest_by_index(newest(out), QUERY, level="clip"))
        assert keys(nearest_by_index(newest(linked), QUERY, level="clip"))  # the same place
    assert opened_ and not [key for key in opened_ if "index" in key]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in theirs.iterdir()} == before


def test_two_builds_at_once_take_turns(out: LocalStore) -> None:
    """A second build waits, says so, and then finds nothing to add; searches meanwhile see a whole index or none."""
    said, done = threading.Event(), []

    def second() -> None:
        done.append(build_index(newest(out), level="clip", metric="cosine", say=lambda _: said.set()))

    with folder_of(out).building():
        other = threading.Thread(target=second)
        other.start()
        assert said.wait(30) and not done
        with pytest.raises(InputError, match="your cache has no index"):
            nearest_by_index(newest(out), QUERY, level="clip")
        first = _built(newest(out), "clip", "cosine", None, 10, False, 0, None)
    other.join(60)
    assert done == [first]
    assert keys(nearest_by_index(newest(out), QUERY, level="clip"))


def test_a_search_survives_a_build_that_replaces_its_files(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the files go between the record and their use, the new record is read and the hits are the same."""
    old = build_index(newest(out), level="clip", metric="cosine")
    hits = keys(nearest_by_index(newest(out), QUERY, level="clip"))
    build_index(newest(out), level="clip", metric="cosine", rebuild=True, kind="ivf")
    records, read = [old], index.read_record
    monkeypatch.setattr(index, "read_record", lambda *given: records.pop() if records else read(*given))
    assert keys(nearest_by_index(newest(out), QUERY, level="clip"))[0] == hits[0] and not records


def test_a_cache_that_others_may_write_to_is_refused(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from a folder in which somebody else could have put a record and its files."""
    build_index(newest(out), level="clip", metric="cosine")
    folder = folder_of(out).path
    folder.chmod(0o770)
    for refused in (
        lambda: nearest_by_index(newest(out), QUERY, level="clip"),
        lambda: build_index(newest(out), level="clip", metric="cosine"),
    ):
        with pytest.raises(InputError, match=r"others may write to it.*P3D_CACHE"):
            refused()
    folder.chmod(0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        nearest_by_index(newest(out), QUERY, level="clip")


def test_a_cache_that_cannot_be_written_is_a_message(
    out: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file where the cache should be: an error that names it, and a search says how to make an index."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("P3D_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"/file.*: a file exists where a folder is needed"):
        build_index(newest(out), level="clip", metric="cosine")
    with pytest.raises(InputError, match="run `p3d results index"):
        nearest_by_index(newest(out), QUERY, level="clip")


def test_an_index_of_one_row_has_no_recall(tmp_path: Path) -> None:
    """There is no neighbour to find, so nothing is claimed about finding it."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos(["a"]), frames=(200,))
    record = build_index(newest(store), level="video", metric="cosine")
    assert (record.n_rows, record.recall_at_10, record.sample) == (1, None, 0)


def test_a_relative_cache_is_refused(out: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative P3D_CACHE would be below the working directory, which may be an output from somebody else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("P3D_CACHE", "cache")
    with pytest.raises(InputError, match="P3D_CACHE=cache is not an absolute path"):
        build_index(newest(out), level="clip", metric="cosine")
    assert not (tmp_path / "cache").exists()


def test_folders_on_the_way_to_the_cache_are_private(
    out: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With umask 000, nobody else can exchange the folder of an index for another one."""
    monkeypatch.setenv("P3D_CACHE", str(tmp_path / "home" / "cache"))
    before = os.umask(0)
    try:
        build_index(newest(out), level="clip", metric="cosine")
    finally:
        os.umask(before)
    folders = [tmp_path / "home", *(path for path in (tmp_path / "home").rglob("*") if path.is_dir())]
    assert len(folders) == 4 and {path.stat().st_mode & 0o077 for path in folders} == {0}


@pytest.mark.parametrize("where", ["P3D_CACHE", "HOME"])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_cache_whose_name_is_not_utf8_works(
    out: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    """FAISS takes only paths of UTF-8. In any other folder an index is built, extended and searched too."""
    monkeypatch.delenv("P3D_CACHE")
    monkeypatch.setenv(where, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    build_index(newest(out), level="clip", metric="cosine", kind=kind)
    add_plan(out, videos(["x0"]), seq=2, frames=(200,))
    record = build_index(newest(out), level="clip", metric="cosine")
    assert record.n_rows == 22 * 13 and folder_of(out).record.exists()
    assert os.fsencode(tmp_path) + b"/caf\xe9/" in os.fsencode(folder_of(out).record)
    found = nearest_by_index(newest(out), QUERY, level="clip", top=5)
    assert len(found.hits) == 5 and (found.n_indexed, found.n_new) == (22 * 13, 0)


def test_a_large_file_is_hashed_only_if_it_may_have_changed(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large index costs a search nothing more while its inode and times are as written; else its sha256 decides."""
    monkeypatch.setattr(index_cache, "SMALL_BYTES", 0)
    record = build_index(newest(out), level="clip", metric="cosine")
    hashed, sha256_of = [], index_cache.sha256_of
    monkeypatch.setattr(index_cache, "sha256_of", lambda path: (hashed.append(path), sha256_of(path))[1])
    assert nearest_by_index(newest(out), QUERY, level="clip").hits and not hashed
    path = folder_of(out).path / names(record)[0]
    status, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert nearest_by_index(newest(out), QUERY, level="clip").hits and hashed == [path]
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DamagedJob, match="its sha256 differs"):
        nearest_by_index(newest(out), QUERY, level="clip")


def test_an_empty_dataset_has_no_index(tmp_path: Path) -> None:
    """Nothing is committed yet, and the error says so."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), commit=False)
    with pytest.raises(InputError, match="no rows to index yet"):
        build_index(newest(store), level="clip", metric="cosine")


def test_an_output_on_s3_has_an_index_too(bucket: str) -> None:
    """Built, grown and searched; nothing of it is written to the bucket."""
    store: Store = open_store(f"s3://{bucket}/out")
    add_plan(store, videos(NAMES[:12]), frames=(40,))
    build_index(newest(store), level="clip", metric="cosine")
    add_plan(store, videos(["x"]), seq=2, frames=(200,))
    record = build_index(newest(store), level="clip", metric="cosine")
    assert record.n_rows == 12 * 3 + 13
    exact = nearest(newest(store), QUERY, level="clip")
    assert keys(nearest_by_index(newest(store), QUERY, level="clip")) == keys(exact)
    assert not list(store.list("_job/index/"))


def test_the_sample_is_drawn_from_all_rows() -> None:
    """Every row is as likely to be in the sample as any other, with its own key."""
    rng = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(2000):
        reservoir = Reservoir(rng, 10, 1)
        for start in range(0, 40, 8):
            numbers = np.arange(start, start + 8)
            table = pa.table({"video_id": [str(n) for n in numbers], "plan_seq": [1] * 8})
            reservoir.add(numbers[:, None].astype(np.float32), table)
        assert [reservoir.keys[at][0] for at in range(10)] == [str(int(row[0])) for row in reservoir.rows_SD]
        counts[reservoir.rows_SD[:, 0].astype(int)] += 1
    assert reservoir.n == 10
    assert abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations
