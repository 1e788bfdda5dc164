"""Small good videos of every container, and seeded ways to break them. File `index` of a seed is always the same."""

from __future__ import annotations

import io
import random
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av

from tests import samples
from tests.zoo import cases, make

DECOY = "decoy.mp4"  # a video next to the broken ones, which some of them name
MOST_BYTES = 120_000  # largest base file
QUICK = {"deadline": "realtime"}
MADE: dict[str, Callable[[Path], Path]] = {
    "h264.mp4": lambda p: make.video(p, "libx264", 24, options={"preset": "ultrafast", "bf": "2"}, gop=8, noise=20),
    "faststart.mp4": lambda p: cases.faststart(p, 16),
    "fragments.mp4": lambda p: make.video(
        p, "libx264", 24, options=cases.FAST, gop=6, noise=20, muxer={"movflags": "frag_keyframe+empty_moov"}
    ),
    "mpeg4.mov": lambda p: make.video(p, "mpeg4", 24, gop=12, noise=20),
    "mjpeg.mov": lambda p: make.video(p, "mjpeg", 12, pixel_format="yuvj420p"),
    "h264.mkv": lambda p: make.video(p, "libx264", 24, options=cases.FAST, gop=8, noise=20),
    "vp9.webm": lambda p: make.video(p, "libvpx-vp9", 24, options=QUICK, gop=8, noise=20),
    "vp8.webm": lambda p: make.video(p, "libvpx", 24, options=QUICK, gop=8, noise=20),
    "mpeg4.avi": lambda p: make.video(p, "mpeg4", 24, gop=12, noise=20),
    "mpeg2.ts": lambda p: make.video(p, "mpeg2video", 24, gop=12, noise=20),
    "mpeg1.mpg": lambda p: make.video(p, "mpeg1video", 24, gop=12, noise=20, hw=(96, 160)),
    "h264.flv": lambda p: make.video(p, "libx264", 24, options=cases.FAST, gop=8, noise=20),
    "wmv.wmv": lambda p: make.video(p, "wmv2", 24, gop=12, noise=20),
    "moving.gif": lambda p: make.video(p, "gif", 12, pixel_format="rgb8"),
    "raw.h264": lambda p: make.video(p, "libx264", 16, options=cases.FAST, container="h264"),
    "raw.mjpeg": lambda p: make.video(p, "mjpeg", 12, pixel_format="yuvj420p"),
    "mpeg2.mxf": lambda p: make.video(p, "mpeg2video", 24, gop=12, noise=20),
    "vp8.ogg": lambda p: make.video(p, "libvpx", 24, options=QUICK, gop=8, noise=20),
    "vp8.ivf": lambda p: make.video(p, "libvpx", 24, options=QUICK, gop=8, noise=20),
    "raw.y4m": lambda p: make.video(p, "wrapped_avframe", 4, container="yuv4mpegpipe"),
    "live.mkv": lambda p: make.video(p, "libx264", 24, options=cases.FAST, gop=8, noise=20, muxer={"live": "1"}),
    "ffv1.mkv": lambda p: make.video(p, "ffv1", 12, options={"level": "3", "slices": "4", "slicecrc": "1"}),
    "av1.obu": lambda p: make.video(p, "libsvtav1", 12, options={"preset": "12"}),
    "prores.mov": lambda p: make.video(p, "prores_ks", 6, pixel_format="yuv422p10le"),
    "zmbv.avi": lambda p: make.video(p, "zmbv", 12, pixel_format="bgr0"),
}
# Containers that say where they end. A cut that loses frames must not go unnoticed in these.
TELLS = frozenset(
    "h264.mp4 faststart.mp4 fragments.mp4 mpeg4.mov mjpeg.mov h264.mkv vp9.webm vp8.webm mpeg4.avi wmv.wmv moving.gif "
    "mpeg2.mxf vp8.ogg vp8.ivf ffv1.mkv zmbv.avi".split()
)
GOOD_FRAMES = 24


@cache
def bases() -> tuple[tuple[str, bytes], ...]:
    """(name, content) of the files to break: generated videos, and the small samples that are available."""
    with tempfile.TemporaryDirectory() as folder:
        made = [(name, build(Path(folder) / name).read_bytes()) for name, build in MADE.items()]
    there = [path for name in samples.names_below("videos") if (path := samples.VIDEOS / name).is_file()]
    small = [(p.name, p.read_bytes()) for p in there if p.stat().st_size <= MOST_BYTES]
    return tuple(made + small)


@cache
def n_frames(name: str) -> int:
    """How many frames the generated base file `name` has."""
    content = dict(bases())[name]
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


def only_cut(what: str) -> str:
    """The base file of a fuzzed file that was cut and not changed otherwise, if its container says where it ends."""
    name, *kinds = what.split("+")
    return name if name in TELLS and kinds == ["truncate"] else ""


