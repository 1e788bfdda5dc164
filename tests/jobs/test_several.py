"""Several outputs of a divided source: one answer for all, other recipes refused, damage of one named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import p3d
from p3d.jobs.cli.output import worst
from p3d.jobs.monitor.outputs import outputs_of
from p3d.jobs.monitor.report import make_report
from p3d.pipeline.dataset.commit import commit_shard, videos_key
from p3d.pipeline.dataset.plans import load_plans
from p3d.pipeline.errors import InputError, OtherRecipe
from p3d.pipeline.results.search.exact import Hit
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.jobs.test_cli import in_process
from tests.owned import own
from tests.pipeline.rows import shard_rows, videos
from tests.pipeline.test_snapshot import add_plan, recipe_
from tests.report_page import harmless

HALVES = (("abcd", (900, 16, 0, 40)), ("efgh", (64, 600, 33, 16)))


def add_half(store: Store, half: int, names: str = "", at: str = "v", **chosen: object) -> None:
    """One half of a source as the only plan of an output. Its rows are those of plan `half` + 1 of the `whole`."""
    letters, frames = HALVES[half]
    recipe = recipe_(**chosen)
    table = videos(names or letters)
    moved = pc.replace_substring(table["uri"], "///v/", f"///{at}/")
    table = table.set_column(table.column_names.index("uri"), table.schema.field("uri"), moved)
    manifest = add_plan(store, table, chosen=recipe, commit=False)
    rows = shard_rows(manifest, 0, seed=half + 1, frames=frames, n_scores=recipe.n_scores)
    commit_shard(store, rows, recipe, manifest.user_columns(0))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with an output for each half of a source, a folder without a job, and a link to another output."""
    for half, name in enumerate(("2019", "2020")):
        add_half(LocalStore(str(tmp_path / "parts" / name)), half)
    (tmp_path / "parts" / "notes").mkdir()
    add_half(LocalStore(str(tmp_path / "elsewhere")), 0)
    (tmp_path / "parts" / "linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "parts"


@pytest.fixture
def whole(tmp_path: Path) -> LocalStore:
    """One output of the whole source."""
    store = LocalStore(str(tmp_path / "whole"))
    for half, (letters, frames) in enumerate(HALVES):
        add_plan(store, videos(letters), seq=half + 1, frames=frames)
    return store


def facts(hit: Hit) -> tuple[object, ...]:
    return hit.score, hit.query, hit.video_id, hit.path, hit.uri, hit.clip_index, hit.start_s, hit.end_s


def test_several_outputs_answer_as_one(parts: Path, whole: LocalStore) -> None:
    """Every search gives the hits of one output that has all rows, and says where each is."""
    both = [parts / "2019", parts / "2020"]
    hows: list[dict[str, Any]] = [
        {},
        {"distinct": 0.5},
        {"distinct": 0.1, "per_video": False},
        {"distinct": 0.0},
        {"per_video": False},
        {"with_self": True},
    ]
    for level, metric, how in product(("clip", "video"), ("cosine", "l2"), [*hows, {"where": "video_id!=f"}]):
        for query in ("a", "f", "e@1"):
            options = {"level": level, "metric": metric, "top": 5, **how}
            one, several = (p3d.search(out, query, **options) for out in (whole.url, both))
            assert [facts(hit) for hit in several.hits] == [facts(hit) for hit in one.hits]
            assert (several.n_rows, several.cut_short) == (one.n_rows, one.cut_short)
            for hit in several.hits:
                assert hit.out == str(both[hit.video_id in HALVES[1][0]])
            assert {hit.out for hit in one.hits} <= {None}
    found = p3d.search(both, "a", level="clip", top=100, per_video=False)
    assert {Path(hit.out or "").name for hit in found.hits} == {"2019", "2020"}


def test_a_folder_of_outputs_stands_for_them(parts: Path) -> None:
    """A folder without a job is the outputs directly in it, each once; links in it are not followed."""
    options = StoreOptions()
    assert [store.url for store in outputs_of([str(parts)], options)] == [str(parts / "2019"), str(parts / "2020")]
    named = [str(parts / "2020"), str(parts), str(parts / "2020" / ".")]
    assert [store.url for store in outputs_of(named, options)] == [str(parts / "2020"), str(parts / "2019")]
    nowhere = str(parts / "nowhere")
    assert [store.url for store in outputs_of([nowhere, str(parts / "notes")], options)] == [
        nowhere,
        str(parts / "notes"),
    ]
    assert in_process("status", nowhere)[0] == in_process("search", str(parts / "notes"), "a")[0] == 4


def test_the_rows_of_several_outputs_are_one_dataset(parts: Path, whole: LocalStore) -> None:
    """`open_dataset` chains the rows in the order of the outputs, with the output of each as a column."""
    one, several = p3d.open_dataset(whole.url), p3d.open_dataset(parts)
    assert (several.n_videos, several.n_pending) == (one.n_videos, 0) == (8, 0)
    for level in ("clip", "video"):
        (ids, vectors), (wanted, wanted_vectors) = (made.vectors(level) for made in (several, one))
        assert ids == wanted
        np.testing.assert_array_equal(vectors, wanted_vectors)
    rows = [row for batch in several.videos(["out", "video_id", "label"]) for row in batch.to_pylist()]
    assert [(Path(row["out"]).name, row["video_id"]) for row in rows] == [
        *(("2019", letter) for letter in "abd"),
        *(("2020", letter) for letter in "efgh"),
    ]
    assert several.failures()["video_id"].to_pylist() == ["c"] and "2020" in several.out
    columns = [set(next(iter(made.clips())).schema.names) for made in (several, one)]
    assert columns[0] - columns[1] == {"out"}


def test_columns_of_ones_own_are_joined_or_refused(tmp_path: Path) -> None:
    """A column that one output lacks is null there; one of two types is an error that names it."""
    stores = [LocalStore(str(tmp_path / name)) for name in "xyz"]
    for store, table in zip(
        stores, (videos("a"), videos("b").drop(["label"]), videos("c").set_column(7, "label", [[1]])), strict=True
    ):
        add_plan(store, table, frames=(40,))
    joined = p3d.open_dataset([stores[0].url, stores[1].url])
    assert [row["label"] for batch in joined.videos() for row in batch.to_pylist()] == ["label of a", None]
    with pytest.raises(InputError, match="'label' is int64 and string"):
        p3d.open_dataset([stores[0].url, stores[2].url])


def test_other_recipes_are_refused_with_what_differs(tmp_path: Path, parts: Path) -> None:
    """Rows of other settings are not comparable: exit code 5 and the settings, for searches and datasets alike."""
    add_half(LocalStore(str(parts / "2021")), 1, clips="every:8")
    code, printed, said = in_process("search", str(parts), "a")
    assert (code, printed) == (5, "")
    assert "2021" in said and "clips every:8, not every:16" in said and "weights_sha256" not in said
    with pytest.raises(OtherRecipe, match="every:8"):
        p3d.open_dataset(parts)
    assert in_process("search", str(parts / "2019"), "a", "--also", str(parts / "2020"))[0] == 0
    assert in_process("status", str(parts))[0] == in_process("verify", str(parts))[0] == 0


def test_an_id_in_several_outputs_is_not_guessed(tmp_path: Path) -> None:
    """Two outputs may have one id for different videos: both are found, and a query by it is refused."""
    stores = [LocalStore(str(tmp_path / name)) for name in ("x", "y")]
    add_half(stores[0], 0, "abcd")
    add_half(stores[1], 1, "aBCD", at="w")
    code, _, said = in_process("search", stores[0].url, "a", "--also", stores[1].url)
    assert code == 2 and f"{stores[0].url} and of {stores[1].url}" in said
    hits = p3d.search([store.url for store in stores], "b", level="video").hits
    assert {hit.out for hit in hits if hit.video_id == "a"} == {store.url for store in stores}
    hits = p3d.search([store.url for store in stores], "file:///v/a.mp4", level="video").hits
    assert [hit.out for hit in hits if hit.video_id == "a"] == [stores[1].url]
    code, _, said = in_process("search", stores[0].url, "nothing", "--also", stores[1].url)
    assert code == 2 and stores[0].url in said and stores[1].url in said


def test_the_table_of_a_search_says_which_output(parts: Path) -> None:
    """Of several outputs the table has a column and the JSON a key; of one, both are as before."""
    code, printed, said = in_process("search", str(parts), "a", "--level", "video")
    assert code == 0, said
    head, *rows = printed.splitlines()
    assert head.split() == ["cosine", "output", "path"]
    assert {tuple(row.split()[2:]) for row in rows} == {
        *(("2019", f"{letter}.mp4") for letter in "bd"),
        *(("2020", f"{letter}.mp4") for letter in "efgh"),
    }
    assert "the query itself is left out" in said
    made = json.loads(in_process("search", str(parts), "a", "--json")[1])
    assert made["outs"] == [str(parts / "2019"), str(parts / "2020")] and "out" not in made
    assert {hit["out"] for hit in made["hits"]} == set(made["outs"])
    made = json.loads(in_process("search", str(parts / "2019"), "a", "--json")[1])
    assert made["out"] == str(parts / "2019") and "outs" not in made and "out" not in made["hits"][0]


def test_verify_checks_all_and_names_the_damaged_one(parts: Path) -> None:
    """A damaged output and one that cannot be read do not keep the others from being checked; the worst code counts."""
    third = LocalStore(str(parts / "2021"))
    add_plan(third, videos("xyz"), commit=False)
    code, printed, said = in_process("verify", str(parts))
    assert code == 6 and f"p3d resume {third.url}" in said
    table = [line.split() for line in printed.split("\n\n")[1].splitlines()]
    assert table == [
        ["output", "outcome", "ok", "failed", "pending"],
        ["2019", "clean", "3", "1", "0"],
        ["2020", "clean", "4", "0", "0"],
        ["2021", "not", "finished", "0", "0", "3"],
        ["total", "7", "1", "3"],
    ]
    first = LocalStore(str(parts / "2019"))
    path = first.root / videos_key(load_plans(first)[0].shard_names[0])
    path.write_bytes(path.read_bytes()[:-1] + b"2")
    (parts / "2021" / "job.json").write_text("{")
    code, printed, said = in_process("verify", str(parts / "2021"), str(parts / "2020"), str(first.root))
    lines = [line.split()[:2] for line in printed.split("\n\n")[1].splitlines()]
    assert (code, lines[1:4]) == (7, [["2021", "damaged"], ["2020", "clean"], ["2019", "damaged"]])
    assert f"p3d verify {first.url} --repair" in said and "2021/job.json" in said
    code, printed, _ = in_process("verify", str(parts), "--json")
    made = json.loads(printed)["outputs"]
    assert [(Path(one["out"]).name, one["exit_code"]) for one in made] == [("2019", 7), ("2020", 0), ("2021", 7)]
    assert made[1]["ok"] == 4 and "job.json" in made[2]["error"]


def test_an_output_whose_store_fails_does_not_hide_the_others(parts: Path, tmp_path: Path) -> None:
    """A job.json that is a link is refused, and the other output is shown and checked."""
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "job.json").symlink_to(parts / "2019" / "job.json")
    for verb in ("verify", "status"):
        code, printed, said = in_process(verb, str(odd), str(parts / "2020"))
        assert code == 2 and "odd/job.json is a link" in said
        assert any(line.startswith("2020 ") for line in printed.splitlines())


