"""Tests of the reader itself: it detects violations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.pipeline.dataset import schema
from tests.chaos.reader import reading


def wrong_count(path: Path) -> None:
    schema.write_parquet(path, pa.table({"x": [1]}), {schema.OUTCOMES_KEY: json.dumps([{"n_clips": 2}])})


DEEDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "withdrawn": (lambda path: path.unlink(), "was withdrawn"),
    "changed": (lambda path: pq.write_table(pa.table({"x": [2]}), path), "changed"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "ArrowInvalid"),
    "other rows than its footer says": (wrong_count, "its footer says 2"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_reader_reports_what_breaks_the_promise(deed: str, tmp_path: Path) -> None:
    """The reader reports a file that disappears, changes, is cut or disagrees with its footer, but no good file."""
    (tmp_path / "clips").mkdir()
    path, report = tmp_path / "clips" / "a.parquet", tmp_path / "seen.json"
    pq.write_table(pa.table({"x": [1]}), path)
    with reading(tmp_path, report) as seen:
        pass
    assert (seen.errors, seen.files) == ([], 1)
    act, said = DEEDS[deed]
    with reading(tmp_path, report) as seen:
        while not report.with_suffix(".began").exists():
            time.sleep(0.01)
        act(path)
    assert said in " ".join(seen.errors)
