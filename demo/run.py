"""`make demo`: embed nine generated videos with a small trained P3D, find neighbours, search, and write a report.

Three motions are shown in each of three looks. The network was trained on other looks (`demo.train`), so it puts videos
of one motion together. Next to it stands the same network with random weights, which sorts by look.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from demo.motions import MOTIONS, clips
from demo.train import FILE as WEIGHTS
from tests.zoo import corpus

HERE = Path(__file__).resolve().parent
VIDEOS, OUT, UNTRAINED = HERE / "videos", HERE / "out", HERE / "out-untrained"
P3D_WORDS = ".venv/bin/p3d"
P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
SHOWN = {"right": "right", "clockwise": "turn", "grow": "grow"}  # motion: what its videos are called
LOOKS = (101, 102, 103)  # seeds, fixed before the network was trained
N_FRAMES, SIDE, FPS = 48, 128, 24


def make_videos(folder: Path, looks: tuple[int, ...] = LOOKS) -> None:
    """Write a video per motion and look, such as `turn-2.mp4`: 48 frames of 128x128 pixels, H.264."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(looks, 1):
        for motion, name in SHOWN.items():
            random = torch.Generator().manual_seed(seed)  # so that a look is the same in all motions
            [pictures] = clips(torch.tensor([MOTIONS.index(motion)]), N_FRAMES, SIDE, random).numpy()
            corpus.write(folder / f"{name}-{number}.mp4", pictures, corpus.CODECS["h264"], fps=FPS)


def nearest(embeddings_ND: np.ndarray) -> list[int]:
    """For each video the index of the other one with the largest cosine similarity."""
    unit_ND = embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    cosine_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(cosine_NN, -np.inf)
    return [int(at) for at in cosine_NN.argmax(1)]


def shared(one: str, other: str) -> str:
    """What two videos share, from their names: "same motion", "same look" or nothing."""
    motions, looks = zip(one.split("-"), other.split("-"), strict=True)
    return "same motion" if motions[0] == motions[1] else "same look" if looks[0] == looks[1] else ""


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def p3d(*args: object) -> int:
    """Run a verb as a user would, showing the command."""
    print(f"$ p3d {' '.join(str(a).replace(str(HERE), 'demo') for a in args)}", flush=True)
    return subprocess.run([*P3D, *map(str, args)], check=False).returncode


def show_neighbours() -> bool:
    """Print the nearest neighbour of each video under both networks. Do all share the motion under the trained one?"""
    names, found = [], {}
    for out in (OUT, UNTRAINED):
        table = pq.read_table(out / "videos").sort_by("path")
        names = table["path"].to_pylist()
        found[out] = nearest(np.stack(table["embedding"].to_numpy(zero_copy_only=False)))
    print("  video          nearest, trained            nearest, random weights")
    for at, name in enumerate(names):
        cells = [f"{names[to[at]]:14}{shared(name, names[to[at]])}" for to in found.values()]
        print(f"  {name:15}{cells[0]:28}{cells[1]}")
    right, chance = (
        sum(shared(name, names[to[at]]) == "same motion" for at, name in enumerate(names)) for to in found.values()
    )
    print(f"  same motion: {right} of {len(names)} trained, {chance} of {len(names)} with random weights")
    return right == len(names)


def main() -> int:
    started = time.monotonic()
    say("nine generated videos: three motions, each in three looks")
    for folder in (VIDEOS, OUT, UNTRAINED):
        shutil.rmtree(folder, ignore_errors=True)  # of the last demo, written only by this script
    make_videos(VIDEOS)
    print("  " + "  ".join(sorted(path.name for path in VIDEOS.iterdir())))
    say("embed them with the small P3D that `make train-demo` trained on other looks")
    if p3d("launch", VIDEOS, OUT, "--weights", WEIGHTS) != 0:
        return 1
    say("the same with random weights, for comparison")
    if p3d("launch", VIDEOS, UNTRAINED, "--model", "p3d-demo", "--weights", "random:0") != 0:
        return 1
    say("is every video accounted for?")
    if p3d("verify", OUT) != 0:
        return 1
    say("nearest neighbours")
    right = show_neighbours()
    say("search with one of them")
    p3d("search", OUT, VIDEOS / "turn-1.mp4", "--top", 4)
    say("a report to look at")
    if p3d("results", "report", OUT, "-o", OUT / "report.html") != 0:
        return 1
    print(f"\nDone in {time.monotonic() - started:.0f} s. Browse the results:  {P3D_WORDS} results serve demo/out")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
