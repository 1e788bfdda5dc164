"""verify: a whole dataset is clean, and every kind of damage is named and counted."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from p3d.jobs.job import manifests
from p3d.pipeline.dataset import schema, verify
from p3d.pipeline.dataset.commit import clips_key, commit_shard, derive, failures_key, videos_key
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.verify import Audit, Piece, audit, audit_piece, current_failures
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.storage.local import LocalStore
from tests.pipeline.rows import planned, recipe, shard_rows, videos

NAMES = tuple("abcdefghij")
JOB = JobRecord(recipe(), "random:0", {})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    found = planned(store, NAMES)
    for shard in range(found.plan.n_shards):
        commit_shard(store, shard_rows(found, shard), recipe(), found.user_columns(shard))
    return found


def counts(result: Audit) -> tuple[int, ...]:
    return (result.manifest, result.ok, result.failed, result.pending, result.lost, result.duplicated)


def test_a_whole_dataset_is_clean(store: LocalStore, manifest: Manifest) -> None:
    """Every video is ok or failed, nothing else."""
    result = audit(store, JOB)
    assert counts(result) == (10, 7, 3, 0, 0, 0)
    assert result.reasons == {"truncated": 3}
    assert not result.damaged


def test_reading_leaves_no_thread_behind(store: LocalStore, manifest: Manifest) -> None:
    """Reading leaves no Arrow thread running, which could abort the process at exit."""
    script = """
