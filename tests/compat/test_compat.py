"""The rules of docs/compatibility.md: outputs of version 1 in this version, and in a version 2 that exists for this."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.recipe import JobRecord, digest
from p3d.pipeline.types.versions import SCHEMA_VERSION
from tests.compat.build import SMALL, SOURCE, fixture, put, s3, unpack
from tests.compat.version2 import COLUMN, SETTING, write_version2
from tests.conftest import REPO

OUTPUTS = {"complete": 0, "killed": 6, "retried": 0, "scores": 0, "snapshot": 0}  # and what `verify` says of each
DRIVER = """
import contextlib, io, json, sys
from p3d.jobs.cli import cli, output

results = []
for words in json.loads(sys.argv[1]):
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["p3d", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = output.run_cli(cli)
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The code of version 1, which is this one, and of version 2."""
    return {1: REPO, 2: write_version2(tmp_path_factory.mktemp("version2"))}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of version 1."""
    return unpack(tmp_path_factory.mktemp("version1"), 1)


@pytest.fixture(scope="module")
def reach(unpacked: Path) -> Iterator[dict[str, str]]:
    """The environment that reaches the videos of the outputs' plans."""
    with s3() as (client, env):
        put(client, unpacked / "videos")
        yield env


@pytest.fixture
def outputs(unpacked: Path, tmp_path: Path) -> Path:
    """A copy of the outputs."""
    return shutil.copytree(unpacked, tmp_path / "outputs")


def python(tree: Path, code: str, *words: object, env: dict[str, str] | None = None) -> str:
    """What code prints in a version of the code."""
    command = [sys.executable, "-P", "-c", code, *map(str, words)]
    around = {**os.environ, **(env or {}), "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(tree: Path, env: dict[str, str], *commands: list[Any]) -> list[tuple[int, str, str]]:
    """(code, stdout, stderr) of each command line, all in one process of a version of the code."""
    printed = python(tree, DRIVER, json.dumps([[*map(str, words)] for words in commands]), env=env)
    found: list[tuple[int, str, str]] = json.loads(printed.splitlines()[-1])
    return found


def content(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_fixture_is_of_this_version_and_small() -> None:
    """The outputs of the present version are there, and at most 300 kB."""
    assert fixture(SCHEMA_VERSION).stat().st_size <= 300_000


def test_a_setting_and_a_column_touch_few_files() -> None:
    """A setting is declared in one file and used in another; a column is in at most three."""
    assert len(SETTING) <= 2 and len(COLUMN) <= 3


def test_every_verb_works_on_an_older_output(trees: dict[int, Path], outputs: Path) -> None:
    """Outputs of version 1 are verified, shown, searched, indexed, reported and copied, and nothing in them changes."""
    before = {name: content(outputs / name) for name in OUTPUTS}
    query = "s3://archive/videos/video1.mp4"
    reading: list[tuple[int, list[Any]]] = []
    for name, code in OUTPUTS.items():
        out = outputs / name
        reading += [(code, ["verify", out]), (code, ["verify", out, "--deep"])]
        if name != "snapshot":
            reading += [(0, ["status", out]), (0, ["failures", out])]
        if name not in ("killed", "retried"):
            reading += [(0, ["search", out, query]), (0, ["search", out, query, "--level", "clip", "--json"])]
            report = ["results", "report", out, "-o", outputs / f"{name}.html", "--videos", 0, "--queries", 0]
            reading += [(0, report), (0, ["results", "dedup", out])]
            reading += [(0, ["results", "index", out]), (0, ["search", out, query, "--index"])]
            reading += [(0, ["results", "snapshot", out, outputs / f"{name}-copy"])]
    found = run(trees[2], {}, *(words for _, words in reading))
    for (code, words), (got, _, err) in zip(reading, found, strict=True):
        assert got == code, (words, err)
    assert {name: content(outputs / name) for name in OUTPUTS} == before
    copies = [["verify", outputs / f"{name}-copy"] for name in OUTPUTS if (outputs / f"{name}-copy").exists()]
    assert len(copies) == 3
    assert [code for code, _, _ in run(trees[1], {}, *copies)] == [0, 0, 0], "a snapshot is of its source's version"


def test_a_later_column_has_the_value_of_what_the_older_version_did(trees: dict[int, Path], unpacked: Path) -> None:
    """`--where`, `open_dataset` and the page see the column in rows of an older output, with that value."""
    out, copy = unpacked / "complete", unpacked / "snapshot"
    query = "s3://archive/videos/video1.mp4"
    with_it, without = run(
        trees[2],
        {},
        ["search", out, query, "--where", "bit_depth=8", "--with-self", "--json"],
        ["search", copy, query, "--where", "bit_depth=10", "--json"],
    )
    assert len(json.loads(with_it[1])["hits"]) == 5 and not json.loads(without[1])["hits"]
    code = (
        "import json, sys, p3d; from p3d.pipeline.results.page.archive import read_archive;"
        "rows = [b for out in sys.argv[1:] for b in p3d.open_dataset(out).videos()];"
        "print(json.dumps([v for b in rows for v in b['bit_depth'].to_pylist()]))"
    )
    words = [sys.executable, "-P", "-c", code, str(out), str(copy)]
    ran = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(trees[2])}, capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [8] * 10


def test_an_older_output_goes_on_in_its_own_version(
    trees: dict[int, Path], outputs: Path, reach: dict[str, str]
) -> None:
    """A resume, a repair and a launch in a later version write what version 1 verifies to the last bit."""
    weights = next((outputs / "complete" / "weights").glob("*.safetensors"))
    lost = next((outputs / "retried" / "videos").glob("*.parquet"))
    held = lost.read_bytes()
    lost.unlink()
    records = [(outputs / name / "job.json").read_bytes() for name in ("killed", "complete", "retried")]
    repaired, resumed, launched = run(
        trees[2],
        reach,
        ["verify", outputs / "retried", "--repair", "--trust"],
        ["resume", outputs / "killed", "--trust"],
        ["launch", SOURCE, outputs / "complete", "--weights", weights, "--shard-videos", 3, *SMALL, "--trust"],
    )
    assert (repaired[0], resumed[0], launched[0]) == (0, 3, 3), (repaired, resumed, launched)
    assert "nothing in SRC is new" in launched[2] or "videos in" in launched[2]
    assert lost.read_bytes() == held
    assert [(outputs / name / "job.json").read_bytes() for name in ("killed", "complete", "retried")] == records
    names = ("killed", "complete", "retried")
    found = run(trees[1], {}, *(["verify", outputs / name, "--deep"] for name in names))
    assert [code for code, _, _ in found] == [0, 0, 0], found


def test_a_newer_output_is_refused(trees: dict[int, Path], outputs: Path, reach: dict[str, str]) -> None:
    """Version 2 makes an output with its setting and column; every verb of version 1 refuses it, and writes nothing.

    A later setting is refused in an older output, and the default of it is not.
    """
    weights, new = next((outputs / "complete" / "weights").glob("*.safetensors")), outputs / "new"
    job = ["--weights", weights, "--shard-videos", 3, *SMALL]
    made, verified, refused, searched = run(
        trees[2],
        reach,
        ["launch", f"{SOURCE}/video2.mp4", new, *job, "--mirror"],
        ["verify", new, "--deep"],
        ["launch", SOURCE, outputs / "complete", *job, "--mirror"],
        ["search", new, "video2.mp4", "--where", "bit_depth=10", "--with-self", "--json"],
    )
    assert (made[0], verified[0], len(json.loads(searched[1])["hits"])) == (0, 0, 1), (made, verified)
    assert refused[0] == 5 and "mirror" in refused[2] and "schema version 2" in refused[2], refused
    before = content(new)
    commands: list[list[Any]] = [["verify", new], ["status", new], ["search", new, "video2.mp4"], ["failures", new]]
    commands += [["resume", new], ["retry", new], ["cancel", new], ["verify", new, "--repair", "--trust"]]
    commands += [["launch", SOURCE, new, *job], ["results", "snapshot", new, outputs / "copy"]]
    for words, (code, out, err) in zip(commands, run(trees[1], reach, *commands), strict=True):
        assert (code, out) == (5, ""), (words, err)
        assert "schema version 2" in err and "versions up to 1" in err and "use a newer p3d" in err, err
    assert content(new) == before and not (outputs / "copy").exists()


def test_a_digest_is_of_the_form_that_was_written(trees: dict[int, Path], unpacked: Path) -> None:
    """Version 2 computes the digest that version 1 wrote, of the recipe and of the plan."""
    code = (
        "import sys; from p3d.jobs.job import read_job; from p3d.pipeline.dataset.plans import load_plans;"
        "from p3d.pipeline.storage.local import LocalStore; store = LocalStore(sys.argv[1]);"
        "print(read_job(store).recipe.digest, *(plan.recipe_digest for plan in load_plans(store)))"
    )
    stated = json.loads((unpacked / "retried" / "job.json").read_text())
    assert python(trees[2], code, unpacked / "retried").split() == [stated["recipe_digest"]] * 3
    assert digest(stated["recipe"]) == stated["recipe_digest"]


def _edited(unpacked: Path, change: dict[str, Any], recipe: dict[str, Any], gone: str = "") -> bytes:
    """A job.json with other fields and a digest that fits."""
    given = json.loads((unpacked / "complete" / "job.json").read_text())
    given["recipe"] = {name: value for name, value in {**given["recipe"], **recipe}.items() if name != gone}
    return json.dumps(given | {"recipe_digest": digest(given["recipe"])} | change).encode()


@pytest.mark.parametrize(
    ("change", "recipe", "gone"),
    [
        ({}, {"mirror": False}, ""),
        ({}, {}, "fps"),
        ({"note": "mine"}, {}, ""),
        ({"schema_version": 2}, {}, ""),
        ({}, {"schema_version": 0}, ""),
        ({}, {"schema_version": "1"}, ""),
        ({}, {"schema_version": 1.5}, ""),
        ({}, {"schema_version": None}, ""),
        ({"recipe_digest": "0" * 64}, {}, ""),
        ({"recipe_digest": "0" * 64}, {"schema_version": 9}, ""),
    ],
)
def test_a_record_of_no_version_is_damage(
    unpacked: Path, change: dict[str, Any], recipe: dict[str, Any], gone: str
) -> None:
    """A field too many or too few, versions that differ, and an edit by hand are damage, with a remedy."""
    with pytest.raises(DamagedJob, match=r"(?i)OUT/job\.json .*restore it"):
        JobRecord.from_json(_edited(unpacked, change, recipe, gone), "OUT")


def test_every_rule_has_its_test() -> None:
    """The page names tests of this file, and those exist."""
    named = re.findall(r"`(test_\w+)`", (REPO / "docs" / "compatibility.md").read_text())
    assert len(named) == 7 and set(named) <= set(globals())
