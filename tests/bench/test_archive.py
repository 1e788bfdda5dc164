"""A job over many made videos: plan, second plan, kill, resume and status, by the bench itself with few of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc

from bench.archive import MadeVideos
from tests.conftest import REPO

# P3D_ARCHIVE=1e7 is the long form, and takes about ten minutes
VIDEOS = os.environ.get("P3D_ARCHIVE", "1e5")
MOST_MB = 2000


def test_made_videos_differ_and_are_the_same_again() -> None:
    """Rows are a function of their number, however they are read."""
    (whole,) = MadeVideos(1000).to_batches()
    parts = list(MadeVideos(1000).to_batches(max_chunksize=300))
    assert [len(part) for part in parts] == [300, 300, 300, 100] and whole.slice(300, 300).equals(parts[1])
    for name, digits in (("video_id", 32), ("version", 16), ("path", None), ("uri", None)):
        assert pc.count_distinct(whole[name]).as_py() == 1000
        assert digits is None or pc.unique(pc.utf8_length(whole[name])).to_pylist() == [digits]


def test_a_driver_plans_resumes_and_counts_in_bounded_memory(tmp_path: Path) -> None:
    """Each step ends as it should, within 2 GB, and the counts after a kill and a resume are those of what was done."""
    words = ("--videos", VIDEOS, "--block", "64", "--out", str(tmp_path), "--keep")
    done = subprocess.run([sys.executable, "-m", "bench.archive", *words], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n = int(float(VIDEOS))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / f"archive-{n}").glob("*.json")}
    assert set(found) == {"plan", "again", "launch", "resume", "status"}
    assert (found["plan"]["videos"], found["again"]["videos"]) == (n, n // 100)
    assert max(one["MB"] for one in found.values()) < MOST_MB, found
    assert found["status"]["videos"] == n + n // 100
    done_shards = found["launch"]["shards done"] + found["resume"]["shards done"]
    assert 0 <= found["status"]["videos done"] - 64 * done_shards < 64 * 64, found