import os, sys
from p3d.pipeline.dataset import verify
from p3d.pipeline.dataset.commit import derive
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.storage.local import LocalStore
from tests.pipeline.rows import recipe
before = set(os.listdir("/proc/self/task"))
store, job = LocalStore(sys.argv[1]), JobRecord(recipe(), "random:0", {})
assert not verify.audit(store, job, deep=False).damaged and not verify.audit(store, job).damaged
assert len(verify.current_failures(store)) == 3
assert sum(rows.num_rows for _, rows in NewestRows(store, job).rows()) > 10
manifest = Manifest(store, load_plans(store)[0])
derive(store, manifest.shard(0), recipe(), manifest.user_columns(0))
print(sorted(set(os.listdir("/proc/self/task")) - before))
"""
    done = subprocess.run([sys.executable, "-c", script, str(store.root)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unfinished_job_is_pending_and_not_damaged(store: LocalStore) -> None:
    """Shards that were never committed are pending, not lost."""
    found = planned(store, NAMES)
    commit_shard(store, shard_rows(found, 1), recipe(), found.user_columns(1))
    result = audit(store, JOB)
    assert counts(result) == (10, 3, 1, 6, 0, 0)
    assert not result.damaged


def name(manifest: Manifest, key: Callable[[str], str], shard: int = 0) -> str:
    return key(manifest.shard(shard).name)


def remove_clips(store: LocalStore, manifest: Manifest) -> None:
    (store.root / name(manifest, clips_key)).unlink()


def swap_clips(store: LocalStore, manifest: Manifest) -> None:
    other = LocalStore(str(store.root / "elsewhere"))
    found = planned(other, NAMES)
    commit_shard(other, shard_rows(found, 0, seed=9), recipe(), found.user_columns(0))
    (store.root / name(manifest, clips_key)).write_bytes(other.read(name(found, clips_key)))
    for path in sorted((store.root / "elsewhere").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def flip_clips(store: LocalStore, manifest: Manifest) -> None:
    path = store.root / name(manifest, clips_key)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def swap_shards(store: LocalStore, manifest: Manifest) -> None:
    path = store.root / name(manifest, clips_key, 0)
    path.write_bytes((store.root / name(manifest, clips_key, 1)).read_bytes())


def cut_videos(store: LocalStore, manifest: Manifest) -> None:
    path = store.root / name(manifest, videos_key)
    path.write_bytes(path.read_bytes()[:-30])


def swap_failures(store: LocalStore, manifest: Manifest) -> None:
    path = store.root / name(manifest, failures_key, 0)
    path.write_bytes((store.root / name(manifest, failures_key, 1)).read_bytes())


def add_alien(store: LocalStore, manifest: Manifest) -> None:
    (store.root / "clips" / "deadbeef-000000000.parquet").write_bytes(
        (store.root / name(manifest, clips_key)).read_bytes()
    )


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (remove_clips, "lost"),
        (swap_clips, "changed"),
        (flip_clips, "changed"),
        (swap_shards, "lost"),
        (swap_shards, "unexpected"),
        (cut_videos, "changed"),
        (swap_failures, "changed"),
        (add_alien, "unexpected"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damage_is_found_and_named(
    store: LocalStore, manifest: Manifest, spoil: Callable[[LocalStore, Manifest], None], kind: str
) -> None:
    """Each kind of damage is counted in its class, with a message that names the file (exit code 7)."""
    spoil(store, manifest)
    result = audit(store, JOB)
    assert getattr(result, kind) > 0
    assert result.damaged
    assert any(".parquet" in problem for problem in result.problems)


def in_pieces(store: LocalStore, deep: bool, size: int = 2) -> Audit:
    """The audit as a cluster makes it: in pieces, as far ahead as can be, which are sent as bytes."""
    sent, done = list[Piece](), list[int]()

    def elsewhere(pieces: Iterator[Piece]) -> Iterator[Audit]:
        sent.extend(pickle.loads(pickle.dumps(piece)) for piece in pieces)
        for piece in sent:
            found = audit_piece(store, recipe(), Manifest(store, piece.plan), piece, deep=deep)
            yield pickle.loads(pickle.dumps(found))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "PIECE_SHARDS", size)
        result = audit(store, JOB, deep=deep, elsewhere=elsewhere, on_shard=lambda at, _: done.append(at))
    assert done == [2, 3] and [len(piece.shards) for piece in sent] == [2, 1]
    return result


@pytest.mark.parametrize("deep", [False, True])
def test_pieces_checked_elsewhere_give_the_same_audit(store: LocalStore, manifest: Manifest, deep: bool) -> None:
    """The counts, messages and names of damaged files of all pieces are added up in order."""
    for spoil in (swap_failures, add_alien, flip_clips, lambda *_: (store.root / "videos").rename(store.root / "v")):
        spoil(store, manifest)
        found = in_pieces(store, deep)
        assert found == audit(store, JOB, deep=deep)
    assert found.damaged and found.bad_derived


def rewrite(path: Path, change: Callable[[pa.Table, dict[str, str]], pa.Table]) -> None:
    """Write a data file again, after a change of its rows or of its footer."""
    with schema.open_parquet(path) as file:
        table, footer = file.read(use_threads=False), schema.read_footer(file)
    schema.write_parquet(path, change(table, footer), footer)


@pytest.mark.parametrize("key", [clips_key, videos_key])
def test_a_file_that_lacks_a_row_is_found_from_its_footer(
    store: LocalStore, manifest: Manifest, key: Callable[[str], str]
) -> None:
    """The quick audit and a reader of videos alone compare numbers of rows, and name the file."""
    rewrite(store.root / name(manifest, key), lambda table, _: table.slice(1))
    problem = audit(store, JOB, deep=False).problems[0]
    assert re.search(rf"^{name(manifest, key)} is damaged: it .* [0-9]+ (rows|clips)$", problem)
    with pytest.raises(DamagedJob, match=problem):
        list(NewestRows(store, JOB).rows(clips=False))


def reordered(outcomes: list[dict[str, Any]]) -> None:
    outcomes.reverse()


def of_another_file(outcomes: list[dict[str, Any]]) -> None:
    outcomes[0]["video"]["uri"] = "file:///v/other.mp4"


def without_clips(outcomes: list[dict[str, Any]]) -> None:
    outcomes[0]["n_clips"] = 0


@pytest.mark.parametrize("change", [reordered, of_another_file, without_clips])
def test_outcomes_that_are_not_those_of_the_plan_are_damage_to_all(
    store: LocalStore, manifest: Manifest, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Both audits and both readers of rows begin with the same problem, and count or name its shard."""

    def changed(table: pa.Table, footer: dict[str, str]) -> pa.Table:
        change(outcomes := json.loads(footer[schema.OUTCOMES_KEY]))
        footer[schema.OUTCOMES_KEY] = json.dumps(outcomes)
        return table

    rewrite(path := store.root / name(manifest, clips_key), changed)
    quick, deep = audit(store, JOB, deep=False), audit(store, JOB)
    assert quick.problems[0] == deep.problems[0] and min(quick.changed, deep.changed) >= 4
    assert deep.bad_shards == {path.stem} <= quick.bad_shards
    for clips in (False, True):
        with pytest.raises(DamagedJob) as caught:
            list(NewestRows(store, JOB).rows(clips=clips))
        assert str(caught.value).startswith(f"{store.url}/{quick.problems[0]}. ")


