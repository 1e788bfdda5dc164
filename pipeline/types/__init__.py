"""The records that functions exchange: frozen dataclasses, checked when they are created.

    VideoRef ──decode──> VideoStart, VideoFetched, VideoInfo, FrameBlock ..., VideoEnd | Failure ──extract──> ShardRows

A decode that sends nothing else for long, because its video is large, sends VideoAlive.

A decode that takes only its share of a long video (`decode.gop_chunks`) sends ChunkEnds between its FrameBlocks.

Frame numbers count presentable frames from 0. Intervals are [start, end). Seconds count from the first presentable
frame of the video stream. Arrays carry their shape: N frames, H height, W width, C = 3 channels (R, G, B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
    """One row of the manifest: which video, and how to check that it is still the one that was planned.

    `uri` is `file:///...` or `s3://bucket/key`, percent-encoded so that any bytes in a name are kept. `path` is for
    display: relative to the source's root, bytes that are not UTF-8 shown as \\xNN. `size_bytes` is -1 if the file
    did not exist when the job was planned. `mtime_ns` is None if it is not known, or too far away for 64 bits.
    """

    video_id: str
    path: str
    uri: str
    version: str
    size_bytes: int
    mtime_ns: int | None = None
    etag: str | None = None


def size_version(size_bytes: int) -> str:
    """What stands for the version of a moved video of which only the size was compared (`p3d.pipeline.dataset.roots`).

    It is never stored.
    """
    return f"size:{size_bytes}"


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """How a decoded picture becomes the uint8 frame of a FrameBlock: resize (bilinear), then centre crop.

    Exactly one of `resize_hw` (height, width; the aspect ratio is not kept) and `short_side` (aspect kept, the long
    side rounded up) is set.
    """

    crop_hw: tuple[int, int]
    resize_hw: tuple[int, int] | None = None
    short_side: int | None = None

    def __post_init__(self) -> None:
        if (self.resize_hw is None) == (self.short_side is None):
            raise ValueError(f"set one of resize_hw and short_side: {self.resize_hw = }, {self.short_side = }")
        smallest = self.resize_hw or (self.short_side or 0, self.short_side or 0)
        if min(self.crop_hw) < 1 or smallest[0] < self.crop_hw[0] or smallest[1] < self.crop_hw[1]:
            raise ValueError(f"crop {self.crop_hw} does not fit into a picture of {smallest}")

    def target_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) after the resize of a picture that is displayed as height x width."""
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
    """What a probe found, sent before the first frame. A second one for the same video restarts it.

    `n_frames` is what the container declares (packets minus discarded ones); `VideoEnd.n_frames` is the true count.
    `width` and `height` are as displayed, after rotation, in stored pixels (not stretched by the pixel aspect ratio).
    `rotation` is what was applied, in degrees clockwise. `fps` is the video's own rate, `resampled_fps` is `--fps`.
    `fps_estimated` is True if `fps` is that of the frames' times, because the file states another rate. `stream_why`
    says why `stream_index` was chosen, if the file has several video streams.
    `claimed_frames` is the container's own count, including discarded frames; None if it has no count.
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
    fps_estimated: bool = False
    stream_why: str | None = None


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """Decoded frames in order: their numbers, times [start, end) in seconds, and pixels (RGB)."""

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
    """The last message of a video that could be read: its true number of frames, and its duration in seconds.

    `truncated` marks a video whose frames were used only up to the damage (`--partial keep`).
    `resampled_frames` counts the ticks from which the clips were taken, with `--fps`.
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
    """The very first message: a process has started on the video. Deadlines count from here, not from queueing."""

    pid: int


@dataclass(frozen=True, slots=True)
class VideoFetched:
    """A local copy of the video exists: from here on the decode needs a CPU, before it needed the network."""


@dataclass(frozen=True, slots=True)
class VideoAlive:
    """The decode makes progress, although it has sent nothing else for some time: it fetches or opens a large video."""


@dataclass(frozen=True, slots=True)
class VideoShareable:
    """After a VideoInfo: several decodes may share this video, and together return what this one would return."""


