"""What a launch plans: new videos, other files, and other values in the user's own columns of a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest

from p3d.jobs.planning.changes import changes
from p3d.jobs.planning.prepare import add_plan
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.sources.listing import SourceListing
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import recipe, shard_rows, videos

JOB = JobRecord(recipe(), "random:0", {})


def listed(names: str, **own: Any) -> SourceListing:
    """A listing of these videos with the user's columns."""
    table = videos(names).drop_columns(["label"])
    for name, values in own.items():
        table = table.append_column(name, pa.array(values) if isinstance(values, list) else values)
    return SourceListing(table, ())


def launch(store: LocalStore, found: SourceListing, **more: Any) -> tuple[list[str], str]:
    """Plan a listing and commit all its shards: the ids that were planned, and what was said."""
    said: list[str] = []
    plan = add_plan(store, JOB, found, sizing=ShardSizing(2), limit=None, say=said.append, **more)
    if plan is None:
        return [], "; ".join(said)
    manifest = Manifest(store, plan)
    for shard in range(plan.n_shards):
        commit_shard(store, shard_rows(manifest, shard, frames=(40,)), JOB.recipe, manifest.user_columns(shard))
    return manifest.videos["video_id"].to_pylist(), "; ".join(said)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "out"))


def test_changed_columns_of_known_videos_are_planned_again(store: LocalStore) -> None:
    """Only videos with another value are planned, it is said, and the newest rows have it. The same list plans none."""
    first = {"year": [1999, 2001, None], "tags": [["x"], [], None], "score": [float("nan"), 0.5, 1.0]}
    assert launch(store, listed("abc", **first)) == (["a", "b", "c"], "")
    assert launch(store, listed("abc", **first)) == ([], "")
    changed = listed(
        "abcd",
        year=[1999, 2002, None, 7],
        tags=[["x"], [], ["y"], []],
        score=[float("nan"), 0.5, 1.0, 2.0],
    )
    assert launch(store, changed) == (
        ["b", "c", "d"],
        "1 new video, 0 changed files, 2 with changed columns of the list (their clips are embedded again)",
    )
    newest = duckdb.sql(
        f"SELECT video_id, year FROM '{store.root}/videos/*.parquet' "
        "QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY plan_seq DESC) = 1 ORDER BY video_id"
    )
    assert newest.fetchall() == [("a", 1999), ("b", 2002), ("c", None), ("d", 7)]
    assert launch(store, changed) == ([], "")


def test_a_column_that_the_list_lacks_changes_nothing(store: LocalStore) -> None:
    """A launch of the folder after that of a list plans nothing again. A new column does, where it has a value."""
    launch(store, listed("ab", year=[1, 2]))
    assert launch(store, listed("ab"))[0] == []
    assert launch(store, listed("ab", more=[None, "x"]))[0] == ["b"]


def test_a_replaced_file_is_counted_as_such(store: LocalStore) -> None:
    """Another version counts as a changed file, not as changed columns; plans that will not run do not count."""
    launch(store, listed("ab", year=[1, 2]))
    found = listed("ab", year=[3, 2])
    at = found.videos.column_names.index("version")
    table = found.videos.set_column(at, "version", pa.array(["1" * 16, "0" * 16]))
    assert launch(store, SourceListing(table, ())) == (
        ["a"],
        "0 new videos, 1 changed file, 0 with changed columns of the list",
    )
    assert launch(store, listed("ab", year=[1, 2]), without={1, 2})[0] == ["a", "b"]


def test_status_and_verify_count_superseded_rows_alike(store: LocalStore) -> None:
    """A video that a newer plan names counts once in `status`, and its older row is named by both."""
    store.create("job.json", JOB.to_json())
    launch(store, listed("abc", year=[1, 2, 3]))
    launch(store, listed("abc", year=[1, 2, 4]))
    assert "3/3 videos (100%)  9 clips  0 failed  1 superseded" in in_process("status", store.url)[1]
    code, shown, said = in_process("verify", store.url)
    assert (code, shown.split()[8]) == (0, "4") and said.startswith("1 superseded: ")


