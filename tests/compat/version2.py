"""A version 2 of the code that exists for tests alone: version 1 with one more setting and one more column."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import REPO

# file -> (text, what replaces it): what a developer would write
VERSION = {"pipeline/types/versions.py": [("SCHEMA_VERSION = 1 ", "SCHEMA_VERSION = 2 ")]}
SETTING = {
    "pipeline/recipe.py": [
        (
            '    pool: str = option("mean",',
            '    mirror: bool = option(False, "Mirror the frames.", since=2)\n    pool: str = option("mean",',
        ),
        ("    fps: float | None\n    pool: str\n", "    fps: float | None\n    mirror: bool\n    pool: str\n"),
    ]
}
COLUMN = {
    "pipeline/dataset/columns.py": [
        (
            '    Column("stream_why",',
            '    Column("bit_depth", pa.int32(), "bits of a sample", since=2, before=8),\n    Column("stream_why",',
        )
    ],
    "pipeline/types/__init__.py": [
        (
            "    stream_why: str | None = None\n",
            "    stream_why: str | None = None\n    bit_depth: int = added(2, 8)\n",
        ),
        (
            "from p3d.pipeline.errors import Reason\n",
            "from p3d.pipeline.errors import Reason\nfrom p3d.pipeline.types.versions import added\n",
        ),
    ],
    "pipeline/decode/frames.py": [
        (
            "        stream_why=found.stream_why or None,\n",
            "        stream_why=found.stream_why or None,\n        bit_depth=10,\n",
        )
    ],
}


def write_version2(folder: Path) -> Path:
    """Copy the code into `folder` and make it version 2."""
    for name in ("p3d", "pipeline", "jobs"):
        shutil.copytree(REPO / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for edits in (VERSION, SETTING, COLUMN):
        for name, changes in edits.items():
            text = (folder / name).read_text()
            for before, after in changes:
                assert text.count(before) == 1, f"{name} no longer holds {before!r} once"
                text = text.replace(before, after)
            (folder / name).write_text(text)
    return folder