def put(column: str, value: object) -> Callable[[pa.Table, dict[str, str]], pa.Table]:
    """A change of the first row of a table."""

    def changed(table: pa.Table, _: dict[str, str]) -> pa.Table:
        at, field = table.column_names.index(column), table.schema.field(column)
        values = [value, *table[column].to_pylist()[1:]]
        return table.set_column(at, field, pa.array(values, field.type))

    return changed


def of_another_shard(table: pa.Table, footer: dict[str, str]) -> pa.Table:
    footer[schema.SHARD_KEY] = json.dumps(json.loads(footer[schema.SHARD_KEY]) | {"shard": 7})
    return table


def out_of_order(table: pa.Table, footer: dict[str, str]) -> pa.Table:
    """The first clip starts after the second one of its video."""
    return put("start_frame", 10_000)(put("end_frame", 10_016)(table, footer), footer)


@pytest.mark.parametrize(
    "change",
    [
        put("path", "x.mp4"),
        put("plan_seq", 9),
        put("start_s", -0.5),
        put("n_padded", 16),
        out_of_order,
        of_another_shard,
    ],
    ids=["path", "plan_seq", "start_s", "n_padded", "order", "shard"],
)
def test_clip_rows_that_do_not_fit_the_plan_are_damage(
    store: LocalStore, manifest: Manifest, change: Callable[[pa.Table, dict[str, str]], pa.Table]
) -> None:
    """A row of another path, plan or time, or a footer of another shard, is damage to `verify --deep` and readers.

    The other files are made from these very clips, so that nothing else is wrong.
    """
    rewrite(path := store.root / name(manifest, clips_key), change)
    for key in (videos_key, failures_key):
        (store.root / name(manifest, key)).unlink()
    derive(store, manifest.shard(0), JOB.recipe, manifest.user_columns(0))
    deep = audit(store, JOB)
    assert deep.changed and deep.bad_shards == {path.stem}
    with pytest.raises(DamagedJob, match=path.name):
        list(NewestRows(store, JOB).rows())


def test_only_this_version_of_arrow_must_give_the_same_bytes(
    store: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values in other bytes are damage if this version wrote them, and sound if another did."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_ROWS", 1)
        rewrite(store.root / name(manifest, videos_key), lambda table, _: table)
    assert audit(store, JOB).bad_derived == {name(manifest, videos_key)}
    monkeypatch.setattr("pyarrow.cpp_version", "0.1")
    assert not audit(store, JOB).damaged


def test_no_flipped_bit_goes_unnoticed(store: LocalStore, manifest: Manifest) -> None:
    """Random single-bit flips in clips and videos files: verify finds each one (row 45, a short version)."""
    rng = np.random.default_rng(20261123)
    for trial in range(40):
        path = store.root / name(manifest, (clips_key, videos_key)[trial % 2], trial % 3)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        assert audit(store, JOB).damaged, f"trial {trial} of seed 20261123"
        path.write_bytes(content)
    assert not audit(store, JOB).damaged


