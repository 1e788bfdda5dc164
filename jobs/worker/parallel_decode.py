"""When several decodes share a long video, and how their messages become those of one. No Ray here.

    one decode ──slots are free, it is the slow side, much is left──> stopped where its reader is
    n decodes, each every n-th stripe from there on (`decode.gop_chunks`) ──Shared──> the same messages in order

Nothing is judged here: whatever goes wrong in a share, the video is decoded whole from its start, by the rules for any
other. So sharing can change how long a video takes, and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from p3d.pipeline.types import ChunkEnd, DecodeMessage, FrameBlock, VideoEnd, VideoFetched, VideoInfo, VideoStart

BELIEVED_S = 1.0  # of decoding, before its speed is believed
# What must be left of a video, in seconds at its present speed. Sharing it costs a second or two: the processes start,
# each looks at the whole file again, and what was decoded ahead is thrown away. Two decodes save half of this at best.
WORTH_S = 8.0


class Unlike(Exception):
    """A share sent what a decode of the whole video would not have sent."""


@dataclass(slots=True)
class Pace:
    """How fast a video comes: frame `last` of its `n_frames` has been reached from `first` on, since `since`."""

    n_frames: int
    since: float  # monotonic seconds
    first: int = 0
    last: int = -1
    waited_s: float = 0.0  # by the reader

    def left_s(self, now: float) -> float:
        """Seconds of decoding that are left; 0.0 as long as it is too early to say, or where the reader is slower.

        A reader that waits less than half of the time would gain little, and its network may need the processors.
        """
        took_s = now - self.since
        if took_s < BELIEVED_S or self.waited_s < took_s / 2 or self.last < self.first:
            return 0.0
        return took_s * (self.n_frames - 1 - self.last) / (self.last + 1 - self.first)


@dataclass(slots=True)
class Shared:
    """The decodes that share a video. They are read in turn, the one that is first in `decodes` until its StripeEnd."""

    info: VideoInfo
    last: int  # number of the last frame that was passed on
    decodes: deque[Any]
    end: VideoEnd | None = field(default=None, init=False)
    ended: bool = field(default=False, init=False)  # has the first one sent its VideoEnd?

    def take(self, message: DecodeMessage) -> FrameBlock | None:
        """What becomes of a message of the first decode; Unlike if it does not fit."""
        match message:
            case _ if self.ended:
                raise Unlike(f"{type(message).__name__} after the end")
            case VideoStart() | VideoFetched():
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
                raise Unlike(type(message).__name__)
        return None

    def drop_first(self) -> VideoEnd | None:
        """The first decode is over. The end of the video, if it was the last one; Unlike if it stopped half way."""
        if not self.ended:
            raise Unlike("no end")
        self.decodes.popleft()
        self.ended = False
        return None if self.decodes else self.end
