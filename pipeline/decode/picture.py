"""One decoded picture -> the pixels that are sent on: turned upright, resized (bilinear), cropped, RGB uint8.

H, W, C: height, width, 3 channels (R, G, B). Turning comes before resizing, as in a player. The resize goes
through FFmpeg's `scale` filter with the chroma sample position named: the result is then bit for bit what decord's own
filter graph gives (measured over h264, hevc, vp8 and vp9, both ranges, turned and upright: largest difference 0).
PyAV's `frame.reformat` follows the chroma position written in the stream, which decord does not, and differs by up to
34 of 255 at sharp colour edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideData

from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import UINT8, FrameSpec


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a coded picture is shown: transposed first, then rows and columns reversed.

    Covers the eight orientations that a display matrix with right angles can give. `degrees` is the clockwise turn.
    """

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    @property
    def degrees(self) -> int:
        """0, 90, 180 or 270 clockwise; of a mirrored picture, the turn that follows its horizontal mirror image."""
        if self.transposed:
            return 90 if self.columns_reversed else 270
        return 180 if self.rows_reversed else 0

    def shown_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size as shown of a picture coded as height x width. The function is its own inverse."""
        return (width, height) if self.transposed else (height, width)

    @property
    def mirrored(self) -> bool:
        """True if the picture is mirrored, whether or not it is turned."""
        return self.transposed == (self.rows_reversed == self.columns_reversed)

    @property
    def filters(self) -> tuple[tuple[str, str | None], ...]:
        """The FFmpeg filters (name, arguments) that give a coded picture this orientation."""
        if self.transposed:
            directions = {
                (False, False): "cclock_flip",
                (False, True): "clock",
                (True, False): "cclock",
                (True, True): "clock_flip",
            }
            return (("transpose", f"dir={directions[self.rows_reversed, self.columns_reversed]}"),)
        turns = (("hflip", self.columns_reversed), ("vflip", self.rows_reversed))
        return tuple((name, None) for name, needed in turns if needed)


UPRIGHT = Orientation()


def orientation(frame: av.VideoFrame) -> Orientation:
    """What the display matrix of a frame says (ISO/IEC 14496-12, 8.5.2.3: x' = a x + c y, y' = b x + d y).

    Upright if there is no matrix, if it is degenerate (all zero in mp4parse's no_timescale.mp4), or if it turns by
    anything but right angles, as in players.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if isinstance(matrix, SideData):
        a, b, _, c, d = (int(x) for x in np.frombuffer(bytes(matrix), np.int32)[:5])
        if a and d and not b and not c:
            return Orientation(False, d < 0, a < 0)
        if b and c and not a and not d:
            return Orientation(True, b < 0, c < 0)
    return UPRIGHT


class Scaler:
    """Resizes decoded frames to one size, whatever size and pixel format each of them has.

    The target is fixed by the first picture, so a stream that changes its resolution midway keeps one frame shape
    (decord does the same). VideoError(unsupported) for a pixel format that FFmpeg cannot convert.
    """

    def __init__(self, spec: FrameSpec, shown_hw: tuple[int, int], turn: Orientation) -> None:
        self._spec = spec
        self._turn = turn
        self._target_hw = spec.target_hw(*shown_hw)
        self._input: tuple[int, int, str] | None = None
        self._graph: Graph
        self._ends: tuple[FilterContext, FilterContext]

    def picture(self, frame: av.VideoFrame) -> UINT8:
        """[crop_h, crop_w, 3] uint8, a view of FFmpeg's own picture; copy it to keep it."""
        form = (frame.width, frame.height, frame.format.name)
        if form != self._input:
            self._build(frame)
            self._input = form
        source, sink = self._ends
        source.push(frame)
        scaled = sink.pull()
        assert isinstance(scaled, av.VideoFrame)  # the graph holds no audio filter
        (plane,) = scaled.planes
        shape, strides = (scaled.height, scaled.width, 3), (plane.line_size, 3, 1)
        return self._spec.cropped(np.ndarray(shape, np.uint8, memoryview(plane), strides=strides))

    def _build(self, frame: av.VideoFrame) -> None:
        height, width = self._target_hw
        graph = Graph()
        graph.threads = 1
        time_base = frame.time_base or Fraction(1, 1000)  # has no effect here, and a drained frame may lack one
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
        turn = [graph.add(name, arguments) for name, arguments in self._turn.filters]
        scale = graph.add("scale", f"w={width}:h={height}:flags=bilinear:in_chroma_loc=center")
        rgb = graph.add("format", "pix_fmts=rgb24")
        sink = graph.add("buffersink")
        try:
            graph.link_nodes(source, *turn, scale, rgb, sink).configure()
        except (av.error.ArgumentError, av.error.NotImplementedError) as error:
            detail = f"FFmpeg cannot convert {frame.width}x{frame.height} {frame.format.name} pictures to RGB"
            raise VideoError(Reason.UNSUPPORTED, detail) from error
        self._graph, self._ends = graph, (source, sink)
