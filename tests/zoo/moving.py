"""Videos of distinct moving content, and altered copies of them, to test search with known answers.

A seed draws a coloured, cloudy background that drifts, and a few discs and bars that move over it at different speeds.
`altered` reads such a file and writes a modified copy, such as those found on the web.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np

from tests.zoo import corpus

HW = (180, 240)


def frames(seed: int, n_frames: int, hw: tuple[int, int] = HW) -> Iterator[np.ndarray]:
    """[H, W, 3] uint8 frames of the video with that seed."""
    rng = np.random.default_rng([7, seed])
    height, width = hw
    cells = int(rng.integers(3, 9))
    coarse = rng.integers(0, 256, (cells, cells, 3)).astype(np.float32)
    rows = np.linspace(0, cells, 2 * height, endpoint=False)
    columns = np.linspace(0, cells, 2 * width, endpoint=False)
    ground = _bilinear(coarse, rows, columns)
    drift = rng.uniform(-3, 3, 2)
    shapes = [
        (
            rng.integers(0, 256, 3),
            rng.uniform(0, 1, 2) * hw,
            rng.uniform(-5, 5, 2),
            rng.uniform(0.05, 0.25),
            rng.random(),
        )
        for _ in range(int(rng.integers(1, 6)))
    ]
    y, x = np.mgrid[:height, :width]
    for number in range(n_frames):
        down, right = (drift * number).astype(int)
        frame = np.roll(ground, (down, right), axis=(0, 1))[:height, :width].copy()
        for colour, start, pace, size, kind in shapes:
            at_y, at_x = (start + pace * number) % hw
            far_y = np.minimum(abs(y - at_y), height - abs(y - at_y))
            far_x = np.minimum(abs(x - at_x), width - abs(x - at_x))
            inside = far_y**2 + far_x**2 < (size * height) ** 2 if kind < 0.6 else far_x < size * height / 2
            frame[inside] = colour
        yield frame.astype(np.uint8)


def _bilinear(coarse: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The coarse picture at fractional coordinates, wrapped around."""
    cells = len(coarse)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r)[:, None, None], (columns - c)[None, :, None]
    r1, c1 = (r + 1) % cells, (c + 1) % cells
    top = coarse[r][:, c] * (1 - fc) + coarse[r][:, c1] * fc
    low = coarse[r1][:, c] * (1 - fc) + coarse[r1][:, c1] * fc
    return top * (1 - fr) + low * fr


def video(path: Path, seed: int, n_frames: int, hw: tuple[int, int] = HW) -> Path:
    """The video with that seed, in good quality."""
    return _write(path, frames(seed, n_frames, hw), "18")


def altered(source: Path, path: Path, how: str) -> Path:
    """A copy of a file: `how` is one of ALTERATIONS."""
    with av.open(str(source)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return _write(path, ALTERATIONS[how](pictures), "33" if how == "re-encoded" else "23")


def _cropped(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """The middle 85% of height and width."""
    height, width = pictures[0].shape[:2]
    top, left = height * 3 // 40 // 2 * 2, width * 3 // 40 // 2 * 2
    return [np.ascontiguousarray(one[top : height - top, left : width - left]) for one in pictures]


def _faster(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """At 1.1 times the speed: every eleventh frame is removed."""
    return [pictures[at * 11 // 10] for at in range(len(pictures) * 10 // 11)]


def _letterboxed(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Black bars above and below, each an eighth of the height."""
    bar = np.zeros_like(pictures[0][: len(pictures[0]) // 16 * 2])
    return [np.concatenate([bar, one, bar]) for one in pictures]


ALTERATIONS: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
    "re-encoded": lambda pictures: pictures,  # at crf 33, with visible block artefacts
    "cropped": _cropped,
    "1.1x faster": _faster,
    "letterboxed": _letterboxed,
}


def _write(path: Path, pictures: Iterable[np.ndarray], crf: str) -> Path:
    return corpus.write(path, pictures, corpus.Codec("libx264", options={"preset": "veryfast", "crf": crf}))
