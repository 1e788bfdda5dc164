"""Frames per second of one core: each route of `open_frames` compared with raw loops by PyAV and decord.

    python -m bench.routes                          720p, 360p and 320x240 at GOP 12, 60 and 250, every:16
    python -m bench.routes --minutes 10 --clips uniform:20 --sizes 240x320
    python -m bench.routes --sizes 720x1280 --gops 50 --codecs h264,hevc,vp8,vp9,mpeg4,mjpeg
    python -m bench.routes --videos bikes.mp4 --clips every:50,every:48/3
    python -m bench.routes --quick                  two videos

One process on one core. The raw loops are the shortest that a user would write: container.decode + VideoReformatter
(bilinear) + to_ndarray, and get_batch of 64 with width and height, from front to back. They ignore damage, times,
memory and the choice of frames, and decode all frames whatever the clips are. So with sparse clips a route's share of
the better raw loop says how many times faster it is than decoding everything. Another arm is the usual loop for clips,
decord's get_batch of each clip's frames, which skips what it can. Seconds are CPU time of all threads of the process,
so other processes do not count. Longer videos repeat the packets of a video of --frames.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import av
import decord
from av.video.reformatter import Interpolation, VideoReformatter

from bench.inputs import sampling_of
from bench.rounds import Report, Rounds, Table, parser_of, per_second, take_turns
from p3d.pipeline.clips.rules import clip_spans, frame_numbers
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.errors import VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import corpus, make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(182, 242))
RAW = ("raw pyav", "raw decord")
ROUTES = ("decord", "pyav", "auto")


def raw_pyav(path: str, sampling: str) -> int:
    """All frames of a file, resized: the shortest PyAV loop."""
    height, width = SPEC.resize_hw or (0, 0)
    scaler, n_frames = VideoReformatter(), 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            form = {"format": "rgb24", "interpolation": Interpolation.BILINEAR, "threads": 1}
            n_frames += len(scaler.reformat(frame, width, height, **form).to_ndarray()) > 0
    return n_frames


def raw_decord(path: str, sampling: str) -> int:
    """All frames of a file, resized, 64 at a time: the shortest decord loop."""
    height, width = SPEC.resize_hw or (0, 0)
    reader = decord.VideoReader(path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
    starts = range(0, len(reader), 64)
    return sum(len(reader.get_batch(range(at, min(at + 64, len(reader)))).asnumpy()) for at in starts)


def decord_clips(path: str, sampling: str) -> int:
    """The frames of each clip, resized: decord decodes the frames between, or seeks to a key frame."""
    height, width = SPEC.resize_hw or (0, 0)
    reader = decord.VideoReader(path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
    clips = sampling_of(sampling, 16)
    numbers = [frame_numbers(clips, span, len(reader)) for span in clip_spans(clips, len(reader))]
    return sum(len(reader.get_batch(numbers_T).asnumpy()) for numbers_T in numbers)


def ours(decoder: str) -> Callable[[str, str], int]:
    def decode(path: str, sampling: str) -> int:
        messages = open_frames(path, SPEC, sampling_of(sampling, 16), policy=DecodePolicy(decoder=decoder))  # type: ignore[arg-type]
        return sum(len(message.frames_NHWC) for message in messages if isinstance(message, FrameBlock))

    return decode


ARMS: dict[str, Callable[[str, str], int]] = {
    "raw pyav": raw_pyav,
    "raw decord": raw_decord,
    "decord's clips": decord_clips,
    **{name: ours(name) for name in ROUTES},
}


def measured(path: Path, sampling: str, n_frames: int, n_rounds: int) -> Rounds:
    """All arms except those that refuse the file."""
    arms: dict[str, Callable[[], float]] = {}
    for name, work in ARMS.items():
        try:
            work(str(path), sampling)  # warm: libraries loaded, file in memory
        except VideoError as error:
            print(f"{path.name}, {name}: {error.detail}", file=sys.stderr)
        else:
            arms[name] = per_second(partial(work, str(path), sampling), n_frames, time.process_time)
    return take_turns(arms, n_rounds, "frames/s of one core", warm=False)


def made(given: argparse.Namespace, folder: Path, times: int) -> Iterator[tuple[str, Path]]:
    """(name, path) of a video of each size, GOP and codec, one at a time, unless videos were given."""
    for size in [] if given.videos else given.sizes.split(","):
        height, width = map(int, size.split("x"))
        for gop in map(int, given.gops.split(",")):
            for name in given.codecs.split(","):
                codec = corpus.CODECS[name]
                clip = corpus.film(folder / f"clip{codec.suffix}", (height, width), given.frames, gop, codec)
                long = make.looped(clip, folder / f"long{codec.suffix}", times)
                yield f"{name} {width}x{height}, GOP {gop}", long


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="length of a video at 25 frames/s (default: --frames)"
    )
    parser.add_argument("--gops", default="12,60,250")
    parser.add_argument("--sizes", default="720x1280,360x640,240x320", help="height x width, separated by commas")
    parser.add_argument("--codecs", default="h264", help=f"of {', '.join(corpus.CODECS)}; separated by commas")
    parser.add_argument("--clips", default="every:16", help="rules, separated by commas; /STEP for a frame step")
    parser.add_argument("--videos", nargs="+", type=Path, default=[], help="measure these instead of generated ones")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.frames, given.gops, given.sizes = 300, "12,250", "240x320"
    times = max(1, round(given.minutes * 60 * 25 / given.frames))
    os.sched_setaffinity(0, {given.core})
    report = Report("routes", "Decode routes compared with raw loops, one core")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in chain(((path.name, path) for path in given.videos), made(given, Path(folder), times)):
            n_frames = probe(str(path.absolute()), DecodeLimits()).n_frames
            for sampling in given.clips.split(","):
                found = measured(path.absolute(), sampling, n_frames, given.rounds)
                best = max(RAW, key=lambda name: found.spread(name).median)
                heading = f"{name}, {sampling}"
                report.add(found.table(heading, best))
                shares = [str(found.ratio(route, best)) if route in found.of else "refused" for route in ROUTES]
                clips = str(found.ratio("auto", "decord's clips"))
                rows.append((heading, *(str(found.spread(name)) for name in RAW), *shares, clips))
    columns = ("video", *(f"{name}, frames/s" for name in RAW), *(f"{name} over the better" for name in ROUTES))
    columns = (*columns, "auto over decord's clips")
    report.add(Table("Each route over the better raw loop", columns, tuple(rows)))
    print(report.write(given.out), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
