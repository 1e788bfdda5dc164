"""Small videos whose frames each show their own number, so that tests can check the identity of frames.

A frame is a grid of 8 x 2 squares, black or white: the bits of its number, lowest first, row by row. The squares are
large enough to survive any codec and any resize; `numbers_in` reads them back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 16
FPS = 25


def picture(number: int, height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8: the number as 16 squares."""
    frame_HWC = np.empty((height, width, 3), np.uint8)
    for bit in range(BITS):
        row, column = divmod(bit, 8)
        rows = slice(row * height // 2, (row + 1) * height // 2)
        columns = slice(column * width // 8, (column + 1) * width // 8)
        frame_HWC[rows, columns] = 235 if number >> bit & 1 else 20
    return frame_HWC


def numbers_in(frames_NHWC: np.ndarray) -> list[int]:
    """The number that each frame shows, read from the middle of its squares."""
    height, width = frames_NHWC.shape[1:3]
    found = np.zeros(len(frames_NHWC), np.int64)
    for bit in range(BITS):
        row, column = divmod(bit, 8)
        y, x = (2 * row + 1) * height // 4, (2 * column + 1) * width // 16
        found |= (frames_NHWC[:, y, x].mean(axis=1) > 128).astype(np.int64) << bit
    return found.tolist()


@contextlib.contextmanager
def usual_priority() -> Iterator[None]:
    """Restore the scheduling of this thread after a codec has changed it.

    Run by root, SVT-AV1 gives the thread that opens it real-time priority. Every process that a test starts afterwards
    would inherit it. One of them, pinned to a core, stopped the machine in a loop of the kernel.
    """
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def video(
    path: Path,
    codec: str,
    n_frames: int,
    *,
    hw: tuple[int, int] = (96, 192),
    container: str | None = None,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    rotation: float | None = None,
    mirrored: bool = False,
    pixel_aspect: Fraction | None = None,
    ticks_per_s: int = FPS,
    noise: int = 0,
    gop: int | None = None,
    b_frames: int | None = None,
) -> Path:
    """Write n_frames numbered frames at 25 (`ticks_per_s`) per second; `pts` sets other times, `noise` adds bytes."""
    rng = np.random.default_rng(0)
    with usual_priority(), av.open(str(path), "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=ticks_per_s, options=options or {})
        stream.height, stream.width = hw
        stream.pix_fmt = pixel_format
        if gop is not None:
            stream.gop_size = gop
        if b_frames is not None:
            stream.max_b_frames = b_frames
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None or mirrored:
            stream.set_display_rotation(rotation or 0, hflip=mirrored)
        for number in range(n_frames):
            pixels = picture(number, *hw)
            if noise:
                pixels = np.clip(pixels + rng.integers(-noise, noise, pixels.shape), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (pts[number] if pts else number), Fraction(1, ticks_per_s)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def looped(source: Path, path: Path, times: int) -> Path:
    """The packets of `source`, `times` times in a row: a long video without encoding it."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        first = min(packet.pts for packet in packets)
        span = max(packet.pts + packet.duration for packet in packets) - first
        copy = output.add_stream_from_template(stream)
        for turn in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts, again.dts = packet.pts + turn * span, packet.dts + turn * span
                again.duration, again.is_keyframe = packet.duration, packet.is_keyframe
                again.time_base, again.stream = stream.time_base, copy
                output.mux(again)
    return path


def audio(path: Path) -> Path:
    """One second of silence in an mp4: a media file without pictures."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def cut(source: Path, path: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(source: Path, path: Path, at: float, n_bytes: int) -> Path:
    """A file with `n_bytes` bytes overwritten by 0xff, starting at the share `at` of its length."""
    data = bytearray(source.read_bytes())
    start = int(len(data) * at)
    data[start : start + n_bytes] = b"\xff" * n_bytes
    path.write_bytes(bytes(data))
    return path
