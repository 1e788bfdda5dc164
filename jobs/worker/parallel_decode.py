"""When several decodes share a long video, and how their messages become those of one decode. Does not use Ray.

    one decode ──cores are free, it is the bottleneck, much is left──> stopped at the position of its reader
    n decodes, each with every n-th GOP chunk from there (`decode.gop_chunks`) ──Shared──> the same messages in order

A failure of a share is never attributed to the video. The video is then decoded whole from its start, by the usual
rules. So sharing can change how long a video takes, and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from p3d.pipeline.types import (
    ChunkEnd,
    DecodeMessage,
    FrameBlock,
    VideoAlive,
    VideoEnd,
    VideoFetched,
    VideoInfo,
    VideoStart,
)

BELIEVED_S = 1.0  # of decoding, before its speed counts as known
# What must be left of a video, in seconds at its current speed. Sharing costs a second or two: the processes start,
# each probes the whole file again, and frames decoded ahead are discarded. Two decodes save half of this at best.
WORTH_S = 8.0


class UnexpectedMessage(Exception):
    """A share sent what a decode of the whole video would not have sent."""


@dataclass(slots=True)
class Pace:
    """The speed of a decode: it has gone from frame `first` to frame `last` of `n_frames` since the time `since`."""

    n_frames: int
    since: float  # monotonic seconds
    first: int = 0
    last: int = -1
    waited_s: float = 0.0  # by the reader

    def left_s(self, now: float) -> float:
        """Estimated seconds of decoding that are left; 0.0 while it is too early to say, or if the reader is slower.

        A reader that waits less than half of the time would gain little, and inference may need the cores.
        """
        took_s = now - self.since
        if took_s < BELIEVED_S or self.waited_s < took_s / 2 or self.last < self.first:
            return 0.0
        return took_s * (self.n_frames - 1 - self.last) / (self.last + 1 - self.first)


@dataclass(slots=True)
class Shared:
    """The decodes that share a video. The first one in `decodes` is read until its ChunkEnd, then the next."""

    info: VideoInfo
    last: int  # number of the last frame that was passed to the reader
    decodes: deque[Any]
    end: VideoEnd | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)  # has the first one sent its VideoEnd?

    def take(self, message: DecodeMessage) -> FrameBlock | None:
        """Handle a message of the first decode, and return its frames, if any. UnexpectedMessage if it does not fit."""
        match message:
            case _ if self.ended:
                raise UnexpectedMessage(f"{type(message).__name__} after the end")
            case VideoStart() | VideoFetched() | VideoAlive():
                pass
            case VideoInfo() if message == self.info:
                pass
            case FrameBlock() if not len(message.numbers_N) or message.numbers_N[0] > self.last:
                self.last = int(message.numbers_N[-1]) if len(message.numbers_N) else self.last
                return message
            case ChunkEnd():
                self.decodes.rotate(-1)
            case VideoEnd() if self.end in (None, message):
                self.end, self.ended = message, True
            case _:
                raise UnexpectedMessage(type(message).__name__)
        return None

    def drop_first(self) -> VideoEnd | None:
        """Remove the first decode, which is over. Returns the end of the video if it was the last decode.

        UnexpectedMessage if it stopped before its VideoEnd.
        """
        if not self.ended:
            raise UnexpectedMessage("no end")
        self.decodes.popleft()
        self.ended = False
        return None if self.decodes else self.end
