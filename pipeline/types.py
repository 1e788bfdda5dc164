"""The records that pass between functions: frozen, slotted, checked where they are made.

    VideoRef ──decode──> VideoStart, VideoFetched, VideoInfo, FrameBlock ..., VideoEnd | Failure ──extract──> ShardRows

A decode that only takes its share of a long video (`decode.gop_chunks`) sends StripeEnds between its FrameBlocks.

Frame numbers count presentable frames from 0. Intervals are [start, end). Seconds count from the first presentable
frame of the video stream. Arrays carry their shape: N frames, H height, W width, C = 3 channels (R, G, B).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from p3d.pipeline.errors import Reason

UINT8 = npt.NDArray[np.uint8]
INT64 = npt.NDArray[np.int64]
FLOAT32 = npt.NDArray[np.float32]
FLOAT64 = npt.NDArray[np.float64]
BOOL = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class VideoRef:
    """One row of the manifest: which video, and how to prove it is still the one that was planned.

    `uri` is `file:///...` or `s3://bucket/key`, percent-encoded, so that any bytes in a name survive. `path` is for
    people: relative to the source's root, bytes that are not UTF-8 shown as \\xNN. `size_bytes` is -1 where the file
    was not there when the job was planned.
    """

    video_id: str
    path: str
    uri: str
    version: str
    size_bytes: int
    mtime_ns: int | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """How a decoded picture becomes the uint8 frame that travels: resize (bilinear), then centre crop.

    Exactly one of `resize_hw` (height, width; the aspect ratio is not kept) and `short_side` (aspect kept, the long
    side rounded up) is set.
    """

    crop_hw: tuple[int, int]
    resize_hw: tuple[int, int] | None = None
    short_side: int | None = None

    def __post_init__(self) -> None:
        if (self.resize_hw is None) == (self.short_side is None):
            raise ValueError(f"one of resize_hw and short_side, not {self.resize_hw = } and {self.short_side = }")
        smallest = self.resize_hw or (self.short_side or 0, self.short_side or 0)
        if min(self.crop_hw) < 1 or smallest[0] < self.crop_hw[0] or smallest[1] < self.crop_hw[1]:
            raise ValueError(f"crop {self.crop_hw} does not fit into a picture of {smallest}")

    def target_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize of a picture that is shown as height x width."""
        if self.resize_hw is not None:
            return self.resize_hw
        assert self.short_side is not None  # __post_init__
        short = min(height, width)
        return -(-height * self.short_side // short), -(-width * self.short_side // short)

    def cropped(self, frames_HWC: UINT8) -> UINT8:
        """The centre of a frame [H, W, 3], or of each of [N, H, W, 3], as a view."""
        height, width = frames_HWC.shape[-3:-1]
        top, left = (height - self.crop_hw[0]) // 2, (width - self.crop_hw[1]) // 2
        return frames_HWC[..., top : top + self.crop_hw[0], left : left + self.crop_hw[1], :]

    def crop(self, frames_NHWC: UINT8) -> UINT8:
        """The centre of each frame, [N, crop_h, crop_w, 3], contiguous."""
        return np.ascontiguousarray(self.cropped(frames_NHWC))


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a probe found, sent before the first frame. A second one for the same video means: start again.

    `n_frames` is what the container promises (packets minus discarded ones); `VideoEnd.n_frames` is the truth.
    `width`, `height` are as shown, after rotation, in pixels as stored (not stretched by the pixel aspect); `rotation`
    is the one that was applied, degrees clockwise. `fps` is the video's own average; `resampled_fps` that of `--fps`.
    `claimed_frames` is the container's own count, discarded frames and all; None where it has none.
    """

    n_frames: int
    width: int
    height: int
    rotation: int
    fps: float
    duration_s: float
    container: str
    codec: str
    stream_index: int
    route: str
    resampled_fps: float | None = None
    claimed_frames: int | None = None


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """A run of decoded frames, in order: their numbers, times [start, end) in seconds, and pixels (RGB)."""

    numbers_N: INT64
    start_s_N: FLOAT64
    end_s_N: FLOAT64
    frames_NHWC: UINT8

    def __post_init__(self) -> None:
        lengths = {len(self.numbers_N), len(self.start_s_N), len(self.end_s_N), len(self.frames_NHWC)}
        if len(lengths) != 1 or self.frames_NHWC.ndim != 4 or self.frames_NHWC.dtype != np.uint8:
            raise ValueError(f"{lengths = } must agree; frames are {self.frames_NHWC.shape} {self.frames_NHWC.dtype}")


@dataclass(frozen=True, slots=True)
class VideoEnd:
    """The last message of a video that could be read: how many frames it really had, and how long it is in seconds.

    `truncated` marks a video of which only the frames before the damage were used (`--partial keep`).
    `resampled_frames` counts the ticks that the clips were laid over, with `--fps`.
    """

    n_frames: int
    duration_s: float
    truncated: bool = False
    resampled_frames: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """One video that has no rows, and why. `attempts` counts the decodes that were started."""

    reason: Reason
    detail: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class VideoStart:
    """The very first message: a process has begun on the video. Deadlines run from here, not from the queue."""

    pid: int


@dataclass(frozen=True, slots=True)
class VideoFetched:
    """A local copy of the video is there: what comes next needs a processor, what came before a network."""


@dataclass(frozen=True, slots=True)
class VideoShareable:
    """After a VideoInfo: several decodes may share this video, and give together what this one would give."""


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """A decode of a share has sent a stripe of its video; the next one is with the next decode."""


DecodeMessage = VideoStart | VideoFetched | VideoInfo | VideoShareable | FrameBlock | ChunkEnd | VideoEnd | Failure


@dataclass(frozen=True, slots=True)
class ClipSpan:
    """One clip: frames [start_frame, end_frame), with `--fps` ticks; its last also stands in for `n_padded` others."""

    index: int
    start_frame: int
    end_frame: int
    n_padded: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A fixed run of manifest rows: the unit of work, of commit and of resume."""

    plan_seq: int
    plan8: str
    shard: int
    videos: tuple[VideoRef, ...]

    @property
    def name(self) -> str:
        """`<plan8>-<shard, 9 digits>`: the stem of the shard's three objects."""
        return f"{self.plan8}-{self.shard:09d}"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as plain values: Ray's pickler calls Python several times for each record, for every shard given."""
        return _shard_of, (self.plan_seq, self.plan8, self.shard, [*map(_values_of, self.videos)])


_values_of = attrgetter(*VideoRef.__slots__)


def _shard_of(plan_seq: int, plan8: str, shard: int, videos: list[tuple[Any, ...]]) -> ShardPlan:
    return ShardPlan(plan_seq, plan8, shard, tuple(VideoRef(*values) for values in videos))


@dataclass(frozen=True, slots=True)
class VideoOutcome:
    """What became of one video of a shard: `info` and `end` when it has rows, `failure` when it has none."""

    video: VideoRef
    n_clips: int = 0
    info: VideoInfo | None = None
    end: VideoEnd | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.failure is None) == (self.info is None or self.end is None):
            raise ValueError(f"{self.video.video_id}: an outcome is rows or a failure, not both and not neither")


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One row of `clips/` without its features."""

    video_id: str
    path: str
    span: ClipSpan
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class ShardRows:
    """Everything one shard computed, in manifest order: R clip rows with features and class scores, and V outcomes.

    K is 0 where the job stores no scores.
    """

    shard: ShardPlan
    outcomes: tuple[VideoOutcome, ...]
    clips: tuple[ClipRow, ...]
    features_RD: FLOAT32
    probs_RK: FLOAT32
    stats: dict[str, float] = field(default_factory=dict)
