"""`make demo`: generate a few videos, launch a job, list its files, and show the nearest neighbours.

The weights are random, so distances show that the pipeline works; they say nothing about meaning.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.zoo import corpus

HERE = Path(__file__).resolve().parent
VIDEOS, OUT = HERE / "videos", HERE / "out"
P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
N_FRAMES = 48  # 24 per second


def make_videos() -> None:
    """Generate six short videos, two of each kind in similar colours, and one file that is not a video."""
    VIDEOS.mkdir(exist_ok=True)
    for name, kind in {"ball": corpus.balls, "bars": corpus.bars, "rings": corpus.rings}.items():
        for number, seed in ((1, 0), (2, 13)):
            corpus.show(VIDEOS / f"{name}{number}.mp4", kind, seed, N_FRAMES)
    (VIDEOS / "broken.mp4").write_bytes(b"\0" * 5000)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def p3d(*args: object) -> int:
    """Run a verb as a user would, showing the command."""
    print(f"$ p3d {' '.join(str(a).replace(str(HERE), 'demo') for a in args)}", flush=True)
    return subprocess.run([*P3D, *map(str, args)], check=False).returncode


def show_neighbours() -> None:
    """Cosine similarity of the video embeddings, nearest first."""
    table = pq.read_table(OUT / "videos")
    names = table["path"].to_pylist()
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    # random filters give all videos a large common component; without it, differences show
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    for at, name in enumerate(names):
        nearest = [other for other in np.argsort(-similarity[at]) if other != at][:2]
        print(f"  {name:12} " + "   ".join(f"{names[other]:12} {similarity[at, other]:+.2f}" for other in nearest))


def main() -> int:
    started = time.monotonic()
    say("six generated videos and a broken file")
    make_videos()
    shutil.rmtree(OUT, ignore_errors=True)  # the output of the last demo, written only by this script
    print("  " + "  ".join(sorted(path.name for path in VIDEOS.iterdir())))
    say("embed them: P3D-63 with random weights, on this machine's CPU")
    code = p3d("launch", VIDEOS, OUT, "--model", "p3d63", "--weights", "random:0", "--shard-videos", 4)
    if code != 3:
        print(f"the launch ended with exit code {code}; 3 was expected, for the broken file", file=sys.stderr)
        return 1
    say("what was written")
    for path in sorted(OUT.rglob("*.parquet")):
        size = f"{pq.read_metadata(path).num_rows:4} rows {path.stat().st_size / 1e3:7.1f} kB"
        print(f"  {path.relative_to(HERE)!s:45} {size}")
    say("what failed, and why")
    p3d("failures", OUT)
    say("is every video accounted for?")
    if p3d("verify", OUT) != 0:
        return 1
    say("nearest neighbours of each video (cosine)")
    show_neighbours()
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. "
        "These weights are random: they show the pipeline, not meaning.\n"
        "With trained weights the same commands give embeddings for search."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