def test_missing_derived_files_after_a_kill_are_not_damage(store: LocalStore, manifest: Manifest) -> None:
    """A resume completes a committed shard without its videos file."""
    (store.root / name(manifest, videos_key)).unlink()
    result = audit(store, JOB)
    assert (result.underived, result.damaged) == (1, False)


def test_an_edited_manifest_is_refused(store: LocalStore, manifest: Manifest) -> None:
    """A flipped byte in a manifest part or in a plan's record stops everything (row 44)."""
    part = store.root / manifest.plan.folder / "manifest-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(DamagedJob, match="manifest-00000"):
        audit(store, JOB)


def test_a_plan_of_another_recipe_is_refused(store: LocalStore, manifest: Manifest) -> None:
    """Every plan belongs to job.json's recipe (I7), and whatever reads the plans says so in the same words."""
    other, said = JobRecord(recipe(clips="every:8"), "random:0", {}), set()
    for use in (audit, NewestRows, manifests):
        with pytest.raises(DamagedJob, match=r"plans/0001\.json was made for another recipe .*; restore") as caught:
            use(store, other)
        said.add(str(caught.value))
    assert len(said) == 1


def test_failures_are_listed_with_their_reason(store: LocalStore, manifest: Manifest) -> None:
    """Current failures are those of the newest plan that names the video."""
    assert {row["video_id"]: row["reason"] for row in current_failures(store)} == dict.fromkeys("bfj", "truncated")


def test_failures_of_older_plans_are_left_out_without_looking_up_ids(
    store: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`f` is planned again, and pending. A file is compared with its shard: sorted ids are read from the disk."""
    write_plan(store, 2, recipe(), with_shards(videos("f"), ShardSizing(1)), 0, ShardSizing())
    monkeypatch.setattr(NewestPlans, "find", lambda *_: pytest.fail("looked up"))
    assert [row["video_id"] for row in current_failures(store)] == ["b", "j"]


@pytest.mark.fault(43)
@pytest.mark.parametrize("deep", [False, True])
def test_the_software_that_wrote_each_shard_is_listed(store: LocalStore, deep: bool) -> None:
    """A job resumed with newer packages is undamaged, and the audit counts the shards that each version wrote."""
    found = planned(store, NAMES)
    for shard, torch in enumerate(("2.12.0", "2.13.0", "2.13.0")):
        rows = shard_rows(found, shard)
        rows.stats["software"] = {"torch": torch, "av": "18.0"}
        commit_shard(store, rows, recipe(), found.user_columns(shard))
    result = audit(store, JOB, deep=deep)
    assert in_pieces(store, deep) == result
    assert result.software == {"torch": {"2.12.0": 1, "2.13.0": 2}, "av": {"18.0": 3}}
    assert not result.damaged


@pytest.mark.fault(52)
@pytest.mark.parametrize("deep", [False, True])
def test_shards_made_with_other_settings_are_listed(store: LocalStore, deep: bool) -> None:
    """Device, batch size and, on a CPU, threads are counted by shard, with an example of each; none is damage."""
    found = planned(store, NAMES)
    for shard, (device, batch, threads) in enumerate((("cpu", 4, 1), ("cpu", 8, 1), ("cuda:0", 8, 2))):
        rows = shard_rows(found, shard)
        rows.stats.update(device=device, batch_size=batch, threads=threads)
        commit_shard(store, rows, recipe(), found.user_columns(shard))
    result = audit(store, JOB, deep=deep)
    assert in_pieces(store, deep) == result
    assert result.settings == {"device": {"cpu": 2, "cuda:0": 1}, "batch_size": {"4": 1, "8": 2}, "threads": {"1": 2}}
    assert result.examples["batch_size"] == {"4": found.shard(0).name, "8": found.shard(1).name}
    assert not result.damaged
