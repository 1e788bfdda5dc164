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
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType

from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import UINT8, FrameSpec

UNSPECIFIED = 2  # matrix, primaries and transfer curve of a stream that says nothing (ITU-T H.273)
# Matrices of H.273 that FFmpeg's scaler cannot convert to RGB.
UNSUPPORTED_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    12: "derived from its primaries",
    13: "derived from its primaries, with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
CONVERTED_MATRICES = frozenset((1, 4, 5, 6, 7, 9))
_HIGHEST_RANGE = 2


def _unnamed_side_data(kind: type[SideDataType], value: object) -> SideDataType:
    """A member for side data that FFmpeg knows and PyAV does not, such as the view of a stereo video."""
    member: Any = object.__new__(kind)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    unnamed: SideDataType = member
    return unnamed


# PyAV (18.1) builds a table of all side data of a frame to look up one kind, and fails on a kind that it cannot name:
# the EXIF data of a JPEG, the view of a spatial video, LCEVC. With this hook it gets a name for each.
SideDataType._missing_ = classmethod(_unnamed_side_data)  # type: ignore[assignment, method-assign]


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
        self._input: tuple[int, int, str, int, int] | None = None
        self._graph: Graph
        self._ends: tuple[FilterContext, FilterContext]

    def picture(self, frame: av.VideoFrame) -> UINT8:
        """[crop_h, crop_w, 3] uint8, a view of FFmpeg's own picture; copy it to keep it."""
        _set_colours(frame)
        # a filter graph that got a frame with a matrix or range keeps using it for frames that state none
        form = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
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


def _set_colours(frame: av.VideoFrame) -> None:
    """Let the frame state only what the scaler can use; VideoError(unsupported) for a matrix that it cannot convert.

    Values that H.273 reserves count as unspecified. Primaries and transfer curve have no effect on the result, but some
    of their values make the scaler refuse the frame.
    """
    frame.color_primaries = frame.color_trc = UNSPECIFIED
    if frame.color_range > _HIGHEST_RANGE:
        frame.color_range = 0
    matrix = frame.colorspace
    if matrix in CONVERTED_MATRICES:
        return
    if matrix in UNSUPPORTED_MATRICES and not frame.format.is_rgb and len(frame.format.components) >= 3:
        name = UNSUPPORTED_MATRICES[matrix]
        raise VideoError(Reason.UNSUPPORTED, f"FFmpeg cannot convert colours whose matrix is {name} ({matrix}) to RGB")
    frame.colorspace = UNSPECIFIED