def fuzzed(seed: int, index: int) -> tuple[str, bytes]:
    """(what was done, content) of one file: a base with one to three kinds of damage."""
    rng = random.Random(f"{seed}/{index}")
    name, content = rng.choice(bases()[: len(MADE)] if rng.random() < 0.5 else bases())
    done = [name]
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(list(KINDS))
        data = KINDS[kind](data, rng)
        done.append(kind)
    return "+".join(done), bytes(data)


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(1, len(data) + 1)]


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    early = rng.random() < 0.3  # headers are small, but damage in them has the most effect
    for _ in range(rng.choice((1, 3, 30, 200))):
        at = rng.randrange(min(len(data), 2000) if early else len(data))
        data[at] ^= 1 << rng.randrange(8)
    return data


def _overwrite(data: bytearray, rng: random.Random) -> bytearray:
    at, n_bytes = rng.randrange(len(data)), rng.choice((4, 64, 4096))
    fill = rng.choice((bytes(n_bytes), b"\xff" * n_bytes, rng.randbytes(n_bytes)))
    data[at : at + n_bytes] = fill[: len(data) - at]
    return data


def _cut_out(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 16, 1000, len(data) // 3))]
    return data or bytearray(b"\0")


def _repeat(data: bytearray, rng: random.Random) -> bytearray:
    at, n_bytes = rng.randrange(len(data)), rng.choice((8, 188, 5000))
    data[at:at] = data[at : at + n_bytes] * rng.choice((1, 2, 20))
    return data


BOXES = (
    "moov trak mdia stbl stsd stts ctts stsc stsz stco elst tkhd mvhd mdhd hdlr dref avcC moof traf trun tfhd mdat ftyp"
)


def _boxes(data: bytes) -> list[tuple[int, int]]:
    """[start, end) of everything that looks like an ISO box, at any depth."""
    found = []
    for name in BOXES.encode().split():
        at = data.find(name)
        if at >= 4:
            size = int.from_bytes(data[at - 4 : at], "big")
            if 8 <= size <= len(data) - at + 4:
                found.append((at - 4, at - 4 + size))
    return found


def _splice(data: bytearray, rng: random.Random) -> bytearray:
    """Insert a box of another file, or replace a box with it."""
    other = rng.choice(bases())[1]
    mine, theirs = _boxes(bytes(data)), _boxes(other)
    if not mine or not theirs:
        at, n_bytes = rng.randrange(len(data)), rng.randrange(1, 2000)
        data[at : at + n_bytes] = other[at % len(other) :][:n_bytes]
        return data
    start, end = rng.choice(mine)
    taken = slice(*rng.choice(theirs))
    data[start : rng.choice((start, end))] = other[taken]
    return data


def _lie(data: bytearray, rng: random.Random) -> bytearray:
    """Change the size of a box, or one of its first numbers."""
    boxes = _boxes(bytes(data))
    start, end = rng.choice(boxes) if boxes else (0, len(data))
    at = start + rng.choice((0, 8, 12, 16, 20, rng.randrange(max(1, end - start))))
    value = rng.choice((0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
    data[at : at + 4] = struct.pack(">I", value)
    return data


def _name_another(data: bytearray, rng: random.Random) -> bytearray:
    """Insert the name of another file, as a list or a reference would hold it."""
    lists = (f"#EXTM3U\n{DECOY}\n", f"ffconcat version 1.0\nfile '{DECOY}'\n", f"\0url \0\0\0\0file:{DECOY}\0")
    text = rng.choice(lists).encode()
    at = rng.choice((0, 0, rng.randrange(len(data))))
    data[at : at + rng.choice((0, len(text)))] = text
    return data


def _pad(data: bytearray, rng: random.Random) -> bytearray:
    """Append zeros or 0xFF, as recorders and copying programs do."""
    return data + rng.choice((b"\0", b"\xff")) * rng.choice((1, 100, 5000, 200_000))


def _message(data: bytearray, rng: random.Random) -> bytearray:
    """Insert a message of a random kind: an SEI unit of H.264 or HEVC, user data or an extension of MPEG-2 or MPEG-4,
    an AV1 metadata unit, or an application segment of a JPEG."""
    body = rng.randbytes(rng.randrange(1, 60))
    size = bytes([len(body)])
    kind = bytes([rng.randrange(255)])
    heads = (b"\x06" + kind + size, b"\x4e\x01" + kind + size, b"\xb2", b"\xb5" + kind)
    units = {
        b"\0\0\1": b"\0\0\1" + rng.choice(heads) + body,
        b"\x12\0": b"\x12\0\x2a" + bytes([len(body) + 1]) + kind + body,
        b"\xff\xd8": b"\xff\xd8\xff" + bytes([0xE0 + rng.randrange(16), 0, len(body) + 2]) + body,
    }
    start = rng.choice([start for start in units if start in data] or [b"\0\0\1"])
    places = [found.start() for found in re.finditer(re.escape(start), data)]
    if places:
        at = rng.choice(places)
        data[at : at + (0 if start == b"\0\0\1" else 2)] = units[start]
    return data


KINDS: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "truncate": _truncate,
    "flip": _flip,
    "overwrite": _overwrite,
    "cut_out": _cut_out,
    "repeat": _repeat,
    "splice": _splice,
    "lie": _lie,
    "name_another": _name_another,
    "pad": _pad,
    "message": _message,
}