def test_a_repair_of_several_needs_trust_in_each(parts: Path) -> None:
    """An output that is not trusted is refused, and the others are repaired."""
    second = LocalStore(str(parts / "2020"))
    own(second)
    damaged = []
    for name in ("2019", "2020"):
        store = LocalStore(str(parts / name))
        path = store.root / videos_key(load_plans(store)[0].shard_names[0])
        damaged.append((path, path.read_bytes()))
        path.write_bytes(damaged[-1][1][:-1] + b"2")
    code, printed, said = in_process("verify", str(parts), "--repair")
    assert code == 5 and "2019 is not trusted" in said
    assert [path.read_bytes() == content for path, content in damaged] == [False, True]
    assert ["2019", "error", "-", "-", "-"] in [line.split() for line in printed.splitlines()]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_status_of_several_is_a_table(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """One line for each output and a total, in a folder and below a prefix; what takes one output says so."""
    root = str(tmp_path / "r") if kind == "local" else f"s3://{request.getfixturevalue('bucket')}/results"
    for half, name in enumerate(("2019", "2020")):
        add_half(open_store(f"{root}/{name}"), half)
    add_plan(open_store(f"{root}/2020"), videos("xyz"), seq=2, commit=False)
    code, printed, said = in_process("status", root)
    assert code == 0, said
    table = [line.split() for line in printed.splitlines()]
    assert [(row[0], row[-4]) for row in table] == [
        ("output", "videos"), ("2019", "4/4"), ("2020", "4/7"), ("total", "8/11"),
    ]  # fmt: skip
    assert max(map(len, printed.splitlines())) <= 80
    assert in_process("status", f"{root}/2020", f"{root}/2019", "--exit-code")[0] == 6
    made = json.loads(in_process("status", root, "--json")[1])
    assert [job["videos_all"] for job in made["jobs"]] == [4, 7]
    code, _, said = in_process("status", root, "--wait")
    assert code == 2 and "take one output" in said


def test_the_worst_code_is_damage() -> None:
    """Damage comes before errors, errors before work that is left, and that before success."""
    assert [worst(codes) for codes in ([], [0, 3], [6, 0], [6, 4], [5, 7, 6], [8, 1])] == [0, 3, 6, 4, 7, 1]


def test_one_report_of_several_outputs(parts: Path, whole: LocalStore, tmp_path: Path) -> None:
    """It has the sums, charts and samples of one output with all rows, a line for each output, and no runs."""
    stores = [LocalStore(str(parts / year)) for year in ("2019", "2020")]
    made, one = make_report(stores, DEFAULTS), make_report([whole], DEFAULTS)
    left_out = {"sample", "outputs"}
    assert [getattr(made.facts, name.name) for name in fields(made.facts) if name.name not in left_out] == [
        getattr(one.facts, name.name) for name in fields(one.facts) if name.name not in left_out
    ]
    assert sorted((video.video_id, video.path) for video in made.facts.sample) == sorted(
        (video.video_id, video.path) for video in one.facts.sample
    )
    assert sum(of.n_clips for of in made.facts.outputs) == one.facts.n_clips
    assert (made.neighbours.n_clips, made.neighbours.n_videos) == (one.neighbours.n_clips, one.neighbours.n_videos)
    assert {clip.video.out for query, others in made.neighbours.found for clip in (query, *others)} == {
        store.url for store in stores
    }
    code, _, err = in_process("results", "report", str(parts), "-o", str(tmp_path / "r.html"), "--videos", "0")
    page = harmless((tmp_path / "r.html").read_text())
    assert code == 0 and "7 videos, 1 failed" in err
    assert "2 P3D outputs of one recipe" in page.text and "A report of one output" in page.text
    add_half(LocalStore(str(parts / "2021")), 0, pool="max")
    assert in_process("results", "report", str(parts), "-o", "-")[0] == 5


def test_two_outputs_may_have_the_same_ids(tmp_path: Path) -> None:
    """A video of each output has its own picture and its own row in a report, though their ids are equal."""
    stores = [LocalStore(str(tmp_path / name)) for name in ("a", "b")]
    for store, at in zip(stores, ("v", "w"), strict=True):
        add_half(store, 0, at=at)
    made = make_report(stores, DEFAULTS)
    assert len({video.video_id for video in made.facts.sample}) == 3 and len(made.facts.sample) == 6
    assert {out for (out, _), _ in made.pictures} == {store.url for store in stores}
    assert {video.key for video in made.facts.sample} <= {key for key, _ in made.pictures}


def test_no_verb_imports_pandas(parts: Path) -> None:
    """pyarrow would import it, half a second in which Ctrl-C is lost. Ray Train needs it and gets it."""
    code = "import sys; from p3d.jobs.cli import cli, output; output.run_cli(cli); print('pandas' in sys.modules)"
    code += "; output.need('pandas', 'train'); import ray.train; print('pandas' in sys.modules)"
    words = [sys.executable, "-c", code, "verify", "--deep", str(parts)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "True"], done.stderr
