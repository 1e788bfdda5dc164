"""The GPU benchmark: its roofline arithmetic, and a run of its arms on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import Conv, convs_of, roofline_s
from tests.conftest import REPO


def test_the_roofline_of_a_clip() -> None:
    """Each convolution takes the longer of its compute and memory time; a batch reads the weights once."""
    convs = [Conv(macs=1000, numbers=10, weights=40), Conv(macs=10, numbers=100, weights=0)]
    assert roofline_s(convs, 2, 1, macs_per_s=1000, bytes_per_s=1000) == pytest.approx(1 + 0.2)
    assert roofline_s(convs, 4, 2, macs_per_s=1e9, bytes_per_s=100) == pytest.approx((10 + 20) * 0.04 + 4)


def test_every_convolution_counts() -> None:
    """P3D-199 has 18.40e9 multiply-adds per clip and 66.5 million weights, a million of them in the classifier."""
    convs = convs_of("p3d199", (160, 160))
    assert sum(one.macs for one in convs) == pytest.approx(18.403e9, rel=1e-4)
    assert 64e6 < sum(one.weights for one in convs) < 66e6


def test_the_bench_runs_on_a_cpu_too(tmp_path: Path) -> None:
    """One round of the smallest network: the report has a row for every arm."""
    words = "--device cpu --networks p3d63 --precisions fp32 --batches 1 --rounds 1 --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words, tmp_path], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(" |")[0] for line in done.stdout.splitlines() if line.startswith("| ")][2:] == [
        "| matrix product, GMAC/s",
        "| copy, GB/s",
        "| network, 1",
        "| Encoder, 1",
    ]
    assert (tmp_path / "gpu.json").exists()
