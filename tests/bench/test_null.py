"""The benchmarks' null network: a real launch without the computation of features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench.rounds import REPO
from tests.zoo import corpus


def test_a_job_with_the_null_network_has_all_its_rows(tmp_path: Path, small_weights: Path) -> None:
    """Every clip of every video has a row, and all its features are one."""
    source, out = corpus.make(tmp_path / "videos", 3, (96, 128), 40, 12), tmp_path / "out"
    words = [sys.executable, "-m", "bench.null", "launch", source, out, "--weights", small_weights]
    done = subprocess.run(list(map(str, words)), cwd=REPO, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for path in (out / "clips").glob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()]
    assert len({(row["video_id"], row["clip_index"]) for row in rows}) == len(rows) == 3 * 3
    assert all(np.array_equal(row["embedding"], np.ones(512)) for row in rows)
