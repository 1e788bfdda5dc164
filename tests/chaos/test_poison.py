"""Two hundred videos, four of them poison: exactly those four fail, each with its reason. `make test` reads the zoo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from p3d.pipeline.errors import Reason
from tests import samples
from tests.conftest import LONG, p3d
from tests.zoo import cases, plants

HANGS = "elst_431_300_onegop.mp4"  # decord hangs on it; routing never selects decord for it, so the test forces it


@pytest.mark.skipif(not LONG, reason="make chaos runs it; make test reads the zoo in one job (tests/jobs/test_zoo.py)")
@pytest.mark.timeout(1800)
@pytest.mark.fault(12, 13, 14)
def test_of_two_hundred_videos_exactly_the_poisonous_four_fail(tmp_path: Path, tiny_weights: Path) -> None:
    """A segfault, a hang, a memory blow-up and a file that hangs decord: 4 of 200 fail, each for its own reason."""
    hangs = samples.need(f"videos/generated/{HANGS}")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    first = cases.good(source / "000.mp4")
    for at in range(1, 196):
        shutil.copy(first, source / f"{at:03d}.mp4")
    for name in ("crash.mp4", "hang.mp4", "memory.mp4"):
        shutil.copy(first, source / name)
    shutil.copy(hangs, source / HANGS)
    words = ("--weights", tiny_weights, "--shard-videos", 50, "--video-timeout", 15, "--max-decode-memory", 400 << 20)
    ran = p3d("launch", source, out, *words, env=plants.environment(tmp_path / "plants"), timeout=1500)
    assert ran.code == 3, ran.err
    failures = {r["path"]: r["reason"] for f in (out / "failures").glob("*") for r in pq.read_table(f).to_pylist()}
    assert failures == {
        "crash.mp4": Reason.DECODER_CRASH,
        "hang.mp4": Reason.DECODE_TIMEOUT,
        "memory.mp4": Reason.DECODE_MEMORY,
        HANGS: Reason.DECODE_TIMEOUT,
    }
    found = p3d("verify", out, "--deep", "--json").json
    assert (found["ok"], found["failed"], found["pending"], found["damaged"]) == (196, 4, 0, False)
