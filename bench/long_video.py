"""One long video decoded by one task and shared by several: seconds, and whether every bit is the same.

    python bench/long_video.py                      40 000 frames of 320x240, 1 against 2 tasks, 5 rounds
    python bench/long_video.py --frames 12000 --hw 720x1280 --rounds 3
    python bench/long_video.py --frames 12000 --sleep 0.1 --tasks 1 2 4     each block takes 0.1 s more, without a core

The decodes are those of a job (`worker.decoding`, a Ray of our own); their reader only counts, so decoding is the slow
side. A round has every number of tasks once, in an order that turns with the round; the ratio is the median over the
rounds of what one round says. A minute of video is encoded once and then remuxed in a loop. Predicted for 2 tasks on 2
idle cores: 1.7, because the reader takes part of a core, and some two seconds go by before both decode; for few seconds
of decoding, 1.0, because the video is not shared. Asleep, a decode needs no core, so this shows how well the decodes
keep out of each other's way on a machine of any load: 1.8 for 2 tasks and 3 for 4.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from p3d.jobs.scheduler.cluster import local_cluster  # noqa: E402
from p3d.jobs.worker import decoding  # noqa: E402 - after the path
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD, DecodeSpec, decode_video  # noqa: E402
from p3d.jobs.worker.decoding import Decoding  # noqa: E402
from p3d.pipeline.clips.rules import parse_sampling  # noqa: E402
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy  # noqa: E402
from p3d.pipeline.sources.identity import local_row  # noqa: E402
from p3d.pipeline.storage.store import DEFAULTS  # noqa: E402
from p3d.pipeline.types import DecodeMessage, FrameBlock, FrameSpec, ShardPlan, VideoEnd, VideoInfo  # noqa: E402

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(182, 242))
ENCODED = 1500  # frames
Checksums = tuple[int, ...]  # of each kind over all blocks, however the frames were cut into them


def make_video(path: Path, hw: tuple[int, int], gop: int, n_frames: int) -> None:
    """A texture that drifts: some frames of it encoded (x264, closed GOPs), and their packets muxed again and again."""
    height, width = hw
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (height // 8 + 64, width // 8 + 64), np.uint8), np.ones((8, 8), np.uint8))
    n_encoded = ENCODED // gop * gop
    with av.open(str(path.with_suffix(".part.mp4")), "w") as output:
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0"
        stream = output.add_stream(
            "libx264", rate=25, options={"preset": "veryfast", "crf": "30", "x264-params": params}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(n_encoded):
            y, x = number * 2 % 256, number * 3 % 256
            picture = np.full((height * 3 // 2, width), 128, np.uint8)
            picture[:height] = texture[y : y + height, x : x + width]
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with av.open(str(path.with_suffix(".part.mp4"))) as source, av.open(str(path), "w") as output:
        original = source.streams.video[0]
        assert original.time_base is not None
        copy = output.add_stream_from_template(original)
        lasts = round(n_encoded / 25 / original.time_base)
        for loop in range(-(-n_frames // n_encoded)):
            source.seek(0, stream=original)
            for packet in source.demux(original):
                if packet.size:
                    assert packet.pts is not None and packet.dts is not None
                    packet.pts, packet.dts, packet.stream = packet.pts + loop * lasts, packet.dts + loop * lasts, copy
                    output.mux(packet)


def decode(shard: ShardPlan, clips: str, n_tasks: int, scratch: Path) -> tuple[float, int, Checksums, int]:
    """Seconds, frames, checksums of numbers, times, pixels and end, and how many processes decoded at once."""
    sampling = parse_sampling(clips, clip_frames=16)
    spec = DecodeSpec(SPEC, sampling, DecodePolicy(), DecodeLimits(), DEFAULTS, n_tasks, 300.0)
    decodes, begun = Decoding(shard, spec, scratch), time.monotonic()
    n_frames, checksums, most = 0, (0, 0, 0, 0), 0
    for _, message in decodes.messages():
        most = max(most, len(decodes.streams))
        match message:
            case VideoInfo():
                n_frames, checksums = 0, (0, 0, 0, 0)
            case FrameBlock():
                n_frames += len(message.numbers_N)
                arrays = (message.numbers_N, message.start_s_N, message.end_s_N, message.frames_NHWC)
                checksums = tuple(map(zlib.crc32, map(np.ascontiguousarray, arrays), checksums))
            case VideoEnd():
                checksums = (*checksums, zlib.crc32(repr(message).encode()))
    return time.monotonic() - begun, n_frames, checksums, most


def sleep_over_blocks(sleep_s: float) -> None:
    """Let each decode take so much longer over each of its blocks."""

    def decode(*task: Any) -> Iterator[DecodeMessage]:
        for message in decode_video(*task):
            if isinstance(message, FrameBlock):
                time.sleep(sleep_s)
            yield message

    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": BLOCKS_AHEAD}
    decoding._decode_video = ray.remote(num_cpus=1, max_retries=0, **options)(decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40_000)
    parser.add_argument("--hw", default="240x320")
    parser.add_argument("--gop", type=int, default=60)
    parser.add_argument("--clips", default="every:16")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sleep", type=float, default=0.0)
    given = parser.parse_args()
    if given.sleep:
        sleep_over_blocks(given.sleep)
    height, width = map(int, given.hw.split("x"))
    took_s: dict[int, list[float]] = defaultdict(list)
    seen = set[Checksums]()
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder) / "long.mp4", Path(folder) / "scratch"
        scratch.mkdir()
        make_video(path, (height, width), given.gop, given.frames)
        shard = ShardPlan(1, "0" * 8, 0, (local_row(path.parent, os.fsencode(path.name)),))
        print(f"{path.stat().st_size >> 20} MiB, GOP {given.gop}, {given.clips}")
        with local_cluster():
            print(f"load of the machine: {os.getloadavg()[0]:.1f}")
            decode(shard, given.clips, max(given.tasks), scratch)  # warm
            for number in range(given.rounds):
                turn = number % len(given.tasks)
                for n_tasks in given.tasks[turn:] + given.tasks[:turn]:
                    seconds, n_frames, checksums, most = decode(shard, given.clips, n_tasks, scratch)
                    took_s[n_tasks].append(seconds)
                    seen.add(checksums)
                    print(f"  {n_tasks} tasks: {seconds:6.2f} s, {n_frames} frames, at most {most} decodes at once")
    first = took_s[given.tasks[0]]
    for n_tasks, all_s in took_s.items():
        ratios = sorted(one / other for one, other in zip(first, all_s, strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{n_tasks} tasks: {statistics.median(all_s):.2f} s, ratio {statistics.median(ratios):.2f} ({spread})")
    print("every bit the same" if len(seen) == 1 else f"DIFFERENT: {seen}")


if __name__ == "__main__":
    main()
