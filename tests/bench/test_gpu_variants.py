"""The forms of the network that wait for a GPU: what a CPU can run gives the CPU's features, and the rest is listed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import Device
from bench.gpu_variants import ARMS, Arm, PoolWithoutIndices, arm_of, distance, one_kernel, profiled
from p3d.encoder import golden_clip, golden_features, normalise
from p3d.networks.network import Network
from p3d.prepared import prepared
from p3d.weights import random_weights
from tests.conftest import REPO


def test_the_bench_runs_on_a_cpu_and_lists_what_needs_cuda(tmp_path: Path) -> None:
    """No arm begins after the time is over, and each has its row; arms that a CPU runs are in the test below."""
    words = "--device cpu --networks p3d63 --precisions fp32 --batch 1 --rounds 1 --minutes 0.1 --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_variants", *words, tmp_path],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line and line[0] != "|")
    assert list(rows) == list(ARMS)
    assert float(rows["2-D"].split(" | ")[0]) < 1e-10  # the first arm always runs
    needing = {label for label, row in rows.items() if "needs CUDA" in row}
    assert needing == {label for label, arm in ARMS.items() if arm.needs_cuda}
    assert (tmp_path / "gpu_variants.json").exists()


@pytest.mark.parametrize("arm", [Arm("plain", contiguous=True), Arm(one_kernel=True, no_indices=True)])
@torch.inference_mode()
def test_an_arm_gives_the_golden_features(arm: Arm) -> None:
    """Equality comes before speed."""
    weights, device = random_weights("p3d63", 0), torch.device("cpu")
    clips_BTHWC = torch.from_numpy(golden_clip(weights.recipe)[0])[None]
    run = arm_of(arm, weights, "fp32", device, clips_BTHWC)
    assert distance(run(clips_BTHWC), golden_features(weights)) < 1e-10


def test_a_profile_lists_the_longest_operations() -> None:
    """Convolutions take most of the time, and are named."""
    weights, device = random_weights("p3d63", 0), Device("cpu")
    clips_BTHWC = torch.from_numpy(golden_clip(weights.recipe)[0])[None]
    table = profiled(arm_of(Arm(), weights, "fp32", device.device, clips_BTHWC), clips_BTHWC, device, "profile")
    assert any("convolution" in name for name, _, _ in table.rows[:3])
    times = [float(ms) for _, _, ms in table.rows]
    assert times == sorted(times, reverse=True) and times[0] > 0


@pytest.mark.parametrize("graph", ["caffe", "port"])
def test_pooling_without_indices_is_the_pooling(graph: str) -> None:
    """Of even and odd sizes, in the rounding of both graphs."""
    network: Network = prepared(random_weights("p3d63", 0, graph=graph))[0]
    for height, width in ((80, 80), (36, 34)):
        x = torch.randn(2, 4, 8, height, width)
        assert torch.equal(PoolWithoutIndices(network.pool1)(x), network.pool1(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_normalises_as_the_encoder_does(dtype: torch.dtype) -> None:
    """Within the rounding of one operation."""
    recipe = random_weights("p3d63", 0, graph="port").recipe
    clips_BTHWC = torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8)
    found = one_kernel(recipe, dtype, torch.device("cpu"))(clips_BTHWC)
    torch.testing.assert_close(
        found, normalise(clips_BTHWC, recipe).to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
    )
