"""Thousands of broken files: each ends in rows or a reason, and none affects or reads another file.

P3D_FUZZ sets the number of files (`make fuzz-videos` uses 2000, the suite a few), P3D_SEED the seed.
`python -m tests.fuzz.one 3 17 FILE` writes file 17 of seed 3 to FILE.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p3d.pipeline.errors import Reason
from tests.conftest import p3d
from tests.fuzz.drive import GRACE_S, campaign
from tests.fuzz.mutate import fuzzed
from tests.zoo import cases

FILES = int(os.environ.get("P3D_FUZZ", "60"))
LONG = FILES >= 1000
SEED = int(os.environ.get("P3D_SEED", "1"))
JOB_FILES = 100


@pytest.mark.timeout(7200)
@pytest.mark.fault(13, 14, 16, 18, 20, 21)
def test_every_broken_file_ends_and_affects_no_other(tmp_path: Path) -> None:
    """Truncated, flipped, overwritten and spliced files, or files with wrong sizes: each ends once, without a defect or
    a hang past its deadline. No other file is read, good files in between keep all frames, and a repeat is equal."""
    tally = campaign(SEED, FILES, tmp_path / "fuzz", trace=LONG)
    print("\n" + json.dumps(tally.record(), indent=1))
    assert tally.files == FILES == sum(tally.reasons.values())
    assert set(tally.reasons) <= {*Reason, ""} - {reason for reason in Reason if reason.startswith("source_")}
    assert tally.internal == [] and tally.good_lost == [] and tally.others_read == []
    assert tally.cut_unmarked == [], "a cut file was taken for a whole one"
    assert tally.longest_over_s <= GRACE_S
    if LONG:  # the same pixels or the same reason, whatever the timing of threads and other processes
        again = campaign(SEED, FILES, tmp_path / "again")
        assert {at: (end, again.ends[at]) for at, end in tally.ends.items() if end != again.ends[at]} == {}
    assert tally.reasons[""] and tally.reasons["truncated"] and len(tally.reasons) >= 5, "the damage does too little"


@pytest.mark.skipif(not LONG, reason="make fuzz-videos runs it; make test runs a real job over tests/zoo")
@pytest.mark.timeout(3600)
@pytest.mark.fault(16)
def test_a_real_job_over_broken_files_loses_no_good_one(tmp_path: Path, small_weights: Path) -> None:
    """In a job over broken and good files, every good one is embedded."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index in range(JOB_FILES):
        (source / f"{index:04d}.mp4").write_bytes(fuzzed(SEED + 1000, index)[1])
    for at in range(20):
        cases.good(source / f"good{at:02d}.mp4")
    words = ("--weights", small_weights, "--shard-videos", 30, "--video-timeout", 30, "--max-failures", "100%")
    ran = p3d("launch", source, out, *words, timeout=3000)
    assert ran.code == 3, ran.err
    failures = [r for f in (out / "failures").glob("*") for r in pq.read_table(f).to_pylist()]
    print("\n", Counter(row["reason"] for row in failures))
    assert not any(row["path"].startswith("good") or row["reason"] == "internal" for row in failures)
    found = p3d("verify", out, "--deep", "--json").json
    assert found["ok"] + found["failed"] == JOB_FILES + 20 and found["pending"] == 0 and not found["damaged"]


def test_files_are_reproducible() -> None:
    """A seed and a number give the same bytes, so that findings can be reproduced."""
    assert fuzzed(3, 17) == fuzzed(3, 17)
    assert fuzzed(3, 17)[1] != fuzzed(3, 18)[1]
