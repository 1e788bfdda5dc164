"""`make demo`: a few made videos, one launch, what was written, and who is nearest to whom.

The weights are random, so distances show that the machinery works and nothing about meaning.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
VIDEOS, OUT = HERE / "videos", HERE / "out"
P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
N_FRAMES, HEIGHT, WIDTH, FPS = 48, 180, 240, 24


def ball(at: float, phase: float) -> np.ndarray:
    """A ball that crosses the picture; [H, W, 3] uint8 at time `at` of [0, 1)."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = (x - WIDTH * ((at + phase) % 1)) ** 2 + (y - HEIGHT * (0.5 + 0.3 * math.sin(6.3 * at))) ** 2 < 30**2
    return np.where(inside[..., None], (230, 160, 40), (20, 40, 90)).astype(np.uint8)


def bars(at: float, phase: float) -> np.ndarray:
    """Bars that drift sideways."""
    wave = np.sin(np.arange(WIDTH) / 9 + 25 * at + phase)[None, :, None] * np.ones((HEIGHT, 1, 3))
    return (128 + 100 * wave * np.array([1, 0.6, 0.2])).astype(np.uint8)


def rings(at: float, phase: float) -> np.ndarray:
    """Rings that grow from the middle."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    wave = np.sin(np.hypot(x - WIDTH / 2, y - HEIGHT / 2) / 7 - 20 * at + phase)[..., None]
    return (128 + 100 * wave * np.array([0.2, 1, 0.7])).astype(np.uint8)


def make_videos() -> None:
    """Six short videos, two of each kind, and one file that is none."""
    VIDEOS.mkdir(exist_ok=True)
    for kind in (ball, bars, rings):
        for number in (1, 2):
            with av.open(str(VIDEOS / f"{kind.__name__}{number}.mp4"), "w") as output:
                stream = output.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                for at in range(N_FRAMES):
                    picture = kind(at / N_FRAMES, 0.4 * number)
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                output.mux(stream.encode())
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
    # random filters give every video a large common part; what tells them apart is what is left without it
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    for at, name in enumerate(names):
        nearest = [other for other in np.argsort(-similarity[at]) if other != at][:2]
        print(f"  {name:12} " + "   ".join(f"{names[other]:12} {similarity[at, other]:+.2f}" for other in nearest))


def main() -> int:
    started = time.monotonic()
    say("six made videos and a broken file")
    make_videos()
    shutil.rmtree(OUT, ignore_errors=True)  # the output of the last demo, made by this script alone
    print("  " + "  ".join(sorted(path.name for path in VIDEOS.iterdir())))
    say("embed them: P3D-63 with random weights, on this machine's processor")
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
        "These weights are random: they show the machinery, not meaning.\n"
        "With trained weights the same commands give embeddings to search by."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
