"""Thumbnails: the right frame, upright, in the right colours; and no file can crash the caller."""

from __future__ import annotations

import io
import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from p3d.pipeline.decode.thumbnail import Thumbnail, jpeg_of, thumbnails, thumbnails_in_child
from p3d.pipeline.errors import Reason
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import Failure, VideoRef
from p3d.pipeline.types.policy import DecodeLimits
from tests.zoo import make


def row(path: Path) -> VideoRef:
    return local_row(path.parent, os.fsencode(path.name))


def here(path: Path, *seconds: float, **options: object) -> list[Thumbnail | Failure]:
    """Made in this process, to save the start of a child."""
    given = {"store_options": DEFAULTS, "scratch": path.parent, "longest_side": 320, "limits": DecodeLimits()}
    return list(thumbnails(row(path), seconds, **{**given, **options}))


def pixels(found: Thumbnail | Failure) -> np.ndarray:
    """[H, W, 3] of a JPEG, decoded; checks that its size is the stated one."""
    assert isinstance(found, Thumbnail), found
    assert found.jpeg[:3] == b"\xff\xd8\xff"
    with av.open(io.BytesIO(found.jpeg), format="mjpeg") as file:
        (frame,) = file.decode(video=0)
    frame_HWC = frame.to_ndarray(format="rgb24")
    assert frame_HWC.shape == (found.height, found.width, 3)
    return frame_HWC


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"gop": 25}),
        ("bframes.mkv", "libx264", {"gop": 50, "b_frames": 3}),
        ("vp9.webm", "libvpx-vp9", {"gop": 30}),
        ("old.avi", "mpeg4", {"gop": 12}),
        ("cast.ts", "mpeg2video", {"gop": 15, "b_frames": 2}),
        ("raw.h264", "libx264", {"gop": 25, "b_frames": 0}),
    ],
)
def test_the_frame_on_screen_at_that_second(name: str, codec: str, options: dict[str, int], tmp_path: Path) -> None:
    """Any second of any container gives its own frame: the first, between key frames, the last, past the end."""
    path = make.video(tmp_path / name, codec, 120, hw=(96, 192), **options)
    found = here(path, 0.0, 1.0, 3.3, 4.76, 99.0)
    assert make.numbers_in(np.stack([pixels(one) for one in found])) == [0, 25, 82, 119, 119]
    assert [round(one.at_s, 2) for one in found if isinstance(one, Thumbnail)] == [0, 1, 3.28, 4.76, 4.76]


def test_orientation_and_shape(tmp_path: Path) -> None:
    """Turned pictures come out upright, wide pixels are stretched, neither side passes the limit or is enlarged."""
    fast = {"preset": "ultrafast"}
    turned = make.video(tmp_path / "turned.mp4", "libx264", 3, hw=(96, 192), rotation=90, options=fast)
    wide = make.video(tmp_path / "wide.mp4", "libx264", 3, hw=(96, 96), pixel_aspect=Fraction(2), options=fast)
    for path, shape in ((turned, (192, 96)), (wide, (96, 192))):
        assert pixels(here(path, 0.08)[0]).shape[:2] == shape
    assert pixels(here(turned, 0.08, longest_side=100)[0]).shape[:2] == (100, 50)
    upright = np.rot90(make.picture(2, 96, 192))  # counterclockwise, as set_display_rotation counts
    difference = np.abs(pixels(here(turned, 0.08)[0]).astype(int) - upright).mean()
    assert difference < 12, difference


def test_a_jpeg_has_the_colours_it_was_given() -> None:
    """Flat colours come back within the rounding of JPEG, at odd sizes too."""
    for colour in ((255, 0, 0), (10, 200, 90), (255, 255, 255), (0, 0, 0)):
        frame_HWC = np.empty((37, 51, 3), np.uint8)
        frame_HWC[:] = colour
        with av.open(io.BytesIO(jpeg_of(frame_HWC)), format="mjpeg") as file:
            (frame,) = file.decode(video=0)
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - frame_HWC).max() <= 4


def test_bad_files_give_failures(tmp_path: Path) -> None:
    """A changed, missing, damaged or over-large file gives a Failure for each second, from a child too."""
    path = make.video(tmp_path / "video.mp4", "libx264", 30, options={"preset": "ultrafast"})
    good = row(path)
    given = {"store_options": DEFAULTS, "scratch": tmp_path}
    (one,) = thumbnails_in_child(good, [0.5], **given)
    assert make.numbers_in(pixels(one)[None]) == [12]
    assert [
        one.reason for one in here(path, 0.5, 1, limits=DecodeLimits(max_pixels=100)) if isinstance(one, Failure)
    ] == [
        Reason.TOO_LARGE,
        Reason.TOO_LARGE,
    ]
    shutil.copy(path, tmp_path / "other.mp4")
    path.write_bytes(path.read_bytes() + b"more")
    found = thumbnails_in_child(good, [0.5, 1.0], **given)
    assert [one.reason for one in found if isinstance(one, Failure)] == [Reason.SOURCE_CHANGED] * 2
    path.unlink()
    (one,) = thumbnails_in_child(good, [0.5], **given)
    assert isinstance(one, Failure) and one.reason is Reason.SOURCE_MISSING
    remote = VideoRef("id", "video.mp4", "s3://bucket/video.mp4", "v", 2**40, etag="e")
    (one,) = thumbnails_in_child(remote, [0.5], **given)  # nothing is downloaded
    assert isinstance(one, Failure) and one.reason is Reason.TOO_LARGE
    text = tmp_path / "text.mp4"
    text.write_text("#EXTM3U\nhttp://example.com/\n")
    assert [one.reason for one in here(text, 0) if isinstance(one, Failure)] == [Reason.NOT_A_VIDEO]


def test_damage_costs_only_the_pictures_after_it(tmp_path: Path) -> None:
    """If a file is overwritten in its middle, seconds before the damage and key frames after it have pictures."""
    whole = make.video(tmp_path / "whole.mkv", "mpeg4", 200, hw=(96, 192), gop=10, noise=30)
    broken = make.damaged(whole, tmp_path / "broken.mkv", 0.5, 3000)
    first, last = here(broken, 0.08, 7.6)
    assert make.numbers_in(np.stack([pixels(first), pixels(last)])) == [2, 190]


def test_a_child_that_hangs_or_crashes_gives_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures made before are kept, the others become Failures, and the caller continues."""
    path = make.video(tmp_path / "video.mp4", "libx264", 30, options={"preset": "ultrafast"})
    for body, reason in (("os.abort()", Reason.DECODER_CRASH), ("threading.Event().wait()", Reason.DECODE_TIMEOUT)):
        (tmp_path / "sitecustomize.py").write_text(
            "import os, threading\n"
            "import p3d.pipeline.decode.thumbnail as thumbnail\n"
            "whole = thumbnail._thumbnail\n"
            "def broken(path, second, *given):\n"
            f"    if second == 1.0:\n        {body}\n"
            "    yield from whole(path, second, *given)\n"
            "thumbnail._thumbnail = broken\n"
        )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            found = thumbnails_in_child(
                row(path), [0.5, 1.0, 0.2], store_options=DEFAULTS, scratch=tmp_path, timeout_s=2
            )
        assert make.numbers_in(pixels(found[0])[None]) == [12]
        assert [one.reason for one in found[1:] if isinstance(one, Failure)] == [reason] * 2
