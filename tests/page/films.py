"""An archive to look at: six kinds of moving pictures, each in several colours and paces, some minutes of them in all.

python -m tests.page.films FOLDER makes it, for the screenshots of docs/images.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

HW, FPS = (180, 320), 24
Y, X = np.mgrid[: HW[0], : HW[1]].astype(np.float32)


def balls(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Discs that bounce over a plain ground."""
    frame = np.ones((*HW, 3), np.float32) * paint(0.5, 0.25)
    for number in range(4):
        pace, start, size = rng.uniform(30, 110, 2), rng.uniform(0, 600, 2), rng.uniform(14, 34)
        y, x = (abs((start + pace * at_s) % (2 * side) - side) for side in HW)
        at_y, at_x = float(y[0]), float(x[1])
        frame[(Y - at_y) ** 2 + (X - at_x) ** 2 < size**2] = paint(0.1 * number, 0.95)
    return frame


def bars(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Stripes that drift across."""
    angle, width, pace = rng.uniform(0, np.pi), rng.uniform(9, 26), rng.uniform(20, 90)
    wave = np.sin((X * np.cos(angle) + Y * np.sin(angle) - pace * at_s) / width)[..., None]
    return paint(0.0, 0.9) * (0.5 + 0.5 * wave) + paint(0.5, 0.35) * (0.5 - 0.5 * wave)


def rings(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Rings that grow from a point."""
    y, x, width, pace = rng.uniform(40, 140), rng.uniform(80, 240), rng.uniform(6, 14), rng.uniform(15, 60)
    wave = np.sin((np.hypot(X - x, Y - y) - pace * at_s) / width)[..., None]
    return paint(0.1, 0.95) * (wave > 0.2) + paint(0.55, 0.2) * (wave <= 0.2)


def squares(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """A turning board of squares."""
    angle, size = at_s * rng.uniform(0.2, 0.9) + rng.uniform(0, 3), rng.uniform(22, 44)
    u = (X - 160) * np.cos(angle) + (Y - 90) * np.sin(angle)
    v = (Y - 90) * np.cos(angle) - (X - 160) * np.sin(angle)
    even = ((np.floor(u / size) + np.floor(v / size)) % 2)[..., None]
    return paint(0.05, 0.9) * even + paint(0.45, 0.3) * (1 - even)


def clouds(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """Slow clouds of two colours."""
    field = np.zeros(HW, np.float32)
    for _ in range(7):
        size, angle, pace, phase = rng.uniform(24, 80), rng.uniform(0, 6.3), rng.uniform(-1, 1), rng.uniform(0, 6.3)
        field += np.sin((X * np.cos(angle) + Y * np.sin(angle)) / size + pace * at_s + phase)
    mix = (0.5 + field / 8).clip(0, 1)[..., None]
    return paint(0.0, 0.95) * mix + paint(0.35, 0.4) * (1 - mix)


def rays(at_s: float, rng: np.random.Generator, paint: Callable[[float, float], np.ndarray]) -> np.ndarray:
    """A turning sun of rays."""
    count, pace = int(rng.integers(5, 12)), rng.uniform(0.3, 1.2)
    turn = np.sin(count * np.arctan2(Y - 90, X - 160) + count * pace * at_s)[..., None]
    inside = (np.hypot(Y - 90, X - 160) < rng.uniform(18, 40))[..., None]
    frame = paint(0.0, 0.95) * (turn > 0) + paint(0.08, 0.55) * (turn <= 0)
    return np.where(inside, paint(0.5, 1.0), frame)


KINDS = (balls, bars, rings, squares, clouds, rays)


def frames(kind: Callable[..., np.ndarray], seed: int, n_frames: int) -> Iterator[np.ndarray]:
    """[H, W, 3] uint8."""
    hue = (seed * 0.381966 + KINDS.index(kind) * 0.13) % 1

    def paint(turn: float, light: float) -> np.ndarray:
        return np.array(colorsys.hsv_to_rgb((hue + turn * 0.4) % 1, 0.75 - 0.3 * light, light), np.float32)

    for number in range(n_frames):
        picture = kind(number / FPS, np.random.default_rng([seed, KINDS.index(kind)]), paint)
        yield (255 * picture.clip(0, 1)).astype(np.uint8)


def film(path: Path, kind: Callable[..., np.ndarray], seed: int, n_frames: int, codec: str = "libx264") -> Path:
    """Write one of them."""
    options = {"preset": "veryfast", "crf": "24"} if codec == "libx264" else {}
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width = HW
        stream.pix_fmt = "yuv420p"
        for picture in frames(kind, seed, n_frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


def archive(root: Path, each: int, seconds: tuple[float, ...]) -> Path:
    """`each` films of each kind in a folder of its own, and one file that is none."""
    for kind in KINDS:
        (root / kind.__name__).mkdir(parents=True)
        for seed in range(each):
            name = f"{kind.__name__}-{'morning noon evening dusk night dawn'.split()[seed % 6]}.mp4"
            film(root / kind.__name__ / name, kind, seed, int(FPS * seconds[seed % len(seconds)]))
    (root / "interrupted-download.mp4").write_bytes(b"\0" * 5000)
    return root


if __name__ == "__main__":
    archive(Path(sys.argv[1]), 5, (4, 6, 9, 5, 12))
