"""The ablation: its order-blind arms cannot tell a clip from its mirror image, and what is done is not done again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.ablation import ARMS, MIRROR, batch, build, run, size
from demo.motions import MOTIONS
from tests.conftest import REPO


@pytest.mark.parametrize("arm", ARMS)
@torch.inference_mode()
def test_only_arms_that_know_the_order_see_a_reversed_clip(arm: str) -> None:
    """Reversed in time, a clip has the same scores in an order-blind arm and others elsewhere."""
    network = build(arm, 0).eval()
    clips_BCTHW, _ = batch(2, torch.Generator().manual_seed(0))
    forwards, backwards = network(clips_BCTHW), network(clips_BCTHW.flip(2))
    assert forwards.shape == (2, len(MOTIONS))
    assert torch.allclose(forwards, backwards, rtol=1e-4, atol=1e-5) == ARMS[arm][1]


def test_mirror_images_are_pairs() -> None:
    """Each motion is the mirror image of its own mirror image."""
    assert torch.equal(MIRROR[MIRROR], torch.arange(len(MOTIONS)))
    assert [MOTIONS[at] for at in MIRROR[:4]] == ["right", "left", "down", "up"]


def test_equal_width_is_about_equal_size() -> None:
    """Single kinds have the size of the mix; the 2-D network lacks only temporal filters; 3x3x3 is larger."""
    sizes = {arm: size(arm)[0] for arm in ARMS}
    assert sizes["P3D-A"] == sizes["P3D-B"] == sizes["P3D-C"] == sizes["P3D, mixed"]
    assert sizes["2-D on frames"] == sizes["convolutional pooling"] < sizes["P3D-A"] < sizes["3x3x3"]


def test_a_result_is_kept_for_its_budget(tmp_path: Path) -> None:
    """The same budget reads the file, another one trains again, and too little time is an error."""
    first = run("2-D on frames", 0, 2, 64, 5, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": {"top1": 0.5, "in_pairs": 0.5}}))
    assert run("2-D on frames", 0, 2, 64, 5, tmp_path) == {"top1": 0.5, "in_pairs": 0.5} != first
    assert run("2-D on frames", 0, 1, 64, 5, tmp_path)["top1"] != 0.5
    with pytest.raises(TimeoutError, match="step 0 of 3"):
        run("2-D on frames", 0, 3, 64, 0, tmp_path)


def test_the_table_has_a_row_per_arm_and_the_paper_next_to_it(tmp_path: Path) -> None:
    """The short form of the bench runs from the command line and writes its report."""
    words = "--arms P3D-A 3x3x3 --seeds 1 --steps 2 --held-out 32 --rounds 1 --out".split()
    done = subprocess.run(
        [sys.executable, "-m", "bench.ablation", *words, tmp_path],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "ablation.md").read_text()
    assert written.count("| P3D-A |") == 2 and "83.7 %" in written and "train, clips/s" in written
