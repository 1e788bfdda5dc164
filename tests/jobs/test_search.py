"""`p3d search` and `p3d.search`: a video finds itself exactly, altered copies find it, mistakes give messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p3d
from p3d.jobs.api.search import _settings_of, encoder_of, find, resolve
from p3d.jobs.cli import output
from p3d.jobs.job import rows_of, weights_key
from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.dataset.snapshot import snapshot
from p3d.pipeline.errors import BadVideo, DamagedJob, InputError
from p3d.pipeline.results.search.options import LEVELS, SearchOptions
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.zoo import make, moving

N_MOVING = 6


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six different videos of one to four clips, and altered copies of the last four, `how`-name."""
    root = tmp_path_factory.mktemp("films")
    (root / "originals").mkdir()
    (root / "copies").mkdir()
    for at in range(N_MOVING):
        path = root / "originals" / f"{at}.mp4"
        moving.video(path, at, (36, 64, 16, 20, 16, 18)[at])
        for how in moving.ALTERATIONS if at >= 2 else ():
            moving.altered(path, root / "copies" / f"{how}-{path.name}", how)
    return root


@pytest.fixture(scope="module")
def out(films: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A dataset of the originals."""
    folder = tmp_path_factory.mktemp("out")
    store = LocalStore(str(folder / "out"))
    embed_all(str(films / "originals"), store, JobSpec(None, str(small_weights)), folder)
    return store


def test_an_archived_file_finds_itself_bit_equal(out: LocalStore, films: Path) -> None:
    """Embedded again with the recipe, batch size and threads of OUT: cosine 1.0 and distance 0.0, at both levels."""
    path = films / "originals" / "1.mp4"
    source = rows_of(out)
    encoder = encoder_of(source)
    assert _settings_of(source, "cpu") == {"batch_size": 3, "threads": 1} and encoder.batch_size == 3
    assert _settings_of(source, "cuda") == {}
    stored = resolve(source, "1.mp4", level="clip")
    fresh = resolve(source, str(path), level="clip", encoder=encoder)
    assert np.array_equal(fresh.features_QD, stored.features_QD) and fresh.seconds == stored.seconds
    assert fresh.video_id == stored.video_id  # the file that this row was made from
    assert stored.features_QD.shape == (4, 512)
    videos = (resolve(source, text, level="video", encoder=encoder).features_QD for text in (str(path), "1.mp4"))
    assert np.array_equal(*videos)
    for metric, score in (("cosine", 1.0), ("l2", 0.0)):
        how: Any = {"metric": metric, "encoder": encoder, "with_self": True}
        found = p3d.search(out.url, path, level="video", top=2, **how)
        assert (found.hits[0].path, found.hits[0].score, found.hits[0].uri) == ("1.mp4", score, path.as_uri())
        assert found.hits[1].score != score
        clip = p3d.search(out.url, f"{path}@1.4s", **how).hits[0]
        assert (clip.path, clip.clip_index, clip.start_s, clip.score) == ("1.mp4", 2, 1.28, score)


def test_rounded_rows_are_found_bit_equal_too(films: Path, small_weights: Path, tmp_path: Path) -> None:
    """With half precision and two poolings, the query is rounded as the rows are, before and after pooling."""
    (tmp_path / "v").mkdir()
    path = Path(shutil.copy(films / "originals" / "3.mp4", tmp_path / "v" / "3.mp4"))
    store = LocalStore(str(tmp_path / "out"))
    spec = JobSpec(None, str(small_weights), pool="mean+max", embedding_dtype="float16")
    embed_all(str(path.parent), store, spec, tmp_path, batch_size=2)
    source = rows_of(store)
    encoder = encoder_of(source)
    for level in LEVELS:
        query = resolve(source, str(path), level=level, encoder=encoder)
        assert np.array_equal(query.features_QD, resolve(source, "3.mp4", level=level).features_QD)


def test_altered_copies_find_their_original(out: LocalStore, films: Path, small_weights: Path, tmp_path: Path) -> None:
    """A short form of bench/search_quality.py with random weights: most copies find their original first."""
    store = LocalStore(str(tmp_path / "out"))
    embed_all(str(films / "copies"), store, JobSpec(None, str(small_weights)), tmp_path, shard_videos=16)
    source, copies, first = rows_of(out), rows_of(store), Counter[str]()
    for name in sorted(path.name for path in (films / "copies").iterdir()):
        how, original = name.rsplit("-", 1)
        first[how] += find(source, resolve(copies, name), SearchOptions()).hits[0].path == original
    print(first)
    assert first["re-encoded"] == first["1.1x faster"] == 4
    assert first["cropped"] >= 2 and first["letterboxed"] >= 2


def test_the_verb_from_a_shell(out: LocalStore, films: Path) -> None:
    """Data goes to stdout, the rate to stderr; a query by name loads neither torch nor Ray."""
    code_, printed, said = in_process(
        "search", out.url, str(films / "copies" / "re-encoded-2.mp4"), "--top", "2", "--json"
    )
    assert code_ == 0, said
    found = json.loads(printed)
    hits = found["hits"]
    assert (hits[0]["rank"], hits[0]["path"]) == (1, "2.mp4") and 0.9 < hits[0]["cosine"] < 1
    assert len(hits) == 2 and (found["level"], found["rows"]) == ("clip", 13)
    code = (
        "import sys; from p3d.jobs.cli import cli\n"
        f"sys.argv = ['p3d', 'search', {out.url!r}, '1.mp4', '--top', '1', '--with-self']\ncli(standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'ray', 'faiss', 'av'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1  1\.0000  1\.mp4  0\.00-0\.64  0\.00-0\.64", done.stdout, re.M)
    assert re.search(r"13 clips compared in .* rows/s", done.stderr)


def test_clips_of_a_second_with_conditions_and_an_index(out: LocalStore, tmp_path: Path) -> None:
    """VIDEO@TIME, --level, --where, --distinct and --index work for a job and for its snapshot."""
    dest = LocalStore(str(tmp_path / "dest"))
    snapshot(rows_of(out), dest)
    for place in (out.url, dest.url):
        code, printed, said = in_process("search", place, "1.mp4@0.1", "--top", "3", "--with-self")
        assert code == 0, said
        assert printed.splitlines()[1].split()[:4] == ["1", "1.0000", "1.mp4", "0.00-0.64"]
        args = (
            "search",
            place,
            "1.mp4",
            "--level",
            "clip",
            "--where",
            "duration_s<1.6",
            "--where",
            "start_s>0.5",
            "--json",
        )
        hits = json.loads(in_process(*args)[1])["hits"]
        assert {hit["path"] for hit in hits} == {"0.mp4"}
        assert all(hit["start_s"] > 0.5 and hit["query_start_s"] in (0.0, 0.64, 1.28, 1.92) for hit in hits)
        assert "query seconds" in in_process(*args[:-1])[1]
        every = ("--every-clip", "--with-self")
        code, printed, said = in_process("search", place, "1.mp4@0:00.1", "--distinct", "0.999999", *every)
        assert "0.00-0.64" not in [line.split()[3] for line in printed.splitlines() if " 1.mp4 " in line]
        code, printed, said = in_process("results", "index", place, "--threads", "1")
        assert code == 0, said
        assert re.search(r"recall@10 +1\.000 on 13 rows", printed)
        for more in ((), every):
            exact = json.loads(in_process("search", place, "1.mp4@1.9s", "--json", *more)[1])
            found = json.loads(in_process("search", place, "1.mp4@1.9s", "--json", "--index", *more)[1])
            assert found["hits"] == exact["hits"]
        assert (found["indexed_rows"], found["new_videos"]) == (13, 0)
    assert json.loads(in_process("results", "index", out.url, "--json")[1])["kind"] == "flat"
    assert in_process("verify", out.url, "--deep")[0] == 0  # an index is not an unexpected file


def test_the_page_runs(out: LocalStore, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of docs/how-to/search.md that uses `p3d.search` works."""
    page = (REPO / "docs" / "how-to" / "search.md").read_text()
    (code,) = re.findall(r"^```python\n(import p3d\n.*?)^```$", page, re.M | re.S)
    exec(code.replace("OUT", out.url).replace("VIDEO.mp4", str(films / "originals" / "1.mp4")), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines] == [["0.mp4", "0.64", "1.28"]]  # the other one of a second or more


def test_answers_have_each_video_once_and_not_the_query(out: LocalStore, films: Path, tmp_path: Path) -> None:
    """By default one hit per video; the query's own video is left out by any of its names and as its file, with a word
    about it, but not a copy elsewhere. Each option brings back what it names."""
    copy = Path(shutil.copy(films / "originals" / "1.mp4", tmp_path / "1.mp4"))
    original, source = str(films / "originals" / "1.mp4"), rows_of(out)
    (video_id,) = source.find("1.mp4")
    for query in ("1.mp4", video_id, Path(original).as_uri(), "1.mp4@0:01.4", original, f"{original}@1.4"):
        code, printed, _ = in_process("search", out.url, query, "--json")
        paths = [hit["path"] for hit in json.loads(printed)["hits"]]
        assert code == 0 and sorted(paths) == [f"{at}.mp4" for at in range(N_MOVING) if at != 1], (query, paths)
        assert (
            "the query itself is left out; --with-self" in in_process("search", out.url, query, "--level", "video")[2]
        )
    found = p3d.search(out.url, "1.mp4", with_self=True)
    assert found.hits[0].path == "1.mp4" and len(found.hits) == N_MOVING
    every = p3d.search(out.url, "1.mp4", per_video=False, top=50).hits
    assert len(every) == 9 and {hit.path for hit in every} == {f"{at}.mp4" for at in range(N_MOVING) if at != 1}
    assert p3d.search(out.url, copy).hits[0].score == 1.0
    assert "left out" not in in_process("search", out.url, str(copy))[2]


@pytest.mark.parametrize(
    ("query", "options", "says"),
    [
        ("nothing.mp4", [], "'nothing.mp4' is neither a file nor a video of"),
        ("1.mp4@9.5s", [], "no clip of '1.mp4' shows second 9.5: the nearest one is from "),
        ("1.mp4@1.2.3s", [], "'1.2.3s' is not a position"),
        ("1.mp4", ["--where", "x=1"], "no column 'x'"),
        ("1.mp4", ["--index", "--metric", "l2"], "no index of the clips of "),
        ("s3://bucket/a.mp4", [], "is neither a file nor a video"),
    ],
)
def test_mistakes_give_one_message(out: LocalStore, query: str, options: list[str], says: str) -> None:
    """Exit code 2, the cause on stderr, and nothing on stdout."""
    code, printed, said = in_process("search", out.url, query, *options)
    assert (code, printed) == (2, "")
    assert says in said and "Traceback" not in said


def test_what_a_dataset_lacks_is_reported(out: LocalStore, films: Path, tmp_path: Path) -> None:
    """A missing job exits 4; missing or damaged weights and a failed video give errors with a remedy."""
    assert in_process("search", str(tmp_path / "nowhere"), "1.mp4")[0] == 4
    copy = LocalStore(str(tmp_path / "copy"))
    shutil.copytree(out.root, copy.root, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = copy.root / weights_key(rows_of(out).job.recipe)
    weights.write_bytes(b"x")
    path = films / "originals" / "0.mp4"
    with pytest.raises(DamagedJob, match="is damaged"):
        p3d.search(copy.url, path)
    weights.unlink()
    with pytest.raises(InputError, match="has no weights to embed a file with"):
        p3d.search(copy.url, path)
    assert p3d.search(copy.url, "0.mp4", with_self=True).hits[0].score == 1.0
    broken = make.damaged(path, tmp_path / "broken.mp4", 0.0, 64)
    encoder = encoder_of(rows_of(out))
    with pytest.raises(BadVideo, match="not_a_video"):
        p3d.search(out.url, broken, encoder=encoder)


def test_videos_without_rows_cannot_be_searched_by(tmp_path: Path) -> None:
    """A failed video, a pending one, and a path of two videos each have their own message."""
    import pyarrow as pa

    from tests.pipeline.rows import videos
    from tests.pipeline.test_snapshot import add_plan

    store = LocalStore(str(tmp_path / "out"))
    table = videos("abcd")
    table = table.set_column(1, table.schema.field("path"), pa.array(["a.mp4", "b.mp4", "same.mp4", "same.mp4"]))
    add_plan(store, table)
    add_plan(store, videos("a"), seq=2, commit=False)
    for query, says in (
        ("b.mp4", "failed, see"),
        ("a", "still to be done"),
        ("same.mp4", "2 videos of .* have the path"),
    ):
        with pytest.raises(InputError, match=says):
            p3d.search(store.url, query)
    assert "1 video pending and not searched" in in_process("search", store.url, "c")[2]


def test_a_missing_extra_is_named() -> None:
    """The error names the optional package and how to install it, instead of an ImportError."""
    output.need("json", "search")
    with pytest.raises(InputError, match=r"needs no_such_package.*pip install 'p3d-embeddings\[search\]'"):
        output.need("no_such_package", "search")