@pytest.mark.parametrize(
    ("before", "after", "values"),
    [
        (pa.array([1, 2]), pa.array(["3", "4"]), [1, 2, 3, 4]),
        (pa.array([1, 2]), pa.array([3.0, None]), [1, 2, 3, None]),
        (pa.array([0.5, 2.0]), pa.array([3, 4]), [0.5, 2.0, 3.0, 4.0]),
        (pa.array(["x", "2"]), pa.array([3, 4]), ["x", "2", "3", "4"]),
        (pa.array(["x", "2"]).dictionary_encode(), pa.array(["x", "y"]), ["x", "2", "x", "y"]),
        (pa.nulls(2), pa.array(["x", "y"]), [None, None, "x", "y"]),
        (pa.array([1, 2]), pa.nulls(2), [1, 2, None, None]),
        (pa.array([1, 2]), None, [1, 2, None, None]),
        (pa.array([1.5, 2]), pa.array([float("nan"), 1], pa.float32()), [1.5, 2.0, None, 1.0]),
    ],
)
def test_a_column_of_another_type_gets_that_of_earlier_plans(
    before: pa.Array, after: pa.Array | None, values: list[Any], store: LocalStore
) -> None:
    """If no value changes by that. DuckDB and Polars read videos/*.parquet as one table (docs/how-to/results.md)."""
    launch(store, listed("ab", mine=before, other=[1, 2]))
    launch(store, listed("cd", other=[3, 4]) if after is None else listed("cd", other=[3, 4], mine=after))
    rows = duckdb.sql(f"SELECT mine, other FROM '{store.root}/videos/*.parquet' ORDER BY video_id").fetchall()
    assert [(None if one != one else one, other) for one, other in rows] == list(zip(values, (1, 2, 3, 4), strict=True))
    table = pl.read_parquet(f"{store.root}/videos/*.parquet").sort("video_id")
    assert [None if one != one else one for one in table["mine"].to_list()] == values


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            pa.array([1, 2]),
            pa.array(["3", "unknown"]),
            "is string, and plan 1 of OUT has it as int64, .* 'unknown'. Give",
        ),
        (pa.array([1, 2]), pa.array(["007", "4"]), "cannot hold '007'"),
        (pa.array([1, 2]), pa.array([0.5, 4.0]), "is double, .* cannot hold 0.5"),
        (pa.array([1.5, 2]), pa.array([2**60 + 1, 4]), f"cannot hold {2**60 + 1}"),
        (pa.array([True, False]), pa.array([[1], [2]]), "cannot hold"),
    ],
)
def test_a_column_that_cannot_get_the_earlier_type_is_refused(
    before: pa.Array, after: pa.Array, words: str, store: LocalStore
) -> None:
    """The message has the column, both types, a value that does not fit and what to do. No plan is written."""
    launch(store, listed("ab", mine=before))
    with pytest.raises(InputError, match=f"column 'mine' .*{words}"):
        launch(store, listed("cd", mine=after))
    assert [info.key for info in store.list("plans/") if info.key.endswith(".json")] == ["plans/0001.json"]


def test_a_launch_into_a_job_takes_what_is_not_typed_from_it(
    tmp_path: Path, archive: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip rule and the pooling of the job are not typed again; what is typed and differs is refused by name."""
    out = tmp_path / "out"
    words = ["launch", str(archive), str(out), "--weights", str(small_weights), "--clips", "spread:2", "--limit", "1"]
    assert in_process(*words, "--pool", "max")[0] == 0
    code, _, said = in_process("plan", str(archive), str(out), "--limit", "2")
    assert code == 0 and "as in the job at OUT: --clips spread:2, --pool max" in said
    with monkeypatch.context() as patch:  # somebody else's job: nothing is taken from it
        patch.setattr("p3d.jobs.trust.is_trusted", lambda *_: False)
        code, _, said = in_process("plan", str(archive), str(out), "--limit", "2")
        assert code == 5 and "clips spread:2, not every:16; pool max, not mean" in said
    code, _, said = in_process("plan", str(archive), str(out), "--clips", "every:16")
    assert code == 5 and "was made with other settings: clips spread:2, not every:16. Use" in said


class Counting:
    """Rows whose batches are counted. As in a table of Arrow, all of them are made before the first is used."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows, self.num_rows, self.n_batches = rows, rows.num_rows, 0

    def to_batches(self, max_chunksize: int | None = None) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = self.rows.to_batches(max_chunksize=max_chunksize)
        self.n_batches += len(batches)
        return batches


def test_a_long_listing_is_never_divided_into_single_rows(store: LocalStore) -> None:
    """A batch of Arrow takes 2 kB, whatever it holds: one for each row of 10^7 would take 20 GB."""
    names = [f"{at:04}" for at in range(500)]
    launch(store, SourceListing(videos(names[:-1]), ()))
    rows = Counting(videos(names).drop_columns(["label"]))
    found = changes([Manifest(store, plan) for plan in load_plans(store)], rows)
    assert (found.n_new, found.n_changed, found.n_columns) == (1, 0, 0)
    assert rows.n_batches < 10


def test_another_video_of_the_same_name_is_named_before_it_replaces_one(store: LocalStore) -> None:
    """A second folder launched into the same output: a warning has both places. A file changed in place has none."""

    def at(folder: str, version: str, names: str) -> SourceListing:
        table = listed(names).videos
        uris = pa.array([f"file:///{folder}/{name}" for name in names])
        versions = pa.array([version * 16] * len(names))
        for name, column in (("uri", uris), ("version", versions)):
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        return SourceListing(table, ())

    launch(store, at("2019", "1", "abc"))
    assert launch(store, at("2019", "2", "ab"))[1].endswith("0 with changed columns of the list")
    planned, said = launch(store, at("2020", "3", "bcd"))
    assert planned == ["b", "c", "d"]
    assert "warning: file:///2020/b replaces file:///2019/b in this output" in said and "another output" in said
    assert "warning" not in launch(store, at("2021", "3", "bcd"))[1]  # the same videos at a new place
