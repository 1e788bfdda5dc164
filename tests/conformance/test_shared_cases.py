"""Hard files that were collected and cannot all be made: each gives what is right. Skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests import samples
from tests.conformance.test_conformance import RULES, SPEC, decoded

# file -> (frames, seconds, frames per second, rotation), or the reason of failure
RIGHT: dict[str, tuple[int, float, float, int] | Reason] = {
    "mvhevc_spatial.mp4": (10, 0.333, 30, 0),
    "mjpeg_exif.mkv": (24, 2.4, 10, 0),
    "matrix_ycgco_h264.mp4": Reason.UNSUPPORTED,
    "matrix_reserved_mpeg2.mkv": (52, 2.08, 25, 0),
    "still_track_first.mp4": (60, 2.4, 25, 0),
    "frag_first_in_moov_cut.mp4": Reason.TRUNCATED,
    "mxf_cut.mxf": Reason.TRUNCATED,
    "ffv1_crc_mismatch.mkv": Reason.CORRUPT_FRAMES,
    "parameter_sets_as_first_sample.mp4": (60, 2.4, 25, 0),
    "filler_as_last_sample.mp4": (60, 2.4, 25, 0),
    "end_of_sequence_as_last_sample.mp4": (60, 2.4, 25, 0),
    "webm_duration_one_second_long.webm": (60, 2.4, 25, 0),
    "subtitle_27h.mkv": (60, 2.4, 25, 0),
    "sei_turned_180_decord.mp4": (60, 2.4, 25, 180),
    "fps_60000.dv": (2, 0.067, 29.97, 0),
    "ts_joined_10h_gap.ts": (120, 36002.32, 25, 0),
    "ts_zero_tail.ts": (60, 2.4, 25, 0),
    "frag_ff_tail.mp4": (60, 2.4, 25, 0),
    "cut_in_moov.mp4": Reason.TRUNCATED,
    "encrypted.webm": Reason.UNSUPPORTED,
    "scrambled.ts": Reason.UNSUPPORTED,
    "listed_extension.mjpg": (24, 0.96, 25, 0),
    "raw_30fps.h264": (60, 2.0, 30, 0),
    "avi_damaged_index.avi": (60, 2.4, 25, 0),
}


def case(name: str) -> Path:
    return samples.need(f"cases/{name}")


@pytest.mark.parametrize("name", RIGHT)
def test_every_collected_file_ends_as_it_should(name: str) -> None:
    """Under every sampling rule, with the same count, duration, rate and rotation."""
    path, right = case(name), RIGHT[name]
    for rule, fps in RULES:
        clip_frames = 16 if rule == "every:16" else 60
        if isinstance(right, Reason) or (fps and name == "ts_joined_10h_gap.ts"):
            with pytest.raises(VideoError) as caught:
                decoded(path, rule, 25.0 if fps else None, clip_frames=clip_frames)
            assert caught.value.reason is (right if isinstance(right, Reason) else Reason.UNSUPPORTED)
            continue
        found = decoded(path, rule, fps)
        assert found.end.n_frames == right[0] and not found.end.truncated
        assert found.end.duration_s == pytest.approx(right[1], abs=0.001)
        assert found.info.fps == pytest.approx(right[2], rel=0.001)
        assert found.info.rotation == right[3]


def test_the_damage_is_found_where_it_is() -> None:
    with pytest.raises(VideoError, match="after 6 of 12 frames"):
        decoded(case("ffv1_crc_mismatch.mkv"), "every:16", None)


def test_decord_does_not_read_a_picture_that_its_stream_turns() -> None:
    """decord looks at the container's display matrix only, so such a video came out upside down."""
    found = probe(str(case("sei_turned_180_decord.mp4")), DecodeLimits())
    with pytest.raises(VideoError, match="the stream itself says that the picture is turned"):
        route(found, DecodePolicy(decoder="decord"), SPEC)


def test_companion_files_of_macos_are_skipped(tmp_path: Path) -> None:
    """`._x.mp4` is counted among the skipped files, and never planned."""
    data = case("._appledouble.mp4").read_bytes()
    (tmp_path / "._x.mp4").write_bytes(data)
    (tmp_path / "x.mp4").write_bytes(case("frag_ff_tail.mp4").read_bytes())
    found = find(str(tmp_path), StoreOptions())
    assert found.videos["path"].to_pylist() == ["x.mp4"] and found.n_skipped == 1
