"""Made videos for the benches, coded as films are: what a decoder has to do, and may leave out, is about the same.

Scenes of four seconds, in each of which the camera pans over a background of soft shapes, one object crosses it, and
every frame has grain of its own; x264 then codes two frames in five so that no other refers to them, and a key frame at
each cut. Of two real films in the shared samples (bikes, nasa) it is 0.46 and 0.48.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.types import FLOAT32

FPS = 25
SCENE_FRAMES = 100
GRAIN = 2.0  # standard deviation, of 255
SHAPES = ((8, 0.25), (32, 0.35), (128, 0.4))  # pixels across, share of the picture


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
    with av.open(str(path), "w") as output:
        options = {"preset": "veryfast", "crf": "23", "g": str(gop)}
        stream = output.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(n_frames):
            if number % SCENE_FRAMES == 0:
                scene = _Scene(rng, hw)
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            grainy = scene.luma(number % SCENE_FRAMES) + rng.normal(0, GRAIN, hw)
            planes[:height] = grainy.clip(16, 235)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


class _Scene:
    """A background that is larger than the picture, an object, and how far both move in a frame."""

    def __init__(self, rng: np.random.Generator, hw: tuple[int, int]) -> None:
        self.hw, self.object_hw = hw, (hw[0] // 3, hw[1] // 4)
        self.room_hw = (hw[0] // 4, hw[1] // 4)
        whole_hw = hw[0] + self.room_hw[0], hw[1] + self.room_hw[1]
        self.back = sum(share * _soft(rng, whole_hw, across) for across, share in SHAPES)
        self.front = _soft(rng, self.object_hw, 6)
        self.pan_yx, self.step_yx = rng.uniform(-3, 3, 2) * hw[0] / 720, rng.uniform(-6, 6, 2) * hw[0] / 720

    def luma(self, t: int) -> FLOAT32:
        """[H, W], 0 to 255, of frame t of the scene."""
        y, x = (int(room / 2 + step * t) % room for step, room in zip(self.pan_yx, self.room_hw, strict=True))
        picture: FLOAT32 = self.back[y : y + self.hw[0], x : x + self.hw[1]].copy()
        room_hw = self.hw[0] - self.object_hw[0], self.hw[1] - self.object_hw[1]
        y, x = (int(room / 2 + step * t) % room for step, room in zip(self.step_yx, room_hw, strict=True))
        picture[y : y + self.object_hw[0], x : x + self.object_hw[1]] = self.front
        return picture


def _soft(rng: np.random.Generator, hw: tuple[int, int], across: int) -> FLOAT32:
    """[H, W], 0 to 255: random shades, `across` pixels from one to the next."""
    coarse = rng.integers(0, 256, (hw[0] // across + 3, hw[1] // across + 3)).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(coarse, format="gray")
    return frame.reformat(hw[1], hw[0], "gray", interpolation="BICUBIC").to_ndarray().astype(np.float32)
