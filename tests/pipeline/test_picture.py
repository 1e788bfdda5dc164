"""Pictures: colours by a stated rule, pixel aspect, sizes that change, and which stream is read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec, VideoInfo
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests import samples
from tests.zoo import make

EVERY = parse_sampling("every:4", clip_frames=4)
SQUARE = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))
FAST = {"preset": "ultrafast", "bf": "0"}
BOTH = ("decord", "pyav")

# H.273 code of a matrix -> its (Kr, Kb). 2 is "not stated", which is read as BT.601.
MATRICES = {2: (0.299, 0.114), 5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
LIMITED, FULL = 1, 2
YCC = (120, 90, 170)  # of 8 bits


def decoded(path: Path, spec: FrameSpec, decoder: str = "auto", **limits: int) -> tuple[VideoInfo, np.ndarray]:
    """(the last VideoInfo, all frames [N, H, W, 3])."""
    policy = DecodePolicy(decoder=decoder)  # type: ignore[arg-type]
    messages = list(open_frames(str(path), spec, EVERY, policy=policy, limits=DecodeLimits(**limits)))
    info = [m for m in messages if isinstance(m, VideoInfo)][-1]
    return info, np.concatenate([m.frames_NHWC for m in messages if isinstance(m, FrameBlock)])


def flat(path: Path, pixel_format: str, matrix: int, colour_range: int) -> Path:
    """Four pictures of one colour, tagged; BT.2020 as HDR10 is: with its primaries and the PQ curve."""
    ten_bits = pixel_format.endswith("10le")
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options=FAST)
        stream.height, stream.width, stream.pix_fmt = 96, 192, pixel_format
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, colour_range
        if matrix == 9:
            context.color_primaries, context.color_trc = 9, 16
        for number in range(4):
            frame = av.VideoFrame(192, 96, pixel_format)
            for plane, value in zip(frame.planes, YCC, strict=True):
                np.frombuffer(plane, np.uint16 if ten_bits else np.uint8)[:] = value * (4 if ten_bits else 1)
            frame.colorspace, frame.color_range, frame.pts = matrix, colour_range, number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def by_the_book(ycc: Any, matrix: int, colour_range: int) -> np.ndarray:
    """ITU-R BT.601/709/2020: Y'CbCr of 8 bits [..., 3] -> R'G'B' [..., 3], ignoring transfer curve and primaries."""
    kr, kb = MATRICES[matrix]
    y, cb, cr = np.moveaxis(np.asarray(ycc, float), -1, 0)
    y, scale = (y / 255, 255) if colour_range == FULL else ((y - 16) / 219, 224)
    red, blue = y + 2 * (1 - kr) * (cr - 128) / scale, y + 2 * (1 - kb) * (cb - 128) / scale
    return np.clip(np.stack([red, (y - kr * red - kb * blue) / (1 - kr - kb), blue], axis=-1), 0, 1) * 255


@pytest.mark.fault(18)
@pytest.mark.parametrize("colour_range", [LIMITED, FULL])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colours_are_converted_by_the_tags(pixel_format: str, matrix: int, colour_range: int, tmp_path: Path) -> None:
    """Matrix and range are those of the stream, or BT.601 and limited if it states none; HDR is not tone-mapped.

    Both routes give the same pixels, within 4 of 255 of the formula (4:2:0 rounds its chroma).
    """
    path = flat(tmp_path / "flat.mp4", pixel_format, matrix, colour_range)
    by_decord, by_pyav = (decoded(path, SQUARE, decoder)[1] for decoder in BOTH)
    assert (by_decord == by_pyav).all()
    expected = by_the_book(YCC, matrix, colour_range)
    np.testing.assert_allclose(by_pyav.reshape(-1, 3).mean(axis=0), expected, atol=4)


@pytest.mark.parametrize(
    "name",
    ["torchcodec__bt709_full_range.mp4", "torchcodec__testsrc2_av1_10bit.mp4", "mp4parse__video_colr_nclx_hdr10.mp4"],
)
def test_colours_of_real_samples_follow_the_same_formula(name: str) -> None:
    """The first picture equals its planes converted by the formula with its tags, and not with the other range."""
    path = samples.need(f"videos/{name}")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    ycc_HWC = frame.reformat(format="yuv444p16le").to_ndarray() / 256  # no matrix, no range: the samples themselves
    colour_range = FULL if frame.color_range == FULL else LIMITED
    height, width = ycc_HWC.shape[:2]
    expected_HWC = by_the_book(ycc_HWC, frame.colorspace, colour_range)
    _, frames_NHWC = decoded(path, FrameSpec(crop_hw=(height, width), resize_hw=(height, width)), "pyav")
    assert np.abs(frames_NHWC[0] - expected_HWC).mean() < 3
    other_HWC = by_the_book(ycc_HWC, frame.colorspace, LIMITED if colour_range == FULL else FULL)
    assert np.abs(frames_NHWC[0] - other_HWC).mean() > 6


@pytest.mark.parametrize("rotation", [None, 90])
def test_the_short_side_is_that_of_the_picture_as_shown(rotation: int | None, tmp_path: Path) -> None:
    """Pixels that are not square are stretched before the short side is taken, turned or not, on both routes."""
    aspect = Fraction(4, 3)  # 192x96 is shown as 256x96
    path = make.video(tmp_path / "v.mp4", "libx264", 8, pixel_aspect=aspect, rotation=rotation, hw=(192, 192))
    shown_hw = (160, 214) if rotation is None else (214, 160)
    for decoder in BOTH:
        info, by_side = decoded(path, FrameSpec(crop_hw=(160, 160), short_side=160), decoder)
        _, by_size = decoded(path, FrameSpec(crop_hw=(160, 160), resize_hw=shown_hw), decoder)
        assert info.route == decoder and (info.height, info.width) == (192, 192)
        assert (by_side == by_size).all()


def test_a_fixed_size_ignores_the_pixel_aspect(tmp_path: Path) -> None:
    """`resize_hw` gives both sides, so the aspect of picture and pixels is not kept, as with the P3D authors."""
    found = [
        decoded(make.video(tmp_path / f"{at}.mp4", "libx264", 8, pixel_aspect=aspect), SQUARE, decoder)[1]
        for at, aspect in enumerate([None, Fraction(4, 3), Fraction(10, 11)])
        for decoder in BOTH
    ]
    assert all((frames == found[0]).all() for frames in found)


@pytest.mark.fault(20)
def test_a_thin_picture_is_not_enlarged_without_limit(tmp_path: Path) -> None:
    """Two rows resized to a short side of 1024 would be two million columns wide: `too_large`, before any decode."""
    path = make.video(tmp_path / "thin.mp4", "mpeg4", 2, hw=(2, 4096))
    with pytest.raises(VideoError) as caught:
        decoded(path, FrameSpec(crop_hw=(1024, 1024), short_side=1024))
    assert caught.value.reason is Reason.TOO_LARGE and "after the resize" in caught.value.detail
    assert "the limit is 16777216 pixels, which no option changes" in caught.value.detail
    assert "max_pixels" not in caught.value.detail


def joined(path: Path, codec: str, sizes: list[tuple[int, int]], options: dict[str, str]) -> Path:
    """One WebM or TS stream of 12 numbered frames of each size."""
    with av.open(str(path), "w") as output:
        into = None
        for at, hw in enumerate(sizes):
            part = make.video(path.with_name(f"part{at}{path.suffix}"), codec, 12, hw=hw, options=options)
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                into = into or output.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size and packet.time_base is not None:
                        shift = round(at * 12 / make.FPS / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, into
                        output.mux(packet)
    return path


@pytest.mark.fault(18)
def test_both_routes_scale_a_size_that_changes_to_the_first(tmp_path: Path) -> None:
    """VP9 may change its size at a key frame: every frame comes out, at one shape, the same from both decoders."""
    quick = {"deadline": "realtime", "auto-alt-ref": "0"}
    path = joined(tmp_path / "v.webm", "libvpx-vp9", [(96, 192), (192, 384), (96, 192)], quick)
    by_decord, by_pyav = (decoded(path, SQUARE, decoder)[1] for decoder in BOTH)
    assert make.numbers_in(by_pyav) == [*range(12)] * 3
    assert make.numbers_in(by_decord) == make.numbers_in(by_pyav)
    assert np.abs(by_decord.astype(int) - by_pyav).mean() < 1


@pytest.mark.fault(20)
def test_a_picture_that_grows_beyond_the_limit_in_mid_stream_is_not_decoded(tmp_path: Path) -> None:
    """The limit of pixels applies to every picture, not only to the first."""
    quick = {"deadline": "realtime", "auto-alt-ref": "0"}
    path = joined(tmp_path / "v.webm", "libvpx-vp9", [(96, 192), (192, 384)], quick)
    spec = FrameSpec(crop_hw=(48, 48), resize_hw=(48, 48))
    assert decoded(path, spec, max_pixels=192 * 384)[0].width == 192
    with pytest.raises(VideoError) as caught:
        decoded(path, spec, max_pixels=96 * 192)
    assert caught.value.reason is Reason.TOO_LARGE


def test_the_stream_with_the_most_pixels_is_read_and_recorded(tmp_path: Path) -> None:
    """Of two video streams the larger is read, whatever its position; `stream_index` says which."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as output:
        streams = []
        for height, width in ((96, 192), (192, 384)):
            stream = output.add_stream("libx264", rate=25, options=FAST)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            streams.append(stream)
        for number in range(6):
            for stream, shift in zip(streams, (0, 100), strict=True):
                pixels = make.picture(number + shift, stream.height, stream.width)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            output.mux(stream.encode())
    info, frames_NHWC = decoded(path, SQUARE)
    assert (info.stream_index, info.width, info.route) == (1, 384, "pyav")
    assert make.numbers_in(frames_NHWC) == list(range(100, 106))
