"""Hit rates: those computed by hand and by brute force, over the newest rows alone; what is left out is counted."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.errors import DamagedJob, InputError
from p3d.pipeline.recipe import JobRecord, Recipe, ShardSizing
from p3d.pipeline.results.evaluation.classes import class_names, top_k
from p3d.pipeline.results.evaluation.labels import Labels, read_labels
from p3d.pipeline.results.evaluation.scores import Hits, evaluate
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types import FLOAT32
from tests.pipeline.rows import shard_rows, videos
from tests.pipeline.test_snapshot import add_plan, newest, recipe_

K = 4
SCORED = recipe_(num_classes=K)


def labels(key: str = "video_id", **of: int | Sequence[int]) -> Labels:
    return Labels(key, {name: frozenset([one] if isinstance(one, int) else one) for name, one in of.items()})


def by_hand(store: LocalStore, probs_RK: list[list[float]]) -> None:
    """Videos a (3 clips), b (failed), c (1 clip), d (1 clip), with the given scores, clip by clip."""
    store.create("job.json", JobRecord(SCORED, "random:0", {}).to_json())
    manifest = Manifest(
        store, write_plan(store, 1, SCORED, with_shards(videos("abcd"), ShardSizing(4)), 0, ShardSizing())
    )
    rows = replace(shard_rows(manifest, 0), probs_RK=np.array(probs_RK, np.float32))
    commit_shard(store, rows, SCORED, manifest.user_columns(0))


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """The clips of a rank classes 0, 0, 3 first, and their mean ranks 3 first; in c, classes 1 and 2 are equal."""
    store = LocalStore(str(tmp_path / "out"))
    by_hand(
        store,
        [
            [0.375, 0.25, 0.0625, 0.3125],  # a
            [0.375, 0.25, 0.0625, 0.3125],  # a
            [0.0, 0.125, 0.0, 0.875],  # a: its mean is 0.25, 0.2083, 0.0417, 0.5
            [0.25, 0.375, 0.375, 0.0],  # c
            [0.125, 0.125, 0.125, 0.625],  # d
        ],
    )
    return store


def test_rates_are_those_computed_by_hand(out: LocalStore) -> None:
    """Labels a 3, c 2, d 0: of five clips one hits; of three videos a hits at 1, c at 2 (its equal class 1 comes
    first), and so does d, whose three last classes are equal and 0 the first of them. b failed."""
    hits = evaluate(newest(out), labels(a=3, b=1, c=2, d=0), top=2)
    expected = {"clips": 5, "clip_hit1": 1 / 5, "videos": 3, "video_hit1": 1 / 3, "video_hit_top": 1.0, "top": 2}
    assert hits == Hits(**expected, unlabelled=0, failed=1, pending=0, unknown_labels=0)
    hits = evaluate(newest(out), labels(a=0, c=1, zebra=1), top=3)
    expected = {"clips": 4, "clip_hit1": 3 / 4, "videos": 2, "video_hit1": 1 / 2, "video_hit_top": 1.0, "top": 3}
    assert hits == Hits(**expected, unlabelled=1, failed=1, pending=0, unknown_labels=1)


def test_any_of_several_labels_will_do(out: LocalStore) -> None:
    """A row is a hit if any of its labels is among the most likely; it never counts twice."""
    hits = evaluate(newest(out), labels(a=(0, 3), d=(0, 2)), top=2)
    assert (hits.clip_hit1, hits.video_hit1, hits.video_hit_top) == (3 / 4, 1 / 2, 1.0)


def expected_by_brute_force(out: LocalStore, truth: dict[str, set[int]], k: int) -> tuple[float, float, float]:
    """The three rates from the Parquet files, by sorting every row in plain Python."""
    newest_seq: dict[str, int] = {}
    tables = {
        folder: [row for path in (out.root / folder).iterdir() for row in pq.read_table(path).to_pylist()]
        for folder in ("clips", "videos", "failures")
    }
    for row in tables["videos"] + tables["failures"]:
        newest_seq[row["video_id"]] = max(row["plan_seq"], newest_seq.get(row["video_id"], 0))

    def rate(folder: str, k: int) -> float:
        hits = [
            bool(truth[row["video_id"]] & set(sorted(range(K), key=lambda c: (-row["probs"][c], c))[:k]))
            for row in tables[folder]
            if newest_seq[row["video_id"]] == row["plan_seq"] and row["video_id"] in truth
        ]
        return sum(hits) / len(hits)

    return rate("clips", 1), rate("videos", 1), rate("videos", k)


@pytest.mark.parametrize("seed", range(4))
def test_rates_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """For any plans, shards, row groups and labels, of a job and of its snapshot: only the newest rows count, and every
    video is evaluated, unlabelled, failed or pending."""
    print(f"{seed = }")
    rng = Random(seed)
    monkeypatch.setattr(schema, "ROW_GROUP_ROWS", rng.randint(1, 40))
    out, k = LocalStore(str(tmp_path / "out")), rng.randint(2, K)
    names = [f"v{at:02d}" for at in range(20)]
    for seq in (1, 2):
        drawn = rng.sample(names, 12)
        frames = [rng.choice((0, 9, 40, 200)) for _ in range(5)]
        add_plan(out, videos(drawn), chosen=SCORED, seq=seq, shard_videos=rng.randint(1, 9), frames=[*frames, 40])
    add_plan(out, videos(["w0", "w1"]), chosen=SCORED, seq=3, commit=False)
    truth = {name: set(rng.sample(range(K), rng.choice((1, 1, 2)))) for name in rng.sample(names, 15)}
    key = rng.choice(("video_id", "path", "uri"))
    shape = {"video_id": "{}", "path": "{}.mp4", "uri": "file:///v/{}.mp4"}[key]
    given_ = Labels(key, {shape.format(name): frozenset(one) for name, one in truth.items()})

    hits = evaluate(newest(out), given_, top=k)

    rates = expected_by_brute_force(out, truth, k)
    assert (hits.clip_hit1, hits.video_hit1, hits.video_hit_top) == pytest.approx(rates, abs=1e-12)
    assert hits.videos + hits.unlabelled + hits.failed + hits.pending == newest(out).newest.n_videos
    assert hits.pending == 2
    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(newest(out), dest, skip_pending=True)
    assert evaluate(SnapshotRows(dest), given_, top=k) == hits
    bare = LocalStore(str(tmp_path / "bare"))
    snapshot(newest(out), bare, skip_pending=True, clips=False)
    assert evaluate(SnapshotRows(bare), given_, top=k) == replace(hits, clips=0, clip_hit1=None)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 5), max_size=6), st.integers(1, 7))
def test_the_likeliest_classes_come_first_and_equal_ones_by_number(rows: list[tuple[float, ...]], k: int) -> None:
    """top_k is the first k of all classes sorted by falling score, then by number."""
    probs_NK: FLOAT32 = np.array(rows, np.float32).reshape(-1, 5)
    assert top_k(probs_NK, k).tolist() == [sorted(range(5), key=lambda c: (-row[c], c))[:k] for row in rows]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_job_without_scores_says_how_to_get_them(tmp_path: Path) -> None:
    """The message names --scores."""
    out = LocalStore(str(tmp_path))
    add_plan(out, videos("abc"), chosen=replace(SCORED, scores=False))
    with pytest.raises(InputError, match=r"stores no class scores .* --scores"):
        evaluate(newest(out), labels(a=1))


def test_labels_of_no_video_show_what_was_compared(out: LocalStore) -> None:
    """If nothing matches, the message shows a value of each side; a label of a failed video alone is not a match."""
    for given_, other in ((labels("path", a=1), "'a' in the list, and 'b.mp4' in the dataset"), (labels(b=1), "'b'")):
        with pytest.raises(InputError, match=f"none of 1 labels is of a video that has rows in .*{other}"):
            evaluate(newest(out), given_)


def test_a_path_of_two_videos_is_refused(tmp_path: Path) -> None:
    """A label that could mean either of two videos is an error."""
    out, table = LocalStore(str(tmp_path)), videos("ac")
    table = table.set_column(1, table.schema.field("path"), pa.array(["same.mp4", "same.mp4"]))
    add_plan(out, table, chosen=SCORED, frames=(40,))
    with pytest.raises(InputError, match=r"several videos of .* have path 'same.mp4'; label by video_id"):
        evaluate(newest(out), Labels("path", {"same.mp4": frozenset([1])}))


def test_a_damaged_row_is_not_a_hit(out: LocalStore) -> None:
    """A flipped byte of the scores is damage, not another rate."""
    path = next((out.root / "clips").iterdir())
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = group.column(group.num_columns - 1)
    assert column.path_in_schema == "probs.list.element"
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedJob, match=path.name):
        evaluate(newest(out), labels(a=3))


@pytest.mark.parametrize("probs", [[0.5, 0.4, 0.0, 0.0], [np.nan, 1.0, 0.0, 0.0], [1.5, -0.5, 0.0, 0.0]])
def test_rows_that_are_not_a_distribution_are_damage(out: LocalStore, probs: list[float]) -> None:
    """Readable files with impossible scores are refused by verify and by every reader of rows."""
    from p3d.pipeline.dataset.verify import audit

    name = next((out.root / "clips").iterdir()).stem
    path = out.root / "clips" / f"{name}.parquet"
    with schema.open_parquet(path) as file:
        table, footer = file.read(), schema.read_footer(file)
    probs_RK = schema.probs_of(table, K).copy()
    probs_RK[1] = probs
    kind = table.schema.field("probs")
    table = table.set_column(table.num_columns - 1, kind, schema.vector_array(probs_RK, kind.type))
    path.unlink()
    schema.write_parquet(path, table, footer)
    job = JobRecord(SCORED, "random:0", {})
    found = audit(out, job)
    assert found.bad_shards == {name} and any("impossible values" in problem for problem in found.problems)
    with pytest.raises(DamagedJob, match="impossible values"):
        list(NewestRows(out, job).rows())


# --- labels -----------------------------------------------------------------------------------------------------------

NAMES = ("archery", "bowling; indoor", "null", "2")


def read(text: str, names: tuple[str, ...] = NAMES) -> Labels:
    return read_labels("labels.csv", text.encode(), names, K)


def test_labels_are_names_or_numbers() -> None:
    """Names take precedence over numbers (here class 3 is called 2), spaces around a label are ignored, an empty label
    is no label, and text stays text."""
    text = "\ufeffvideo_id,label,note\r\n007,archery,x\r\nb,0,\r\nc, 2 ;1,\r\nd,bowling; indoor,\r\ne,null,\r\nf,,\r\n"
    assert read(text) == labels("video_id", **{"007": 0, "b": 0, "c": (3, 1), "d": 1, "e": 2})
    assert read("path,uri,label\na,u,3\n", ()) == labels("uri", u=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("video_id,class\na,1\n", "needs a column label"),
        ("name,label\na,1\n", "one of video_id, uri, path; it has name, label"),
        ("path,label\na,4\n", "'4' is not a class: a name, such as 'archery', or a number from 0 to 3"),
        ("path,label\na,0;archer\n", "'archer' is not a class"),
        ("path,label\na,-1\n", "'-1' is not a class"),
        ("path,label\na,\u0663\n", "is not a class"),
        ("path,label\na,0\na,1\n", "names 'a' more than once"),
        ("path,label,label\na,0,1\n", "two columns of the same name"),
        ("path,label\na,0,1\n", "cannot be read as CSV"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_list_that_cannot_be_labels_is_refused(text: str, says: str) -> None:
    """The message names the file and the value."""
    with pytest.raises(InputError, match=f"labels.csv.*{says}"):
        read(text)


def test_labels_by_number_alone() -> None:
    """Weights without names, or with one name for two classes, say that numbers are needed."""
    with pytest.raises(InputError, match="'archery' is not a class: a number from 0 to 3; the weights name no classes"):
        read("path,label\na,archery\n", ())
    with pytest.raises(InputError, match="several classes 'x'"):
        read("path,label\na,x\n", ("x", "x", "y", "z"))


# --- names of the classes ---------------------------------------------------------------------------------------------


def put_weights(store: LocalStore, card: object) -> Recipe:
    """Weights in the format of safetensors, with metadata and without tensors; and the recipe that names them."""
    header = json.dumps({"__metadata__": {"p3d": json.dumps(card)}}).encode()
    content = struct.pack("<Q", len(header)) + header
    chosen = replace(SCORED, weights_sha256=hashlib.sha256(content).hexdigest())
    store.create(f"weights/{chosen.weights_sha256}.safetensors", content)
    return chosen


def test_names_are_those_of_the_weights(tmp_path: Path) -> None:
    """From the header of OUT/weights; empty without weights or names."""
    store = LocalStore(str(tmp_path))
    assert class_names(store, SCORED) == ()
    assert class_names(store, put_weights(store, {"class_names": list(NAMES)})) == NAMES
    assert class_names(store, put_weights(store, {"class_names": []})) == ()


@pytest.mark.parametrize("card", [{"class_names": ["one"]}, {}, []])
def test_weights_that_name_other_classes_are_damage(tmp_path: Path, card: object) -> None:
    """Too few names, or missing metadata keys: DamagedJob names the file."""
    store = LocalStore(str(tmp_path))
    chosen = put_weights(store, card)
    with pytest.raises(DamagedJob, match=chosen.weights_sha256):
        class_names(store, chosen)


def test_edited_weights_name_nothing(tmp_path: Path) -> None:
    """A changed name would give its labels to another class: the sha256 reveals the change."""
    store = LocalStore(str(tmp_path))
    chosen = put_weights(store, {"class_names": list(NAMES)})
    path = store.root / f"weights/{chosen.weights_sha256}.safetensors"
    path.write_bytes(path.read_bytes().replace(b"archery", b"archers"))
    with pytest.raises(DamagedJob, match="sha256 differs"):
        class_names(store, chosen)