@dataclass(frozen=True, slots=True)
class ChunkEnd:
    """A decode of a share has sent one GOP chunk of its video; the next decode has the next chunk."""


DecodeMessage = (
    VideoStart | VideoFetched | VideoAlive | VideoInfo | VideoShareable | FrameBlock | ChunkEnd | VideoEnd | Failure
)


@dataclass(frozen=True, slots=True)
class ClipSpan:
    """One clip: frames (with `--fps`, ticks) [start_frame, end_frame); the last is repeated `n_padded` times."""

    index: int
    start_frame: int
    end_frame: int
    n_padded: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A fixed range of manifest rows: the unit of work, of commit and of resume."""

    plan_seq: int
    plan8: str
    shard: int
    videos: tuple[VideoRef, ...]

    @property
    def name(self) -> str:
        """The stem of the shard's three objects."""
        return shard_name(self.plan8, self.shard)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle plain values: Ray's pickler calls Python several times per record, for every shard assigned."""
        return _shard_of, (self.plan_seq, self.plan8, self.shard, [*map(_values_of, self.videos)])


_values_of = attrgetter(*VideoRef.__slots__)


def shard_name(plan8: str, shard: int) -> str:
    """`<plan8>-<shard, 9 digits>`: the first 8 digits of the plan's digest, and the shard's position in the plan."""
    return f"{plan8}-{shard:09d}"


def parse_shard_name(name: str) -> tuple[str, int]:
    """(plan8, shard) of a `shard_name`."""
    plan8, _, shard = name.partition("-")
    return plan8, int(shard)


def _shard_of(plan_seq: int, plan8: str, shard: int, videos: list[tuple[Any, ...]]) -> ShardPlan:
    return ShardPlan(plan_seq, plan8, shard, tuple(VideoRef(*values) for values in videos))


@dataclass(frozen=True, slots=True)
class VideoOutcome:
    """The outcome of one video of a shard: `info` and `end` if it has rows, `failure` if it does not."""

    video: VideoRef
    n_clips: int = 0
    info: VideoInfo | None = None
    end: VideoEnd | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.failure is None) == (self.info is None or self.end is None):
            raise ValueError(f"{self.video.video_id}: an outcome is either rows or a failure")


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
    """Everything computed for one shard, in manifest order: R clip rows with features and class scores, V outcomes.

    K is 0 if the job stores no scores.
    """

    shard: ShardPlan
    outcomes: tuple[VideoOutcome, ...]
    clips: tuple[ClipRow, ...]
    features_RD: FLOAT32
    probs_RK: FLOAT32
    stats: dict[str, float] = field(default_factory=dict)


Record = TypeVar("Record")


def checked(records: Sequence[Record]) -> Sequence[Record]:
    """Records of one type that were made from somebody's JSON, if each value is of its field's type.

    Otherwise TypeError. OverflowError for an integer of more than 64 bits. What is in a nested record is checked where
    that is made.
    """
    if records:
        kind: type = type(records[0])
        names = types_of(kind)
        found = zip(*map(attrgetter(*names), records), strict=True)
        checked_columns(kind, dict(zip(names, found, strict=True)))
    return records


def checked_columns(kind: type, columns: Mapping[str, Sequence[Any]]) -> None:
    """`checked` for the values of each field of a record: a third of the time of one value after another."""
    kinds = types_of(kind)
    for name, column in columns.items():
        found = set(map(type, column))
        if not found <= kinds[name]:
            raise TypeError(f"a {kind.__name__} holds a value of another type")
        if int in found:
            numbers = column if len(found) == 1 else [one for one in column if type(one) is int]
            if not (min(numbers) >= -(2**63) and max(numbers) < 2**63):
                raise OverflowError(f"a {kind.__name__} holds a number of more than 64 bits")


@cache
def types_of(record: type) -> dict[str, frozenset[type]]:
    """The types that the value of each field of a record may have; an integer may stand for a float."""
    found = {}
    for name, hint in get_type_hints(record).items():
        every = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = {str if get_origin(one) is Literal else get_origin(one) or one for one in every}  # literals are texts
        found[name] = frozenset(kinds | ({int} if float in kinds else set()))
    return found
