"""A process that decodes files one after another, like the decode task of a job.

stdin: one JSON line per file, {"path", "note", "index"}. stdout: `.` for each message of a decode, then its end as a
JSON line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np

from p3d.jobs.worker.decode_task import DecodeSpec, decode_video
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.sources.identity import stat_version
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, FrameBlock, FrameSpec, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

MEMORY_BYTES = 1 << 30


def spec_of(index: int) -> DecodeSpec:
    """The settings of one file, drawn by its index from all mixes of rules."""
    rng = random.Random(index)
    rule, fps = (
        rng.choice(("every:16", "every:40", "uniform:4", "spread:4", "uniform:2")),
        rng.choice((None, None, 12.0)),
    )
    clip_frames = 2 if rule == "uniform:2" else 16  # two clips of two frames, so whole GOPs are left out
    frames = rng.choice((FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160)), FrameSpec((112, 112), short_side=128)))
    policy = DecodePolicy(rng.choice(("auto", "auto", "pyav", "decord")), rng.choice(("fail", "keep")))  # type: ignore[arg-type]
    sampling = parse_sampling(rule, clip_frames=clip_frames, fps=fps)
    return DecodeSpec(frames, sampling, policy, DecodeLimits(), StoreOptions(), 1, 60.0, MEMORY_BYTES)


def good_spec() -> DecodeSpec:
    """The settings of a file that is known to be good, whose frames are checked."""
    frames, sampling = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160)), parse_sampling("every:16", clip_frames=16)
    return DecodeSpec(frames, sampling, DecodePolicy(), DecodeLimits(), StoreOptions(), 1, 60.0, MEMORY_BYTES)


def decode(path: Path, note: Path, index: int) -> dict[str, object]:
    """How the decode of a file ended, with a digest of its frames; for a good file (index -1) also their numbers."""
    status = path.stat()
    video = VideoRef("v", path.name, path.as_uri(), stat_version(status), status.st_size)
    end: VideoEnd | Failure | None = None
    frames: list[np.ndarray] = []
    n_ends, pixels = 0, hashlib.sha256()
    for message in decode_video(video, good_spec() if index < 0 else spec_of(index), note.parent, note):
        os.write(1, b".")
        if isinstance(message, VideoInfo):
            frames.clear()
            pixels = hashlib.sha256()
        elif isinstance(message, FrameBlock):
            pixels.update(message.numbers_N.tobytes() + message.frames_NHWC.tobytes())
            if index < 0:
                frames.append(message.frames_NHWC)
        elif isinstance(message, VideoEnd | Failure):
            end, n_ends = message, n_ends + 1
    assert end is not None and n_ends == 1, f"{n_ends} ends"
    if isinstance(end, Failure):
        return {"reason": str(end.reason), "detail": end.detail}
    return {
        "reason": "",
        "truncated": end.truncated,
        "n_frames": end.n_frames,
        "pixels": pixels.hexdigest(),
        "numbers": make.numbers_in(np.concatenate(frames)) if frames else [],
    }


def main() -> None:
    with contextlib.suppress(ImportError):
        import decord  # noqa: F401 - so that its libraries are not counted as files that a decode reads
    os.write(1, b'{"ready": true}\n')
    for line in sys.stdin:
        task = json.loads(line)
        ended = decode(Path(task["path"]), Path(task["note"]), task["index"])
        os.write(1, (json.dumps(ended) + "\n").encode())


if __name__ == "__main__":
    main()
