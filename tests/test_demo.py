"""The demo: its network knows motions of looks that it has never seen, and can be trained again to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from demo import run, train
from demo.motions import MOTIONS, clips
from p3d import weights
from p3d.encoder import Encoder, normalise
from p3d.jobs.api.embed import embed
from p3d.jobs.planning.prepare import JobSpec, fix
from p3d.jobs.training.options import TrainOptions, TrainRun
from tests.conftest import REPO
from tests.training.conftest import planned, run_here

SEEDS = int(os.environ.get("P3D_DEMO_SEEDS", "2"))  # sets of nine videos; 100 take some minutes


def test_the_demos_network_knows_motions_of_unseen_looks() -> None:
    """At least 0.9 of held-out clips are classified correctly by the file that ships; it is at most 2.5 MB."""
    assert train.FILE.stat().st_size <= 2.5e6
    loaded = weights.load(train.FILE)
    assert sorted(loaded.class_names) == sorted(MOTIONS)
    random, right = torch.Generator().manual_seed(12345), 0
    with torch.inference_mode():
        for _ in range(8):
            motion_B = torch.randint(len(MOTIONS), (32,), generator=random)
            found_B = loaded.network(normalise(clips(motion_B, 16, 64, random), loaded.recipe)).argmax(1)
            right += sum(loaded.class_names[at] == MOTIONS[of] for at, of in zip(found_B, motion_B, strict=True))
    assert right / 256 >= 0.9


def test_neighbours_share_the_motion_and_without_training_the_look(tmp_path: Path) -> None:
    """Over sets of nine videos with other looks, 95 % have a nearest neighbour of the same motion; random weights do
    not."""
    by = {"trained": weights.load(train.FILE), "random": weights.random_weights("p3d-demo", 0)}
    shared: dict[str, list[str]] = {name: [] for name in by}
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        run.make_videos(folder, looks=tuple(10_000 + 3 * seed + at for at in range(3)))
        videos = sorted(folder.iterdir())
        for name, given in by.items():
            prepared = fix(given, JobSpec(None, ""))
            encoder = Encoder(given, batch_size=3)
            vectors = [embed(video, encoder, prepared.recipe).embedding_D for video in videos]
            nearest = run.nearest(np.stack(vectors))
            shared[name] += [run.shared(video.name, videos[at].name) for video, at in zip(videos, nearest, strict=True)]
    part = {name: found.count("same motion") / len(found) for name, found in shared.items()}
    print(part)
    assert part["trained"] >= 0.95
    assert part["random"] < 0.5


def test_training_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """The command of the demo writes the bytes that the same training writes in this process, with other folders."""
    file = tmp_path / "a.safetensors"
    code = (
        "import sys; from demo import train; train.TRAIN_VIDEOS, train.TEST_VIDEOS = 2, 1; train.main(sys.argv[1], 3)"
    )
    subprocess.run([sys.executable, "-c", code, file], check=True, cwd=REPO, capture_output=True)
    train.make_videos(tmp_path / "videos", 2, 1)
    options = TrainOptions(
        steps=3,
        batch_size=train.BATCH,
        optimizer="adamw",
        lr=train.LEARNING_RATE,
        schedule="one-cycle",
        weight_decay=0.02,
        label_smoothing=0.05,
        dropout=0.0,
        flip=False,
    )
    store, record = planned(tmp_path / "videos", tmp_path / "out", options)
    run_here(store, record, TrainRun(workers=1, device="cpu", threads=2, micro_batch=16, decode_tasks=1))
    assert file.read_bytes() == store.read("weights.safetensors")
