"""The generator of moving videos for benches, the demo and the page tests: films, and coloured pictures to look at.

    python -m tests.zoo.corpus FOLDER      the archive of the screenshots in docs/images

`film` writes grey scenes that are coded as real films are. `show` writes coloured pictures of one of KINDS, in colours
and paces that follow from a seed. Numbered frames are in `make.py`, videos with altered copies in `moving.py`.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 25  # of `film`
SCENE_FRAMES = 100
GRAIN = 2.0  # standard deviation, of 255
SHAPES = ((8, 0.25), (32, 0.35), (128, 0.4))  # pixels from one shade to the next, share of the picture
SHOW_HW, SHOW_FPS = (180, 320), 24
Y, X = np.mgrid[: SHOW_HW[0], : SHOW_HW[1]].astype(np.float32)


@dataclass(frozen=True, slots=True)
class Codec:
    """How FFmpeg codes a video: encoder, container suffix, and `options` in addition to the length of a GOP."""

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


def write(path: Path, pictures: Iterable[np.ndarray], codec: Codec, *, fps: int = FPS, form: str = "rgb24") -> Path:
    """Encode uint8 pictures of FFmpeg's pixel format `form`, all of one size; `fps` is frames per second."""
    with av.open(str(path), "w") as output:
        stream = None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=form)
            if stream is None:
                stream = output.add_stream(codec.encoder, rate=fps, options=codec.options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, codec.pixel_format
            if form == "yuv420p":
                frame = frame.reformat(format=codec.pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
        assert stream is not None, "a video has frames"
        output.mux(stream.encode())
    return path


def make(folder: Path, count: int, hw: tuple[int, int], n_frames: int, gop: int) -> Path:
    """Write `count` H.264 films of `n_frames` frames into `folder`: one is encoded, the others are copies of it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = film(folder / "video00000.mp4", hw, n_frames, gop).read_bytes()
    for number in range(1, count):
        (folder / f"video{number:05d}.mp4").write_bytes(content)
    return folder


def film(path: Path, hw: tuple[int, int], n_frames: int, gop: int, codec: Codec = CODECS["h264"]) -> Path:
    """Write one film: scenes of four seconds, in each of which the camera pans and an object crosses.

    Every frame has its own grain. x264 then codes two frames in five so that no other frame refers to them, and a key
    frame at each cut. In two real films of the samples (bikes, nasa) the share is 0.46 and 0.48. Codecs without
    B frames have no such frames.
    """
    options = {**codec.options, "g": str(gop)}
    coded = Codec(codec.encoder, codec.suffix, options, codec.pixel_format)
    return write(path, _film_frames(hw, n_frames), coded, form="yuv420p")


def _film_frames(hw: tuple[int, int], n_frames: int) -> Iterator[np.ndarray]:
    """[H * 3 / 2, W] uint8: grey pictures as planes of YUV 4:2:0."""
    rng = np.random.default_rng(0)
    height, width = hw
    for number in range(n_frames):
        if number % SCENE_FRAMES == 0:
            scene = _Scene(rng, hw)
        planes = np.full((height * 3 // 2, width), 128, np.uint8)
        planes[:height] = (scene.luma(number % SCENE_FRAMES) + rng.normal(0, GRAIN, hw)).clip(16, 235)
        yield planes


class _Scene:
    """A background larger than the picture, an object, and how far both move per frame."""

    def __init__(self, rng: np.random.Generator, hw: tuple[int, int]) -> None:
        self.hw, self.object_hw = hw, (hw[0] // 3, hw[1] // 4)
        self.margin_hw = (hw[0] // 4, hw[1] // 4)
        whole_hw = hw[0] + self.margin_hw[0], hw[1] + self.margin_hw[1]
        self.back = sum(share * _soft(rng, whole_hw, across) for across, share in SHAPES)
        self.front = _soft(rng, self.object_hw, 6)
        self.pan_yx, self.step_yx = rng.uniform(-3, 3, 2) * hw[0] / 720, rng.uniform(-6, 6, 2) * hw[0] / 720

    def luma(self, t: int) -> np.ndarray:
        """[H, W] float32, 0 to 255, of frame t of the scene."""
        y, x = (int(space / 2 + step * t) % space for step, space in zip(self.pan_yx, self.margin_hw, strict=True))
        picture: np.ndarray = self.back[y : y + self.hw[0], x : x + self.hw[1]].copy()
        free_hw = self.hw[0] - self.object_hw[0], self.hw[1] - self.object_hw[1]
        y, x = (int(space / 2 + step * t) % space for step, space in zip(self.step_yx, free_hw, strict=True))
        picture[y : y + self.object_hw[0], x : x + self.object_hw[1]] = self.front
        return picture


def _soft(rng: np.random.Generator, hw: tuple[int, int], across: int) -> np.ndarray:
    """[H, W] float32, 0 to 255: random shades, `across` pixels from one to the next."""
    coarse = rng.integers(0, 256, (hw[0] // across + 3, hw[1] // across + 3)).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(coarse, format="gray")
    return frame.reformat(hw[1], hw[0], "gray", interpolation="BICUBIC").to_ndarray().astype(np.float32)


def balls(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Discs that bounce over a plain background."""
    frame = np.ones((*SHOW_HW, 3), np.float32) * paint(0.5, 0.25)
    for number in range(4):
        pace, start, size = rng.uniform(30, 110, 2), rng.uniform(0, 600, 2), rng.uniform(14, 34)
        y, x = (abs((start + pace * at_s) % (2 * side) - side) for side in SHOW_HW)
        at_y, at_x = float(y[0]), float(x[1])
        frame[(Y - at_y) ** 2 + (X - at_x) ** 2 < size**2] = paint(0.1 * number, 0.95)
    return frame


def bars(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Coloured bars that move across."""
    angle, width, pace = rng.uniform(0, np.pi), rng.uniform(9, 26), rng.uniform(20, 90)
    wave = np.sin((X * np.cos(angle) + Y * np.sin(angle) - pace * at_s) / width)[..., None]
    return paint(0.0, 0.9) * (0.5 + 0.5 * wave) + paint(0.5, 0.35) * (0.5 - 0.5 * wave)


def rings(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Rings that grow from a point."""
    y, x, width, pace = rng.uniform(40, 140), rng.uniform(80, 240), rng.uniform(6, 14), rng.uniform(15, 60)
    wave = np.sin((np.hypot(X - x, Y - y) - pace * at_s) / width)[..., None]
    return paint(0.1, 0.95) * (wave > 0.2) + paint(0.55, 0.2) * (wave <= 0.2)


def squares(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """A rotating checkerboard."""
    angle, size = at_s * rng.uniform(0.2, 0.9) + rng.uniform(0, 3), rng.uniform(22, 44)
    u = (X - 160) * np.cos(angle) + (Y - 90) * np.sin(angle)
    v = (Y - 90) * np.cos(angle) - (X - 160) * np.sin(angle)
    even = ((np.floor(u / size) + np.floor(v / size)) % 2)[..., None]
    return paint(0.05, 0.9) * even + paint(0.45, 0.3) * (1 - even)


def clouds(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Slow clouds of two colours."""
    field = np.zeros(SHOW_HW, np.float32)
    for _ in range(7):
        size, angle, pace, phase = rng.uniform(24, 80), rng.uniform(0, 6.3), rng.uniform(-1, 1), rng.uniform(0, 6.3)
        field += np.sin((X * np.cos(angle) + Y * np.sin(angle)) / size + pace * at_s + phase)
    mix = (0.5 + field / 8).clip(0, 1)[..., None]
    return paint(0.0, 0.95) * mix + paint(0.35, 0.4) * (1 - mix)


def rays(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Rotating rays."""
    count, pace = int(rng.integers(5, 12)), rng.uniform(0.3, 1.2)
    turn = np.sin(count * np.arctan2(Y - 90, X - 160) + count * pace * at_s)[..., None]
    inside = (np.hypot(Y - 90, X - 160) < rng.uniform(18, 40))[..., None]
    frame = paint(0.0, 0.95) * (turn > 0) + paint(0.08, 0.55) * (turn <= 0)
    return np.where(inside, paint(0.5, 1.0), frame)


KINDS = (balls, bars, rings, squares, clouds, rays)


def frames(kind: Callable[..., np.ndarray], seed: int, n_frames: int) -> Iterator[np.ndarray]:
    """[H, W, 3] uint8 pictures of one of KINDS."""
    hue = (seed * 0.381966 + KINDS.index(kind) * 0.13) % 1

    def paint(turn: float, light: float) -> np.ndarray:
        return np.array(colorsys.hsv_to_rgb((hue + turn * 0.4) % 1, 0.75 - 0.3 * light, light), np.float32)

    for number in range(n_frames):
        picture = kind(number / SHOW_FPS, np.random.default_rng([seed, KINDS.index(kind)]), paint)
        yield (255 * picture.clip(0, 1)).astype(np.uint8)


def show(path: Path, kind: Callable[..., np.ndarray], seed: int, n_frames: int, codec: str = "libx264") -> Path:
    """Write `n_frames` frames of one of KINDS, 24 per second, 180x320 pixels."""
    options = {"preset": "veryfast", "crf": "24"} if codec == "libx264" else {}
    return write(path, frames(kind, seed, n_frames), Codec(codec, options=options), fps=SHOW_FPS)


def archive(root: Path, each: int, seconds: tuple[float, ...]) -> Path:
    """Write `each` videos of every kind, a folder per kind, and one file that is not a video."""
    for kind in KINDS:
        (root / kind.__name__).mkdir(parents=True)
        for seed in range(each):
            name = f"{kind.__name__}-{'morning noon evening dusk night dawn'.split()[seed % 6]}.mp4"
            show(root / kind.__name__ / name, kind, seed, int(SHOW_FPS * seconds[seed % len(seconds)]))
    (root / "interrupted-download.mp4").write_bytes(b"\0" * 5000)
    return root


if __name__ == "__main__":
    archive(Path(sys.argv[1]), 5, (4, 6, 9, 5, 12))
