"""Exports: one array per video equal to its rows, safe names, and DIR as a whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.pipeline.dataset.commit import clips_key
from p3d.pipeline.dataset.plans import load_plans
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.errors import DamagedJob, InputError, OtherRecipe, StoreFull, Unfinished
from p3d.pipeline.recipe import DTYPES
from p3d.pipeline.results import export
from p3d.pipeline.results.export import export_npy, safe_name
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import DIM, videos
from tests.pipeline.test_snapshot import NAMES, add_plan, newest, recipe_

STRANGE = (
    "../../etc/passwd", "/abs", "..", ".", ".hidden", "", "a\0b", "line\nbreak", "x" * 300, "con", "AUX.mp4", "Case",
    "case", "caSE", "~home", "tab\tname", "ü", "u\u0308", "a/b", "a\\b", "C:x", "Com1", "name.", "-dash", "ok.v1_2-x",
)  # fmt: skip


def rows_by_hand(store: LocalStore) -> dict[str, list[tuple[int, float, float, list[float]]]]:
    """video_id -> (clip_index, start_s, end_s, vector) of the newest plan's rows, by clip_index, from the files."""
    found: dict[str, dict[int, list[tuple[int, float, float, list[float]]]]] = {}
    for path in sorted((store.root / "clips").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            clip = row["clip_index"], row["start_s"], row["end_s"], row["embedding"]
            found.setdefault(row["video_id"], {}).setdefault(row["plan_seq"], []).append(clip)
    return {name: sorted(plans[max(plans)]) for name, plans in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_snapshot", [False, True])
def test_arrays_and_index_are_the_rows(tmp_path: Path, dtype: str, of_snapshot: bool) -> None:
    """Every array has the stored vectors of one video in the order of time, and the index its seconds and facts."""
    store = LocalStore(str(tmp_path / "out"))
    chosen = recipe_(embedding_dtype=dtype)
    add_plan(store, videos(NAMES), chosen=chosen, frames=(40, 0, 16, 900))
    add_plan(store, videos(("c", "x")), seq=2, chosen=chosen, frames=(33, 64))
    source = newest(store)
    if of_snapshot:
        dest = LocalStore(str(tmp_path / "snapshot"))
        snapshot(newest(store), dest)
        source = SnapshotRows(dest)
    steps: list[tuple[str, int, int]] = []
    made = export_npy(source, tmp_path / "npy", on_step=lambda *step: steps.append(step))
    expected = rows_by_hand(store)
    index = pq.read_table(tmp_path / "npy" / "index.parquet").to_pylist()
    assert [row["video_id"] for row in index] == [*(one for one in NAMES if one in expected and one != "c"), "c", "x"]
    for row in index:
        array, clips = np.load(tmp_path / "npy" / row["file"]), expected[row["video_id"]]
        assert (array.dtype, array.shape) == (np.dtype(dtype), (row["n_clips"], DIM))
        np.testing.assert_array_equal(array, np.array([vector for *_, vector in clips], dtype))
        assert row["start_s"] == [start for _, start, _, _ in clips]
        assert row["end_s"] == [end for _, _, end, _ in clips]
        assert (row["fps"], row["stride_frames"], row["clip_frames"]) == (25.0, 16, 16)
        assert (row["name"], row["uri"]) == (row["video_id"], f"file:///v/{row['video_id']}.mp4")
    assert {path.name for path in (tmp_path / "npy" / "features").iterdir()} == {f"{one}.npy" for one in expected}
    assert (made.videos, made.clips, made.failures) == (8, sum(map(len, expected.values())), 3)
    assert made.size_bytes == sum(path.stat().st_size for path in (tmp_path / "npy" / "features").iterdir())
    assert steps[-1] == ("written", 8, 8)


def test_a_video_in_several_row_groups_is_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the pieces in which rows arrive nor the parts of the index change what is written."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), frames=(1600, 40))
    export_npy(newest(store), tmp_path / "whole")
    monkeypatch.setattr(export, "FLUSH_CLIPS", 1)
    pieces = list(export._pieces(newest(store)))
    parts = [(name, rows.slice(at, 7)) for name, rows in pieces for at in range(0, len(rows), 7)]
    monkeypatch.setattr(export, "_pieces", lambda _: iter(parts))
    export_npy(newest(store), tmp_path / "parts")
    for one in ("features/a.npy", "features/b.npy"):
        assert (tmp_path / "parts" / one).read_bytes() == (tmp_path / "whole" / one).read_bytes()
    tables = [pq.read_table(tmp_path / name / "index.parquet") for name in ("whole", "parts")]
    assert tables[0].equals(tables[1])


def test_a_resampled_video_counts_in_its_own_frames(tmp_path: Path) -> None:
    """With --fps the index has that rate and the frames of the resampled video, from which strides are counted."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), frames=(40,))
    facts = export._facts(newest(store), None)
    at = facts.column_names.index
    facts = facts.set_column(at("resampled_fps"), "resampled_fps", pa.array([10.0, None]))
    facts = facts.set_column(at("resampled_frames"), "resampled_frames", pa.array([16, None]))
    assert [(row["fps"], row["n_frames"]) for row in export._rows_of(facts)] == [(10.0, 16), (25.0, 40)]


def test_all_is_on_the_disk_before_dir_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of an export is synced before the folder gets its name, and its parent after it."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), frames=(40,))
    synced: list[tuple[int, bool]] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "npy").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    export_npy(newest(store), tmp_path / "npy")
    before = {number for number, exists in synced if not exists}
    assert {path.stat().st_ino for path in (tmp_path / "npy", *(tmp_path / "npy").rglob("*"))} <= before
    assert (tmp_path.stat().st_ino, True) in synced


def test_names_are_safe_unique_and_readable() -> None:
    """No id names another folder or a device, two names differ in more than case, and plain ids are kept."""
    taken = set[str]()
    names = {one: safe_name(one, taken) for one in STRANGE}
    assert len({name.lower() for name in names.values()}) == len(STRANGE) == len(taken)
    for name in names.values():
        assert name.isascii() and name.isprintable() and len(name) < 150
        assert not {"/", "\\", ":", " "} & set(name) and not name.startswith(".")
        assert name.partition(".")[0].lower() not in {"con", "aux", "com1"}
    assert [one for one in STRANGE if names[one] == one] == ["Case", "name.", "-dash", "ok.v1_2-x"]
    assert names["case"].startswith("case~") and names["../../etc/passwd"].startswith("etc_passwd~")
    other = set[str]()
    assert [safe_name(one, other) for one in STRANGE] == list(names.values())


def test_ids_of_any_text_stay_inside_dir(tmp_path: Path) -> None:
    """An output with hostile ids writes into DIR alone, and the index leads from each id to its array."""
    store = LocalStore(str(tmp_path / "a" / "b" / "out"))
    ids = tuple(one for one in STRANGE if one)
    add_plan(store, videos(ids), frames=(16,))
    folder = tmp_path / "a" / "b" / "c" / "npy"
    made = export_npy(newest(store), folder)
    outside = {path for path in tmp_path.rglob("*") if store.root not in (path, *path.parents)}
    assert {path for path in outside if path.is_file()} == {
        folder / "index.parquet",
        *(folder / "features").glob("*.npy"),
    }
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    vectors = {name: [vector for *_, vector in clips] for name, clips in rows_by_hand(store).items()}
    assert {row["video_id"] for row in rows} == set(ids)
    for row in rows:
        np.testing.assert_array_equal(np.load(folder / row["file"]), np.array(vectors[row["video_id"]], np.float32))
    assert made.renamed == len(ids) - 4


def test_dir_may_have_the_longest_name(tmp_path: Path) -> None:
    """The hidden folder next to it has a name of its own, of which a file system takes 255 bytes, too."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("a"), frames=(40,))
    for name in ("漢" * 85, "x" * 255):
        assert export_npy(newest(store), tmp_path / name).videos == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x" * 255, "漢" * 85]


def test_a_used_dir_is_refused_and_kept(tmp_path: Path) -> None:
    """A folder with any file is not touched, nor is a file, or a folder in OUT; an empty folder is used."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), frames=(16,))
    used, empty = tmp_path / "used", tmp_path / "empty"
    used.mkdir()
    (used / "letter.txt").write_text("dear aunt")
    empty.mkdir()
    with pytest.raises(OtherRecipe, match=r"not empty \(letter.txt\)"):
        export_npy(newest(store), used, on_step=lambda *_: pytest.fail("it has begun to read"))
    with pytest.raises(InputError, match="name a new or empty folder"):
        export_npy(newest(store), used / "letter.txt")
    with pytest.raises(OtherRecipe, match="lies in"):
        export_npy(newest(store), store.root / "npy")
    (tmp_path / "link").symlink_to(empty)
    export_npy(newest(store), tmp_path / "link")
    assert (empty / "index.parquet").is_file() and (tmp_path / "link").is_symlink()
    assert [path.name for path in used.iterdir()] == ["letter.txt"]
    assert not list(tmp_path.glob(".*"))


def test_a_dir_that_is_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    """If another program writes into DIR during the export, the export is refused and removed."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("ab"), frames=(16,))
    folder = tmp_path / "npy"

    def fill(*_: object) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "mine").touch()

    with pytest.raises(OtherRecipe, match="not empty"):
        export_npy(newest(store), folder, on_step=fill)
    assert [path.name for path in folder.iterdir()] == ["mine"] and not list(tmp_path.glob(".*"))


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage, pending videos, a full disk and clips that do not fit their videos end it without a DIR."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("abcd"), frames=(40,))
    folder = tmp_path / "npy"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreFull, match="disk is full"):
        patch.setattr(os, "fsync", full)
        export_npy(newest(store), folder)
    pieces = list(export._pieces(newest(store)))
    for wrong in (
        pieces[:-1],
        pieces[1:],
        [*pieces, ("z", pieces[0][1])],
        [*pieces[:-1], ("d", pieces[0][1][:1])],
        pieces[::-1],
    ):
        with monkeypatch.context() as patch, pytest.raises(DamagedJob, match="does not add up"):
            patch.setattr(export, "_pieces", lambda _, wrong=wrong: iter(wrong))
            export_npy(newest(store), folder)
    add_plan(store, videos("ef"), seq=2, commit=False)
    with pytest.raises(Unfinished, match="--skip-pending"):
        export_npy(newest(store), folder)
    path = store.root / clips_key(load_plans(store)[0].shard_names[0])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DamagedJob, match="clips/"):
        export_npy(newest(store), folder, skip_pending=True)
    assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("when", ["fsync", "index.parquet", "npy"])
