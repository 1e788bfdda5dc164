"""Bad files: a file for every reason of docs/reference/failure-reasons.md, and odd files that have rows.

Tests build the files; none is stored. `plant` names a fault that is injected while the file is read
(tests/zoo/plants.py), where no file can cause it by itself; such a file is a good video otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from p3d.pipeline.errors import Reason
from tests.zoo import make

FAST = {"preset": "ultrafast", "bf": "0"}
Build = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Case:
    """A file name, its reason of failure (None: it has rows), and a function that writes it to a path."""

    name: str
    reason: Reason | None
    build: Build
    plant: str = ""


def good(path: Path, n_frames: int = 20) -> Path:
    return make.video(path, "libx264", n_frames, options=FAST, gop=10)


def faststart(path: Path, n_frames: int = 60) -> Path:
    return make.video(path, "libx264", n_frames, options=FAST, gop=10, noise=60, muxer={"movflags": "faststart"})


def _text(content: str | bytes) -> Build:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def _cut(share: float, build: Build, suffix: str) -> Build:
    def made(path: Path) -> None:
        whole = path.with_name(f"whole{suffix}.tmp")
        build(whole.with_suffix(suffix))
        make.cut(whole.with_suffix(suffix), path, share)
        whole.with_suffix(suffix).unlink()

    return made


def _all_bad(path: Path) -> None:
    """Every byte of the samples overwritten, with an intact index."""
    data = bytearray(faststart(path, 30).read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)
    path.write_bytes(bytes(data))


def _patched(build: Build, old: bytes, new: bytes) -> Build:
    def made(path: Path) -> None:
        build(path)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return made


def _wide_gif(path: Path) -> None:
    """A thousand bytes that claim a canvas of 16384x16384."""
    make.video(path, "gif", 3, pixel_format="rgb8")
    content = path.read_bytes()
    path.write_bytes(content[:6] + b"\x00\x40\x00\x40" + content[10:])


def _long(path: Path) -> None:
    """Two frames, a day and an hour apart."""
    make.video(path, "libx264", 2, pts=[0, 25 * 3600], ticks_per_s=1, options=FAST)


def _flat(path: Path) -> None:
    """All grey: the injected fault of the network reacts to it."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options=FAST)
        stream.height, stream.width = 96, 192
        for _ in range(20):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((96, 192, 3), 77, np.uint8), format="rgb24")))
        output.mux(stream.encode())


def _many_streams(path: Path) -> None:
    """Sixty video streams of one frame each."""
    with av.open(str(path), "w") as output:
        streams = []
        for _ in range(60):
            stream = output.add_stream("mpeg4", rate=25)
            stream.height, stream.width = 96, 192
            streams.append(stream)
        for stream in streams:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(make.picture(1, 96, 192), format="rgb24")))
            output.mux(stream.encode())


def _link_out(path: Path) -> None:
    outside = path.parent.with_name(f"{path.parent.name}-outside.mp4")
    path.symlink_to(good(outside))


def _playlist(path: Path) -> None:
    """Names a good video next to it, which a demuxer would read instead."""
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{path.parent / 'good.mp4'}\n#EXT-X-ENDLIST\n")


def _concat(path: Path) -> None:
    path.write_text(f"ffconcat version 1.0\nfile {path.parent / 'good.mp4'}\n")


