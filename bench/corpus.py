"""Made videos for the benches, coded as films are: what a decoder has to do, and may leave out, is about the same.

Scenes of four seconds, in each of which the camera pans over a background of soft shapes, one object crosses it, and
every frame has grain of its own; x264 then codes two frames in five so that no other refers to them, and a key frame at
each cut. Of two real films in the shared samples (bikes, nasa) it is 0.46 and 0.48.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from p3d.pipeline.types import FLOAT32

FPS = 25
SCENE_FRAMES = 100
GRAIN = 2.0  # standard deviation, of 255
SHAPES = ((8, 0.25), (32, 0.35), (128, 0.4))  # pixels across, share of the picture


@dataclass(frozen=True, slots=True)
class Codec:
    """How FFmpeg is to code a film: `options` beside the length of a GOP."""

    encoder: str
    suffix: str = ".mp4"
    options: dict[str, str] = field(default_factory=dict)
    pixel_format: str = "yuv420p"


_REALTIME = {"deadline": "realtime", "cpu-used": "8", "b": "3M"}
CODECS = {
    "h264": Codec("libx264", options={"preset": "veryfast", "crf": "23"}),
    "hevc": Codec("libx265", options={"preset": "veryfast", "x265-params": "open-gop=0:log-level=none"}),
    "vp8": Codec("libvpx", ".webm", _REALTIME),
    "vp9": Codec("libvpx-vp9", ".webm", _REALTIME),
    "mpeg4": Codec("mpeg4", options={"b": "4M"}),
    "mjpeg": Codec("mjpeg", ".mov", {"q": "4"}, "yuvj420p"),
    "prores": Codec("prores_ks", ".mov", pixel_format="yuv422p10le"),
}


def make(folder: Path, count: int, hw: tuple[int, int], n_frames: int, gop: int) -> Path:
    """`count` H.264 videos of `n_frames` frames in `folder`: one is encoded, the others are copies of it."""
    folder.mkdir(parents=True, exist_ok=True)
    first = film(folder / "video00000.mp4", hw, n_frames, gop)
    content = first.read_bytes()
    for number in range(1, count):
        (folder / f"video{number:05d}.mp4").write_bytes(content)
    return folder


def film(path: Path, hw: tuple[int, int], n_frames: int, gop: int, codec: Codec = CODECS["h264"]) -> Path:
    """One video; the codecs without B frames have none."""
    rng = np.random.default_rng(0)
    height, width = hw
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec.encoder, rate=FPS, options={**codec.options, "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, codec.pixel_format
        for number in range(n_frames):
            if number % SCENE_FRAMES == 0:
                scene = _Scene(rng, hw)
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            grainy = scene.luma(number % SCENE_FRAMES) + rng.normal(0, GRAIN, hw)
            planes[:height] = grainy.clip(16, 235)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p").reformat(format=codec.pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


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
