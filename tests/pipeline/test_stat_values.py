"""Whatever a file system or a store says about a file is data: it plans, and the file is recognised again."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p3d.pipeline.dataset.plans import Manifest, load_plans, total_bytes, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.recipe import ShardSizing
from p3d.pipeline.sources import identity
from p3d.pipeline.sources.identity import content_version, s3_row
from p3d.pipeline.sources.listing import find, look_again
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import ObjectInfo, StoreOptions
from p3d.pipeline.types import VideoRef
from tests.pipeline.rows import recipe

HERE = StoreOptions()
SIZES = st.integers(-(2**63), 2**63 - 1) | st.sampled_from((0, 2**63 - 1, -1))
TIMES = st.integers(-(10**30), 10**30) | st.sampled_from((0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1))
YEAR_2400_S = 13_569_465_600


@settings(max_examples=40)
@given(st.lists(st.tuples(SIZES, TIMES), min_size=1, max_size=5), st.booleans())
@example([(2**63 - 1, 10**9 * YEAR_2400_S), (2**63 - 1, -(10**30))], False)
def test_any_stat_value_is_planned(values: list[tuple[int, int]], listed: bool) -> None:
    """Files of any size and time are rows of a plan, their version says so, and looking again finds no difference."""

    class Os:
        """The module `os`, with the sizes and times of a strange file system."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def lstat(self, path: bytes) -> Any:
            size, time_ns = values[int(Path(os.fsdecode(path)).stem)]
            return SimpleNamespace(st_mode=os.lstat(path).st_mode, st_size=size, st_mtime_ns=time_ns)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(identity, "os", Os()):
        source = Path(folder, "v")
        source.mkdir()
        names = [f"{number}.mp4" for number in range(len(values))]
        for name in names:
            (source / name).touch()
        (source / "list.txt").write_text("\n".join(names))
        found = find(str(source / "list.txt" if listed else source), HERE)
        rows = found.videos.to_pylist()
        assert [row["size_bytes"] for row in rows] == [size for size, _ in values]
        assert [row["version"] for row in rows] == [content_version(*value) for value in values]
        assert [row["mtime_ns"] for row in rows] == [at if -(2**63) <= at < 2**63 else None for _, at in values]
        assert look_again(found.videos, HERE).equals(found.videos)
        for name in names:
            (source / name).unlink()
        assert look_again(found.videos, HERE, keep_missing=True).equals(found.videos)  # also while the files are away
        store = LocalStore(f"{folder}/out")
        plan = write_plan(store, 1, recipe(), with_shards(found.videos, ShardSizing(2)), 0, ShardSizing())
        assert load_plans(store) == [plan] and Manifest(store, plan).videos.num_rows == len(values)
        assert plan.size_bytes == sum(max(size, 0) for size, _ in values)


@given(st.lists(SIZES))
def test_a_total_of_sizes_is_exact(sizes: list[int]) -> None:
    """Sums beyond 64 bits neither wrap nor fail, and missing files count as empty."""
    assert total_bytes(np.array(sizes, np.int64)) == sum(max(size, 0) for size in sizes)


@pytest.mark.parametrize("at_s", [YEAR_2400_S, 2**34, -(2**31), -1, 0, 2**32])
def test_a_file_of_another_century_is_the_file_that_was_planned(tmp_path: Path, at_s: int) -> None:
    """A real file with such a time is planned, and opened as long as it is unchanged."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"content")
    os.utime(path, (at_s, at_s))
    (row,) = find(str(tmp_path), HERE).videos.to_pylist()
    assert row["version"] == content_version(7, path.stat().st_mtime_ns)
    with local_file(VideoRef(**row), HERE, tmp_path) as local:
        assert Path(local).read_bytes() == b"content"


@pytest.mark.parametrize("year", [1, 1677, 2263, 9999])
def test_an_object_of_another_century_is_a_row(year: int) -> None:
    """A server may say anything about the time of an object; its version is of size and ETag alone."""
    at = (datetime(year, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
    row = s3_row("b", "k.mp4", "k.mp4", ObjectInfo("k.mp4", 7, at, '"e"'))
    assert (row.mtime_ns, row.version) == (None, content_version(7, '"e"'))