def test_a_kill_leaves_no_dir(tmp_path: Path, when: str) -> None:
    """Killed while an array is synced, or before the index or the folder gets its name: no DIR, and the next works."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos("abcd"), frames=(40,))
    code = (
        "import os, signal, pathlib\n"
        "from p3d.jobs.job import rows_of\nfrom p3d.pipeline.results import export\n"
        "from p3d.pipeline.storage.urls import open_store\n"
        "sync, rename = os.fsync, pathlib.Path.rename\n"
        "def die(this, *names, then):\n"
        f"    if {when!r} in ('fsync', *(name.name for name in names)): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return then(this, *names)\n"
        f"if {when!r} == 'fsync': os.fsync = lambda one: die(one, then=sync)\n"
        "pathlib.Path.rename = lambda one, to: die(one, to, then=rename)\n"
        f"export.export_npy(rows_of(open_store({store.url!r})), pathlib.Path({str(tmp_path / 'npy')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "npy").exists()
    (part,) = tmp_path.glob(".npy.*.part")
    assert (part / "index.parquet").exists() is (when == "npy")
    export_npy(newest(store), tmp_path / "npy")
    assert len(list((tmp_path / "npy" / "features").iterdir())) == 4


def test_the_verb(tmp_path: Path) -> None:
    """It prints a table that fits 80 columns or one JSON object; refusals have the codes that the help says."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos((*NAMES, "A")), frames=(40, 16, 9, 0))
    code, printed, said = in_process("results", "export", store.url, str(tmp_path / "npy"))
    assert code == 0, said
    assert ["array", "[clips,", f"{DIM}]", "float32"] in [line.split() for line in printed.splitlines()]
    for words in ("2 videos failed", "1 video with a file name that is not the video_id", "index.parquet lists"):
        assert words in said
    assert max(map(len, printed.splitlines())) <= 80
    assert in_process("results", "export", store.url, str(tmp_path / "npy"))[0] == 5
    assert in_process("results", "export", store.url, "s3://bucket/npy")[0] == 2
    add_plan(store, videos("y"), seq=2, commit=False)
    assert in_process("results", "export", store.url, str(tmp_path / "more"))[0] == 6
    code, printed, _ = in_process("results", "export", store.url, str(tmp_path / "more"), "--skip-pending", "--json")
    assert (code, '"pending": 1' in printed, '"stride_frames": 16' in printed) == (0, True, True)
    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(newest(store), dest, clips=False, skip_pending=True)
    code, _, said = in_process("results", "export", dest.url, str(tmp_path / "none"))
    assert (code, "without clips" in said) == (2, True)
