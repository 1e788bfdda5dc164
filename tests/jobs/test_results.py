"""`p3d results`: help loads no verb; snapshots and evaluations end to end, with a message for every refusal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from p3d.jobs.cli import VERBS, Verbs, cli
from p3d.pipeline.dataset.plans import write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.sources.lists import read_ids
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO, p3d
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import videos
from tests.pipeline.test_evaluate import NAMES as NAMES_OF_CLASSES
from tests.pipeline.test_evaluate import put_weights
from tests.pipeline.test_snapshot import NAMES, add_plan, recipe_


def groups(verbs: Verbs, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Verbs]]:
    """(words, table) of every group of verbs below the top."""
    inner = [((*before, name), where) for name, (where, _) in verbs.items() if isinstance(where, Mapping)]
    return [*inner, *(one for words, table in inner for one in groups(table, words))]


@pytest.mark.parametrize(("words", "table"), groups(VERBS), ids=lambda one: " ".join(one))
def test_a_group_lists_its_verbs_without_importing_them(words: tuple[str, ...], table: Verbs) -> None:
    """`p3d GROUP --help` has a line for each verb without loading its module; each verb has its own help."""
    code = (
        f"import sys; sys.argv = ['p3d', *{list(words)!r}, '--help']\n"
        "from p3d.jobs.cli import cli\ncli(standalone_mode=False)\n"
        "print(sorted(name for name in sys.modules if name.startswith(('p3d.jobs.cli.', 'pyarrow', 'pipeline'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb, (_, line) in table.items():
        assert re.search(rf"^  {verb} +{re.escape(line)}$", done.stdout, re.M)
        result = CliRunner().invoke(cli, [*words, verb, "--help"], terminal_width=80)
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= 80
    assert f"The verbs are {', '.join(table)}." in in_process(*words, "no-such-verb")[2]


def test_the_verbs_of_results_need_neither_torch_nor_ray() -> None:
    """A snapshot can be made on a machine without both."""
    code = (
        "import sys, p3d.jobs.cli.results, p3d.jobs.cli.evaluate, p3d.jobs.cli.index, p3d.jobs.cli.search;"
        "import p3d.jobs.api.search, p3d.jobs.cli.dedup, p3d.jobs.cli.export, p3d.pipeline.dataset.snapshot;"
        "import p3d.pipeline.results.evaluation.scores, p3d.pipeline.results.search.index_build;"
        "import p3d.pipeline.results.export;"
        "sys.exit(bool({'torch', 'ray', 'faiss', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.fixture
def out(tmp_path: Path) -> LocalStore:
    """Ten videos, two failed; one of these and two others are in a second plan, too."""
    store = LocalStore(str(tmp_path / "out"))
    add_plan(store, videos(NAMES), frames=(40, 16, 0, 9))
    add_plan(store, videos(("c", "a", "b")), seq=2, frames=(33, 0))
    return store


def test_a_takedown_from_end_to_end(out: LocalStore, tmp_path: Path) -> None:
    """A list of ids gives a dataset without them, which DuckDB and Polars read and `verify` finds clean."""
    (tmp_path / "gone.csv").write_text("video_id,why\nd,asked\na,asked\n")
    dest = tmp_path / "dest"
    ran = p3d("results", "snapshot", out.url, dest, "--exclude", tmp_path / "gone.csv", "--json")
    assert ran.code == 0, ran.err
    expected = {"videos": 7, "clips": 15, "failures": 1, "excluded": 2, "pending": 0, "superseded": 3}
    assert ran.json["counts"] == expected
    assert ran.json["recipe_digest"] == recipe_().digest
    assert "\r" not in ran.err
    rows = duckdb.sql(f"SELECT video_id, plan_seq, count(*) FROM '{dest}/clips/*.parquet' GROUP BY ALL").fetchall()
    assert len(rows) == 7
    assert ("c", 2, 3) in rows
    table = pl.read_parquet(dest / "videos" / "*.parquet")
    assert table["video_id"].to_list() == ["e", "f", "h", "i", "j", "c", "b"]
    ran = p3d("verify", dest)
    assert (ran.code, "clean: a snapshot of" in ran.err) == (0, True)
    path = dest / "videos" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"2")
    code, printed, said = in_process("verify", str(dest))
    assert (code, "videos/part-00000.parquet" in said, "superseded" in printed) == (7, True, True)
    assert in_process("verify", str(dest), "--json")[0] == 7
    assert in_process("verify", str(dest), "--repair")[0] == 2


def test_a_snapshot_says_what_it_left_out(out: LocalStore, tmp_path: Path) -> None:
    """Counts go to stdout, what was left out to stderr."""
    (tmp_path / "ids").write_text("d\r\n\r\nzebra\n")
    args = ("results", "snapshot", out.url, str(tmp_path / "dest"), "--exclude", str(tmp_path / "ids"), "--no-clips")
    code, printed, said = in_process(*args, "--allow-unknown")
    assert code == 0, said
    assert printed.split()[:6] == ["videos", "7", "clips", "0", "failures", "2"]
    for words in ("1 excluded", "1 to exclude that OUT does not have", "3 older rows", "snapshot.json lists"):
        assert words in said
    code, _, said = in_process("results", "snapshot", str(tmp_path / "dest"), str(tmp_path / "again"))
    assert (code, "no clips" in said) == (0, True)


def test_refusals_of_a_snapshot_have_messages_and_codes(out: LocalStore, tmp_path: Path) -> None:
    """Usage gives 2, a missing job 4, a used DEST 5, pending videos 6, damage 7; DEST never gets a snapshot.json."""
    (tmp_path / "ids.txt").write_text("zebra\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear aunt")
    dest = str(tmp_path / "dest")

    def refused(code: int, says: str, *args: str) -> None:
        ran = in_process("results", "snapshot", *args)
        assert (ran[0], ran[1]) == (code, ""), ran
        assert says in ran[2]
        assert "Traceback" not in ran[2]
        assert not list(tmp_path.rglob("snapshot.json"))

    refused(2, "'zebra'", out.url, dest, "--exclude", str(tmp_path / "ids.txt"))
    refused(2, "does not exist", out.url, dest, "--exclude", str(tmp_path / "nothing"))
    refused(2, "only folders and s3://", out.url, "gs://bucket")
    refused(4, "no job exists", str(tmp_path / "nowhere"), dest)
    refused(5, "not empty (letter.txt)", out.url, str(tmp_path / "used"))
    refused(8, "a file exists where a folder is needed", out.url, str(tmp_path / "ids.txt" / "dest"))
    assert not Path(dest).exists()
    damaged = next((out.root / "clips").iterdir())
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    refused(7, damaged.name, out.url, dest)
    damaged.write_bytes(content)
    LocalStore(dest).create("clips/part-00000.parquet", b"what a kill left")
    refused(5, "not finished; remove it", out.url, dest)
    write_plan(out, 3, recipe_(), with_shards(videos(("y", "z")), ShardSizing(4)), 0, ShardSizing())
    refused(6, "2 of the videos", out.url, str(tmp_path / "dest2"))


@pytest.fixture
def scored(tmp_path: Path) -> LocalStore:
    """Six videos, one failed, with weights that have class names; two more are pending."""
    store = LocalStore(str(tmp_path / "scored"))
    chosen = put_weights(store, {"class_names": list(NAMES_OF_CLASSES)})
    add_plan(store, videos("abcdef"), chosen=chosen, frames=(40, 0, 16, 9, 100, 16), shard_videos=6)
    add_plan(store, videos("gh"), chosen=chosen, seq=2, commit=False)
    return store


def test_an_evaluation_says_what_it_left_out(scored: LocalStore, tmp_path: Path) -> None:
    """Rates in percent with one decimal go to stdout, what was not evaluated to stderr."""
    (tmp_path / "labels.csv").write_text("path,label\na.mp4,archery\nc.mp4,1;3\nd.mp4,null\nb.mp4,0\nz.mp4,2\n")
    args = ("results", "evaluate", scored.url, "--labels", str(tmp_path / "labels.csv"))
    code, printed, said = in_process(*args)
    assert code == 0, said
    head, line = printed.splitlines()
    assert head.split("  ") == ["videos", "clips", "clip hit@1", "video hit@1", "video hit@5"]
    found = json.loads(in_process(*args, "--json")[1])
    rates = [f"{100 * found[name]:.1f}" for name in ("clip_hit1", "video_hit1", "video_hit_top")]
    assert line.split() == ["3", "5", *rates] and rates[2] == "100.0"
    assert (found["unlabelled"], found["failed"], found["pending"], found["unknown_labels"]) == (2, 1, 2, 1)
    for words in (
        "2 videos left out without a label",
        "1 video left out because they failed",
        "2 videos left out because they are pending",
        "1 label without a finished video here",
        "hit@5 is always 100 %: there are 4 classes",
    ):
        assert words in said, words
    snapshot = str(tmp_path / "snapshot")
    assert in_process("results", "snapshot", scored.url, snapshot, "--no-clips", "--skip-pending")[0] == 0
    code, printed, said = in_process(args[0], args[1], snapshot, *args[3:], "--top", "3")
    assert (code, printed.split()[-5:-2]) == (0, ["3", "0", "-"]) and "clip hit@1 is not available" in said
    assert "video hit@3" in printed and "always" not in said


def test_refusals_of_an_evaluation_have_messages_and_codes(scored: LocalStore, out: LocalStore, tmp_path: Path) -> None:
    """Usage gives 2, a missing job 4, damage 7."""
    (tmp_path / "labels.csv").write_text("path,label\na.mp4,archer\n")
    (tmp_path / "none.csv").write_text("path,label\nz.mp4,archery\n")
    bare = LocalStore(str(tmp_path / "bare"))
    add_plan(bare, videos("a"), chosen=recipe_(scores=False))

    def refused(code: int, says: str, *args: str) -> None:
        ran = in_process("results", "evaluate", *args)
        assert (ran[0], ran[1], says in ran[2], "Traceback" in ran[2]) == (code, "", True, False), ran

    labels = ("--labels", str(tmp_path / "labels.csv"))
    refused(2, "Missing option '--labels'", scored.url)
    refused(2, "does not exist", scored.url, "--labels", str(tmp_path / "nothing"))
    refused(2, "'archer' is not a class: a name, such as 'archery'", scored.url, *labels)
    refused(2, "none of 1 labels", scored.url, "--labels", str(tmp_path / "none.csv"))
    refused(2, "with --scores", bare.url, *labels)
    refused(2, "x>=2", scored.url, *labels, "--top", "1")
    refused(4, "no job exists", str(tmp_path / "nowhere"), *labels)
    refused(7, "safetensors is damaged", out.url, *labels)


@pytest.mark.parametrize("kind", ["ids.txt", "ids", "ids.csv", "ids.tsv", "ids.jsonl", "ids.parquet"])
def test_ids_are_text_whatever_they_look_like(tmp_path: Path, kind: str) -> None:
    """007 stays 007 in every format of a list."""
    path = tmp_path / kind
    if kind == "ids.parquet":
        pq.write_table(pa.table({"video_id": ["007", "1.0", "null"], "n": [1, 2, 3]}), path)
    else:
        head = "video_id\n" if kind in ("ids.csv", "ids.tsv") else ""
        lines = [json.dumps({"video_id": one}) if kind == "ids.jsonl" else one for one in ("007", "1.0", "null")]
        path.write_bytes("\r\n".join([f"\ufeff{head}{lines[0]}", *lines[1:], ""]).encode())
    assert read_ids(kind, path.read_bytes(), "video_id") == {"007", "1.0", "null"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("ids", b"\n \n", "contains no ids"),
        ("ids.csv", b"path\na.mp4\n", "no column 'video_id'"),
        ("ids.csv", b"video_id,x\n,1\n", "have no id"),
        ("ids.parquet", b"PAR1", "cannot be read"),
        ("ids.txt", b"a\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_a_list_that_cannot_be_ids_is_refused(name: str, content: bytes, says: str) -> None:
    """An empty or unreadable takedown list must not look like a successful takedown."""
    with pytest.raises(InputError, match=says):
        read_ids(name, content, "video_id")


def test_the_record_names_the_job(out: LocalStore, tmp_path: Path) -> None:
    """snapshot.json keeps the recipe, so that rows can still be compared when OUT no longer exists."""
    code, _, said = in_process("results", "snapshot", out.url, str(tmp_path / "dest"))
    assert code == 0, said
    from p3d.pipeline.dataset.snapshot_record import read_snapshot

    assert read_snapshot(LocalStore(str(tmp_path / "dest"))).job == JobRecord(recipe_(), "random:0", {"numpy": "2"})
