"""The bench of feeding: one round of the smallest form, over a real Ray with a declared GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO


@pytest.mark.timeout(300)
def test_a_declared_gpu_is_fed_and_shared(tmp_path: Path) -> None:
    """Each stage and both jobs have a rate, one of them with four workers on one GPU. The lowest stage is named."""
    words = "--only ready64 --rounds 1 --videos 128 --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "bench.feeding", *words, tmp_path], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = json.loads((tmp_path / "feeding.json").read_text())["tables"]
    found = {arm: values[0] for arm, values in table["rounds"]["of"].items()}
    assert all(rate > 0 for rate in found.values())
    assert {"messages", "batches", "committing", "fed, 1", "fed, 4"} < found.keys()
    stages = ("messages", "batches", "committing")
    assert table["heading"] == f"ready64: the lowest stage is {min(stages, key=found.__getitem__)}"
