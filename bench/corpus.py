"""Made videos for the benches: moving bars with some noise, so that a codec has about as much to do as with a film."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 25


def make(folder: Path, count: int, hw: tuple[int, int], n_frames: int, gop: int) -> Path:
    """`count` H.264 videos of `n_frames` frames in `folder`: one is encoded, the others are copies of it."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "video00000.mp4"
    _write(first, hw, n_frames, gop)
    content = first.read_bytes()
    for number in range(1, count):
        (folder / f"video{number:05d}.mp4").write_bytes(content)
    return folder


def _write(path: Path, hw: tuple[int, int], n_frames: int, gop: int) -> None:
    rng = np.random.default_rng(0)
    height, width = hw
    grain = rng.integers(0, 12, (height, width + 64), dtype=np.uint8)
    bars = np.tile((np.arange(width + 512) * 2 % 240).astype(np.uint8), (height, 1))
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "26", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(n_frames):
            at = 3 * number % 512
            luma = bars[:, at : at + width] + grain[:, number % 64 : number % 64 + width]
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = luma
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
