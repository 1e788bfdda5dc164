"""`make train-demo`: train the small P3D of the demo on videos of made motions, and write demo/p3d-demo.safetensors.

    python -m demo.train [FILE [STEPS]]

It runs `p3d train` on generated videos, as a user would on their own. Seeds and the number of threads are fixed, so the
same processor with the same torch writes the same bytes. Training and test videos share no appearance: each video draws
its own (`demo.motions`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from demo.motions import MOTIONS, clips
from tests.zoo import corpus

FILE = Path(__file__).resolve().parent / "p3d-demo.safetensors"
STEPS, BATCH, LEARNING_RATE = 4000, 16, 3e-3
TRAIN_VIDEOS, TEST_VIDEOS = 256, 32  # of each motion
SEEDS = {"train": 1, "test": 2}
N_FRAMES, SIDE, FPS = 48, 64, 24
AT_ONCE = 16  # videos that are drawn together
# x264's assembly now and then writes other bytes for the same pictures, on processors with AVX-512
PLAIN = {"threads": "1", "x264-params": "asm=0"}
CODEC = replace(corpus.CODECS["h264"], options={**corpus.CODECS["h264"].options, **PLAIN})
P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
# for equal bytes the threads are given, as sums are split by thread
WORDS = (
    f"--model p3d-demo --init random:0 --batch-size {BATCH} --optimizer adamw --lr {LEARNING_RATE} --threads 2 "
    "--schedule one-cycle --weight-decay 0.02 --label-smoothing 0.05 --dropout 0 --no-flip"
)


def make_videos(folder: Path, train: int, test: int, n_frames: int = N_FRAMES) -> None:
    """Write folder/SPLIT/MOTION/NUMBER.mp4: H.264 of 64x64 pixels, each motion in other appearances."""
    for split, number in (("train", train), ("test", test)):
        random = torch.Generator().manual_seed(SEEDS[split])
        for at, motion in enumerate(MOTIONS):
            below = folder / split / motion
            below.mkdir(parents=True)
            for first in range(0, number, AT_ONCE):
                size = min(AT_ONCE, number - first)
                for k, pictures in enumerate(clips(torch.full((size,), at), n_frames, SIDE, random).numpy()):
                    corpus.write(below / f"{first + k:04d}.mp4", pictures, CODEC, fps=FPS)


def main(path: str | Path = FILE, steps: str | int = STEPS) -> int:
    with tempfile.TemporaryDirectory(prefix="p3d-demo-") as scratch:
        videos, out = Path(scratch, "videos"), Path(scratch, "out")
        make_videos(videos, TRAIN_VIDEOS, TEST_VIDEOS)
        words = [*WORDS.split(), "--steps", str(steps)]
        code = subprocess.run([*P3D, "train", videos, out, *words], check=False).returncode
        if code == 0:
            shutil.copy(out / "weights.safetensors", path)
        return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