_R = Reason
CASES: tuple[Case, ...] = (
    # rows 16 and 18: odd videos that have rows
    Case("good.mp4", None, good),
    Case("one_frame.mp4", None, lambda path: good(path, 1)),
    Case("short.mp4", None, lambda path: good(path, 5)),
    Case("turned.mp4", None, lambda path: make.video(path, "libx264", 20, rotation=90, options=FAST)),
    Case("vfr.mp4", None, lambda path: make.video(path, "libx264", 20, pts=[3 * i + i % 3 for i in range(20)])),
    Case("odd_size.mp4", None, lambda path: make.video(path, "libx264", 20, hw=(97, 191), pixel_format="yuv444p")),
    Case("aspect.mp4", None, lambda path: make.video(path, "libx264", 20, pixel_aspect=Fraction(16, 11))),
    Case("ten_bits.mp4", None, lambda path: make.video(path, "libx264", 20, pixel_format="yuv420p10le")),
    Case("moving.gif", None, lambda path: make.video(path, "gif", 12, pixel_format="rgb8")),
    Case("transport.ts", None, lambda path: make.video(path, "mpeg2video", 30, gop=12, b_frames=2)),  # row 17
    Case("many_streams.mov", None, _many_streams),  # row 20
    Case("spät am \x1b[31mAbend|%2F.mp4", None, good),  # rows 24 and 51
    # rows 16 and 21
    Case("empty.mp4", _R.EMPTY_FILE, _text("")),
    Case("text.mp4", _R.NOT_A_VIDEO, _text("nothing to see here\n" * 20)),
    Case("a\x1b[31m\x07\nFAKE: 0 failed\r.mp4", _R.NOT_A_VIDEO, _text("no video")),  # row 51
    Case("page.mp4", _R.NOT_A_VIDEO, _text("<!DOCTYPE html><title>404</title>")),
    Case("playlist.mp4", _R.NOT_A_VIDEO, _playlist),
    Case(
        "concat.mp4",
        _R.NOT_A_VIDEO,
        lambda path: path.write_text(f"ffconcat version 1.0\nfile {path.parent}/good.mp4\n"),
    ),
    Case("zeros.mp4", _R.NOT_A_VIDEO, _text(bytes(5000))),
    Case("image.mp4", _R.NOT_A_VIDEO, _text(b"\x89PNG\r\n\x1a\n" + bytes(50))),
    Case("audio.mp4", _R.NO_VIDEO_STREAM, make.audio),
    Case("noise_inside.mp4", _R.NO_FRAMES, _all_bad),
    Case("other_codec.mp4", _R.UNSUPPORTED, _patched(good, b"avc1\0", b"xyz9\0")),
    Case("cut_faststart.mp4", _R.TRUNCATED, _cut(0.5, faststart, ".mp4")),
    Case("cut_index.mp4", _R.TRUNCATED, _cut(0.5, good, ".mp4")),
    Case("cut.mkv", _R.TRUNCATED, _cut(0.6, lambda path: make.video(path, "libx264", 60, noise=40), ".mkv")),
    Case(
        "damaged.mp4",
        _R.CORRUPT_FRAMES,
        lambda path: make.damaged(faststart(path), path, 0.5, 4000),
    ),
    # rows 19 and 20
    Case("a_day_and_more.mp4", _R.TOO_LONG, _long),
    Case("16k.gif", _R.TOO_LARGE, _wide_gif),
    # row 22
    Case("fifo.mp4", _R.NOT_A_FILE, lambda path: os.mkfifo(path)),
    Case("link_out.mp4", _R.NOT_A_FILE, _link_out),
    # rows 11 to 14 and 25, 26: faults while a file is read
    Case("flat.mp4", _R.NON_FINITE, _flat, "nan"),
    Case("memory.mp4", _R.DECODE_MEMORY, good, "memory"),
    Case("crash.mp4", _R.DECODER_CRASH, good, "crash"),
    Case("hang.mp4", _R.DECODE_TIMEOUT, good, "hang"),
    Case("touched.mp4", _R.SOURCE_CHANGED, good, "touch"),
    Case("removed.mp4", _R.SOURCE_MISSING, good, "remove"),
    Case("defect.mp4", _R.INTERNAL, good, "defect"),
)


def build(folder: Path, cases: tuple[Case, ...] = CASES) -> Path:
    """A folder with every case."""
    folder.mkdir()
    for case in cases:
        case.build(folder / case.name)
    return folder
