"""Decoding: every frame has the number that it claims to have, which is written in its pixels."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from p3d.pipeline.clips.rules import Sampling, needed_frames, parse_sampling
from p3d.pipeline.decode.blocks import chunk_bounds
from p3d.pipeline.decode.container import Source
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.decode.probe import Probe, probe, probed
from p3d.pipeline.decode.routes import decord as decord_route_module
from p3d.pipeline.decode.routes import pyav as pyav_route_module
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.decode.routes.decord import DecordGaveUp
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import FLOAT32, INT64, UINT8, FrameBlock, FrameSpec, ShardPlan, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))
EVERY = parse_sampling("every:16", clip_frames=16)
SPARSE = parse_sampling("uniform:3", clip_frames=4)
AUTO = DecodePolicy()
KEEP = DecodePolicy(partial="keep")
pytestmark = pytest.mark.usefixtures("decord_if_right")
NO_B = {"preset": "ultrafast", "bf": "0"}


class Seen:
    """The messages of one video after its last VideoInfo, concatenated."""

    def __init__(self, path: Path, sampling: Sampling = EVERY, policy: DecodePolicy = AUTO) -> None:
        self.infos: list[VideoInfo] = []
        blocks: list[FrameBlock] = []
        for message in open_frames(str(path), SPEC, sampling, policy=policy):
            if isinstance(message, VideoInfo):
                self.infos.append(message)
                blocks.clear()
            elif isinstance(message, FrameBlock):
                assert 1 <= len(message.numbers_N) <= 64
                assert message.frames_NHWC.shape[1:] == (*SPEC.crop_hw, 3)
                blocks.append(message)
            else:
                self.end: VideoEnd = message
        self.numbers_N = np.concatenate([block.numbers_N for block in blocks])
        self.start_s_N = np.concatenate([block.start_s_N for block in blocks])
        self.end_s_N = np.concatenate([block.end_s_N for block in blocks])
        self.frames_NHWC = np.concatenate([block.frames_NHWC for block in blocks])

    @property
    def written(self) -> list[int]:
        return make.numbers_in(self.frames_NHWC)


def refused(path: Path, policy: DecodePolicy = AUTO, limits: DecodeLimits | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        list(open_frames(str(path), SPEC, EVERY, policy=policy, limits=limits or DecodeLimits()))
    assert caught.value.detail and len(caught.value.detail.splitlines()) == 1
    return caught.value


X264 = {"preset": "ultrafast", "bf": "3"}
CLOSED_GOPS = {"preset": "ultrafast", "x264-params": "keyint=50:min-keyint=50:scenecut=0"}
OPEN_GOPS = {"preset": "ultrafast", "x264-params": "open-gop=1:keyint=50:min-keyint=50:scenecut=0:b-adapt=0:bframes=3"}
QUIET_265 = {"preset": "ultrafast", "x265-params": "log-level=none"}
CLOSED_265 = {"preset": "ultrafast", "x265-params": "log-level=none:open-gop=0"}

GOOD: dict[str, tuple[str, int, Callable[[Path], Path]]] = {
    "h264_b_frames.mp4": ("decord", 40, lambda p: make.video(p, "libx264", 40, options=X264)),
    "h264_blocks.mp4": ("decord", 600, lambda p: make.video(p, "libx264", 600, options=CLOSED_GOPS)),
    "h264_one_gop.mp4": ("pyav", 300, lambda p: make.video(p, "libx264", 300, gop=1000, options=NO_B)),
    "h264_open_gops.mp4": ("pyav", 300, lambda p: make.video(p, "libx264", 300, options=OPEN_GOPS, b_frames=3)),
    "h264.mkv": ("decord", 40, lambda p: make.video(p, "libx264", 40, options=X264)),
    "h264.ts": ("pyav", 40, lambda p: make.video(p, "libx264", 40, options=X264)),
    "fragmented.mp4": (
        "decord",
        60,
        lambda p: make.video(p, "libx264", 60, gop=10, muxer={"movflags": "frag_keyframe+empty_moov"}),
    ),
    "odd.mp4": ("decord", 20, lambda p: make.video(p, "libx264", 20, hw=(97, 191), pixel_format="yuv444p")),
    "narrow.mp4": ("pyav", 20, lambda p: make.video(p, "libx264", 20, hw=(64, 96))),
    "hevc.mp4": ("decord", 40, lambda p: make.video(p, "libx265", 40, options=QUIET_265)),
    "vp9.webm": ("decord", 30, lambda p: make.video(p, "libvpx-vp9", 30, options={"deadline": "realtime"})),
    "mpeg4.mp4": ("decord", 40, lambda p: make.video(p, "mpeg4", 40, gop=12)),
    "mpeg4.avi": ("pyav", 40, lambda p: make.video(p, "mpeg4", 40)),
    "mpeg4_b_frames.mp4": ("pyav", 40, lambda p: make.video(p, "mpeg4", 40, gop=12, b_frames=2)),
    "mjpeg.mov": ("decord", 40, lambda p: make.video(p, "mjpeg", 40, pixel_format="yuvj420p")),
    "prores.mov": ("decord", 20, lambda p: make.video(p, "prores_ks", 20, pixel_format="yuv422p10le")),
    "gif.gif": ("pyav", 12, lambda p: make.video(p, "gif", 12, pixel_format="rgb8")),
    "one.mp4": ("decord", 1, lambda p: make.video(p, "libx264", 1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_frame_has_its_number(name: str, tmp_path: Path) -> None:
    """All frames, in order, each once, on the stated route, with times at 1/25 s; the same for a sparse sampling."""
    expected_route, n_frames, build = GOOD[name]
    path = build(tmp_path / name)
    seen = Seen(path)
    assert [info.route for info in seen.infos] == [expected_route]
    assert seen.numbers_N.tolist() == seen.written == list(range(n_frames))
    assert seen.infos[0].n_frames == seen.end.n_frames == n_frames and not seen.end.truncated
    np.testing.assert_allclose(seen.start_s_N, np.arange(n_frames) / make.FPS, atol=0.0011)  # Matroska times are in ms
    assert seen.end_s_N[-1] == seen.end.duration_s and (seen.end_s_N[:-1] == seen.start_s_N[1:]).all()
    sparse = Seen(path, SPARSE)
    wanted = needed_frames(SPARSE, n_frames).tolist()
    assert sparse.numbers_N.tolist() == sparse.written == wanted
    assert (sparse.start_s_N == seen.start_s_N[wanted]).all() and (sparse.end_s_N == seen.end_s_N[wanted]).all()
    assert (sparse.frames_NHWC == seen.frames_NHWC[wanted]).all()


@pytest.mark.parametrize("name", [name for name, (decoder, _, _) in GOOD.items() if decoder == "decord"])
def test_both_decoders_give_the_same_pixels_and_times(name: str, tmp_path: Path) -> None:
    """Rows do not depend on the decoder: pixels and times are equal, bit for bit."""
    path = GOOD[name][2](tmp_path / name)
    by_decord, by_pyav = (Seen(path, policy=DecodePolicy(decoder=d)) for d in ("decord", "pyav"))
    assert (by_decord.frames_NHWC == by_pyav.frames_NHWC).all()
    assert (by_decord.start_s_N == by_pyav.start_s_N).all() and (by_decord.end_s_N == by_pyav.end_s_N).all()
    assert by_decord.end == by_pyav.end


@pytest.mark.fault(18)
def test_variable_frame_rate_keeps_its_own_times(tmp_path: Path) -> None:
    """Frame i is shown at its own pts, not at i / fps."""
    pts = [3 * i + i % 3 for i in range(40)]
    seen = Seen(make.video(tmp_path / "vfr.mp4", "libx264", 40, pts=pts, options=X264))
    assert seen.written == list(range(40))
    np.testing.assert_allclose(seen.start_s_N, np.array(pts) / make.FPS, atol=1e-9)


@pytest.mark.parametrize(("counter_clockwise", "clockwise"), [(90, 270), (180, 180), (270, 90)])
@pytest.mark.fault(18)
def test_a_turned_video_is_shown_upright(counter_clockwise: int, clockwise: int, tmp_path: Path) -> None:
    """The display matrix is applied, and width and height are those of the picture as shown."""
    path = make.video(tmp_path / "turned.mp4", "libx264", 20, hw=(176, 192), rotation=counter_clockwise)
    seen = Seen(path)
    info = seen.infos[0]
    assert (seen.frames_NHWC == Seen(path, policy=DecodePolicy(decoder="pyav")).frames_NHWC).all()
    assert (info.route, info.rotation) == ("decord", clockwise)
    assert (info.height, info.width) == ((192, 176) if clockwise % 180 else (176, 192))
    as_coded = np.rot90(seen.frames_NHWC, -(counter_clockwise // 90), axes=(1, 2))
    assert make.numbers_in(as_coded) == list(range(20))


def test_a_mirrored_video_is_mirrored_back(tmp_path: Path) -> None:
    """A display matrix that mirrors is applied too; decord was not measured on it."""
    seen = Seen(make.video(tmp_path / "mirrored.mp4", "libx264", 20, mirrored=True))
    assert seen.infos[0].route == "pyav"
    assert make.numbers_in(seen.frames_NHWC[:, :, ::-1]) == list(range(20))


def test_frames_that_the_edit_list_discards_are_not_counted(tmp_path: Path) -> None:
    """The ten frames before time 0 are neither counted nor sent, and time starts at the first that is shown."""
    muxer = {"avoid_negative_ts": "disabled"}
    path = make.video(tmp_path / "e.mp4", "libx264", 60, pts=range(-10, 50), options=NO_B, muxer=muxer)
    seen = Seen(path)
    assert seen.infos[0].route == "pyav" and seen.end.n_frames == 50
    assert seen.written == list(range(10, 60)) and seen.start_s_N[0] == 0.0


@pytest.mark.parametrize("hw", [(1, 1), (2, 2), (16, 24)])
def test_the_smallest_pictures_are_resized_like_any_other(hw: tuple[int, int], tmp_path: Path) -> None:
    """Pictures of one or two pixels come out at the crop size (decord gives them 96 channels)."""
    seen = Seen(make.video(tmp_path / "tiny.mp4", "libx264", 3, hw=hw, pixel_format="yuv444p"))
    assert seen.frames_NHWC.shape == (3, 160, 160, 3) and seen.infos[0].route == "pyav"


@pytest.mark.fault(24)
def test_a_name_that_is_not_utf8_is_decoded(tmp_path: Path) -> None:
    """Names of any bytes can be read: PyAV accepts them, decord does not."""
    plain = make.video(tmp_path / "plain.mp4", "libx264", 20, options=X264)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 %d|x:y.mp4"))
    plain.rename(odd)
    seen = Seen(odd)
    assert seen.infos[0].route == "pyav" and seen.written == list(range(20))


def test_metadata_that_is_not_utf8_does_not_matter(tmp_path: Path) -> None:
    """A Latin-1 title does not make a good video unreadable."""
    path = tmp_path / "title.avi"
    with av.open(str(path), "w", metadata_encoding="latin-1") as output:
        output.metadata["title"] = "café"
        stream = output.add_stream("mpeg4", rate=25)
        stream.height, stream.width = 96, 192
        for number in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(make.picture(number, 96, 192), format="rgb24")))
        output.mux(stream.encode())
    assert b"caf\xe9" in path.read_bytes()
    assert Seen(path).written == [0, 1, 2]


def test_a_stream_that_changes_its_size_keeps_one_frame_shape(tmp_path: Path) -> None:
    """Frames of another size in mid-stream are resized to the same target, and none is lost."""
    small = make.video(tmp_path / "a.ts", "libx264", 12, hw=(96, 192), options=NO_B)
    large = make.video(tmp_path / "b.ts", "libx264", 12, hw=(192, 384), options=NO_B)
    joined = tmp_path / "c.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    seen = Seen(joined)
    assert seen.written == [*range(12), *range(12)]
    assert (np.diff(seen.start_s_N) > 0).all()


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault(16)
def test_a_cut_faststart_file_is_truncated(tmp_path: Path) -> None:
    """A file cut in half is `truncated`, with the counts; its first half is never used silently."""
    whole = make.video(tmp_path / "w.mp4", "libx264", 60, options=NO_B, muxer={"movflags": "faststart"}, noise=60)
    path = make.cut(whole, tmp_path / "cut.mp4", 0.5)
    error = refused(path)
    assert error.reason is Reason.TRUNCATED and "of 60 frames" in error.detail
    for sampling in (EVERY, SPARSE):
        seen = Seen(path, sampling, KEEP)
        n_frames = seen.end.n_frames
        assert 20 < n_frames < 40 and seen.end.truncated
        expected = list(range(n_frames)) if sampling is EVERY else needed_frames(SPARSE, n_frames).tolist()
        assert seen.numbers_N.tolist() == seen.written == expected
        assert sampling is EVERY or seen.infos[-1].n_frames == n_frames


@pytest.mark.parametrize("name", ["cut.mkv", "cut.avi", "cut.webm"])
@pytest.mark.fault(16)
def test_a_cut_file_of_another_container_is_truncated(name: str, tmp_path: Path) -> None:
    """Cuts are also found in containers that decoders read to a shorter end without an error."""
    codec = {"cut.mkv": "libx264", "cut.avi": "mpeg4", "cut.webm": "libvpx-vp9"}[name]
    options = {"deadline": "realtime"} if codec == "libvpx-vp9" else {}
    whole = make.video(tmp_path / f"whole_{name}", codec, 60, gop=12, options=options, noise=40)
    assert refused(make.cut(whole, tmp_path / name, 0.6)).reason is Reason.TRUNCATED


@pytest.mark.fault(16)
def test_a_file_without_its_index_is_truncated(tmp_path: Path) -> None:
    """An mp4 whose moov was at the lost end is `truncated`, also under keep: no frame can be found in it."""
    path = make.cut(make.video(tmp_path / "w.mp4", "libx264", 60, noise=60), tmp_path / "cut.mp4", 0.5)
    assert refused(path).reason is refused(path, KEEP).reason is Reason.TRUNCATED


@pytest.mark.fault(16)
def test_damage_in_the_middle_is_corrupt_frames(tmp_path: Path) -> None:
    """Overwritten bytes fail the video; under keep the frames before them are used, and the video is marked."""
    whole = make.video(tmp_path / "w.mp4", "libx264", 60, gop=10, options=NO_B, noise=60)
    path = make.damaged(whole, tmp_path / "damaged.mp4", 0.5, 4000)
    for decoder in ("auto", "pyav", "decord"):
        assert refused(path, DecodePolicy(decoder=decoder)).reason is Reason.CORRUPT_FRAMES
    for sampling in (EVERY, SPARSE):
        seen = Seen(path, sampling, KEEP)
        n_frames = seen.end.n_frames
        assert 10 < n_frames < 40 and seen.end.truncated
        assert seen.numbers_N.tolist() == seen.written
        assert seen.numbers_N[-1] == n_frames - 1 or sampling is SPARSE
        assert len(seen.infos) <= 2


@pytest.mark.fault(16)
def test_no_good_frame_is_no_frames(tmp_path: Path) -> None:
    """Damage from the first frame on is `no_frames`, also under keep, and the detail says what was tried."""
    whole = make.video(tmp_path / "w.mp4", "libx264", 30, options=NO_B, noise=60, muxer={"movflags": "faststart"})
    data = bytearray(whole.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)
    whole.write_bytes(bytes(data))
    assert refused(whole).reason is refused(whole, KEEP).reason is Reason.NO_FRAMES
    assert "(tried the decoder h264 of PyAV on stream 0 of " in refused(whole).detail


def opened_while(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    """How often PyAV opens a file to decode all its frames."""
    real, times = av.open, []
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", lambda *args, **options: times.append(1) or real(*args, **options))
        assert Seen(path, policy=DecodePolicy("pyav")).end.n_frames == 40
    return len(times)


def test_a_file_is_opened_once_where_it_can_be_rewound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file costs as much as decoding many frames; MPEG-TS has no index for rewinding."""
    for name, times in (("v.mp4", 1), ("v.mkv", 1), ("v.ts", 2)):
        assert opened_while(monkeypatch, make.video(tmp_path / name, "libx264", 40, options=X264)) == times


@pytest.mark.fault(16)
@pytest.mark.parametrize(("codec", "options"), [("libx264", X264), ("libx265", CLOSED_265), ("mpeg4", {})])
def test_a_rewound_file_ends_like_a_reopened_one(
    codec: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With damage anywhere, under both policies: the same frames and times to the bit, or the same error."""
    whole, cases = make.video(tmp_path / "w.mp4", codec, 60, gop=20, noise=60, options=options), set[str]()
    real = pyav_route_module._rewound

    def end(path: Path, partial: Any, *, reopen: bool) -> tuple[object, ...]:
        def rewound(*args: Any) -> Any:
            cases.add("rewound" if (found := real(*args)) else "reopened")
            return None if reopen else found

        monkeypatch.setattr(pyav_route_module, "_rewound", rewound)
        try:
            seen = Seen(path, policy=DecodePolicy("pyav", partial))
        except VideoError as error:
            cases.add(error.reason)
            return error.reason, error.detail
        return *(array.tobytes() for array in (seen.numbers_N, seen.start_s_N, seen.frames_NHWC)), seen.end

    for tenth in range(1, 10):
        for n_bytes in (1, 64, 4096):
            path = make.damaged(whole, tmp_path / "damaged.mp4", tenth / 10, n_bytes)
            for partial in ("fail", "keep"):
                assert end(path, partial, reopen=False) == end(path, partial, reopen=True), (tenth, n_bytes, partial)
    assert {"rewound", Reason.CORRUPT_FRAMES} <= cases


def test_when_decord_gives_up_pyav_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If decord raises partway, no frame is lost or repeated: a second VideoInfo, then every frame from PyAV."""
    path = make.video(tmp_path / "w.mp4", "libx264", 80, options=X264)
    real = decord_route_module.read_decord

    def stops(*args: object) -> object:
        yield next(iter(real(*args)))
        raise DecordGaveUp("something new")

    monkeypatch.setattr("p3d.pipeline.decode.frames.read_decord", stops)
    monkeypatch.setattr("p3d.pipeline.decode.seek.LEAST_SPARED", 2)  # else PyAV reads sparse clips at once
    for sampling in (EVERY, SPARSE):
        seen = Seen(path, sampling)
        assert [info.route for info in seen.infos] == ["decord", "pyav"]
        assert seen.numbers_N.tolist() == seen.written == needed_frames(sampling, 80).tolist()


@pytest.mark.fault(18)
def test_a_wrong_count_starts_again_once_with_the_true_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips laid out on a wrong count are laid out again on the true one, except where all frames are sent."""
    path = make.video(tmp_path / "w.ts", "libx264", 40, options=X264)

    @contextmanager
    def miscounted(*args: Any) -> Iterator[tuple[Probe, Source]]:
        with probed(*args) as (found, source):
            yield replace(found, n_frames=45), source

    monkeypatch.setattr("p3d.pipeline.decode.frames.probed", miscounted)
    sparse = Seen(path, SPARSE)
    assert [info.n_frames for info in sparse.infos] == [45, 40] and sparse.end.n_frames == 40
    assert sparse.written == needed_frames(SPARSE, 40).tolist()
    assert [info.n_frames for info in Seen(path).infos] == [45] and Seen(path).end.n_frames == 40


# --- what is not a video --------------------------------------------------------------------------------------------

TEXTS = {
    "hls.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n/etc/passwd\n\x00\x01", "HLS"),
    "lfs.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "run `git lfs pull`"),
    "concat.mp4": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "ffconcat"),
    "sdp.mp4": (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n", "SDP"),
    "page.mp4": (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
    "notes.mp4": ("Grüße, nothing to see here\n".encode() * 9, "text"),
    "utf16.mp4": ("notes".encode("utf-16"), "UTF-16"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.fault(21)
def test_text_never_reaches_a_demuxer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists and other text are `not_a_video`, named in the detail, and native code never reads them."""
    monkeypatch.setattr(av, "open", lambda *a, **k: pytest.fail("a demuxer was given text"))
    content, word = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert error.reason is Reason.NOT_A_VIDEO and word in error.detail


@pytest.mark.fault(22)
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A directory, a fifo without a writer, a socket and a device are `not_a_file`, without waiting."""
    os.mkfifo(tmp_path / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.mp4"))
        for path in (tmp_path, tmp_path / "fifo.mp4", tmp_path / "s.mp4", Path("/dev/null")):
            assert refused(path).reason is Reason.NOT_A_FILE


def test_a_path_that_cannot_lead_to_a_file_is_missing(tmp_path: Path) -> None:
    """A link that leads to itself and a name that is too long are rows, not errors of the system."""
    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    for name in ("a.mp4", "x" * 300, "x/" * 3000):
        with pytest.raises(VideoError, match="no file can be there") as caught:
            probe(f"{tmp_path}/{name}", DecodeLimits())
        assert caught.value.reason is Reason.SOURCE_MISSING


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing is source_missing, unreadable is source_denied, zero bytes is empty_file."""
    (tmp_path / "empty.mp4").touch()
    assert refused(tmp_path / "empty.mp4").reason is Reason.EMPTY_FILE
    assert refused(tmp_path / "none.mp4").reason is Reason.SOURCE_MISSING
    assert refused(tmp_path / "empty.mp4" / "x.mp4").reason is Reason.SOURCE_MISSING
    (tmp_path / "shut.mp4").write_bytes(bytes(100))

    def shut(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", shut)  # root, as in a container, may open a file of mode 000
    assert refused(tmp_path / "shut.mp4").reason is Reason.SOURCE_DENIED


@pytest.mark.parametrize("content", [bytes(5000), b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(range(256)) * 16])
@pytest.mark.fault(16)
def test_other_bytes_are_not_a_video(content: bytes, tmp_path: Path) -> None:
    """Zeros, an image and arbitrary bytes are `not_a_video`."""
    (tmp_path / "x.mp4").write_bytes(content)
    assert refused(tmp_path / "x.mp4").reason is Reason.NOT_A_VIDEO


@pytest.mark.fault(16)
def test_audio_only_is_no_video_stream(tmp_path: Path) -> None:
    """A media file without pictures is distinguished from bytes that are not media at all."""
    assert refused(make.audio(tmp_path / "a.mp4")).reason is Reason.NO_VIDEO_STREAM


@pytest.mark.fault(19, 20)
def test_limits_are_refused_before_decoding(tmp_path: Path) -> None:
    """Too long, too many pixels, too many bytes: each with its reason and its numbers."""
    path = make.video(tmp_path / "v.mp4", "libx264", 50)
    assert refused(path, limits=DecodeLimits(max_duration_s=1.9)).reason is Reason.TOO_LONG
    assert refused(path, limits=DecodeLimits(max_pixels=96 * 192 - 1)).reason is Reason.TOO_LARGE
    assert refused(path, limits=DecodeLimits(max_file_bytes=100)).reason is Reason.TOO_LARGE


# --- the route ------------------------------------------------------------------------------------------------------


def test_each_objection_alone_sends_a_video_to_pyav(tmp_path: Path) -> None:
    """decord gets a video only without objections; if it is requested by name, the objection becomes the error."""
    good = probe(str(make.video(tmp_path / "v.mp4", "libx264", 20, options=X264)), DecodeLimits())
    assert route(good, AUTO, SPEC)[0] == "decord"
    assert route(good, DecodePolicy(decoder="pyav"), SPEC)[0] == "pyav"
    for change in (
        {"codec": "wmv2"},
        {"container": "mpegts"},
        {"truncated": "cut"},
        {"encrypted": True},
        {"n_discarded": 1},
        {"duration_known": False},
        {"n_video_streams": 2},
        {"turn": replace(good.turn, columns_reversed=True)},
        {"n_promised": 21},
        {"start_s_N": None},
        {"coded_width": 159},
        {"closed_gops": False},
        {"n_frames": 257, "key_frames": np.array([0])},
    ):
        odd = replace(good, **change)
        name, why = route(odd, AUTO, SPEC)
        assert name == "pyav" and why, change
        with pytest.raises(VideoError, match="decord does not read this video correctly") as caught:
            route(odd, DecodePolicy(decoder="decord"), SPEC)
        assert caught.value.reason is Reason.UNSUPPORTED
    for spec in (FrameSpec((48, 48), resize_hw=(48, 48)), FrameSpec((4000, 4000), resize_hw=(4000, 4000))):
        assert route(good, AUTO, spec)[0] == "pyav"


@pytest.mark.parametrize("gop", [1, 7, 50, 249, 256])
@pytest.mark.parametrize("n_frames", [1, 256, 257, 1000])
def test_gop_chunks_cover_every_frame_once_and_begin_at_key_frames(gop: int, n_frames: int) -> None:
    """GOP chunks are adjacent, at most 256 frames long, and begin at key frames, to which decord can seek."""
    keys = np.arange(0, n_frames, gop)
    found = chunk_bounds(keys, n_frames)
    assert [found[0][0], *(end for _, end in found)] == [*(first for first, _ in found), n_frames]
    assert all(first < end <= first + 256 and first in keys for first, end in found)


def test_a_policy_that_does_not_exist_is_refused() -> None:
    """A wrong option value is an error as soon as the policy is made."""
    with pytest.raises(ValueError, match="decoder is"):
        DecodePolicy(decoder="ffmpeg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="partial is"):
        DecodePolicy(partial="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("least_spared", [0, 2], ids=["left out", "whole"])
def test_a_sparse_decode_shows_progress(least_spared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few frames are wanted, empty blocks come in between, so that a deadline without messages works."""
    monkeypatch.setattr(pyav_route_module, "SILENT_FRAMES", 20)
    monkeypatch.setattr("p3d.pipeline.decode.seek.LEAST_SPARED", least_spared)
    path = make.video(tmp_path / "long.mp4", "libx264", 200, options=NO_B)
    sparse = parse_sampling("every:500", clip_frames=4)  # the first and last four; the frames between are referred to
    messages = list(open_frames(str(path), SPEC, sparse, policy=DecodePolicy(decoder="pyav")))
    sizes = [len(message.numbers_N) for message in messages if isinstance(message, FrameBlock)]
    assert len(sizes) >= 9
    assert sum(sizes) == 8


def test_a_large_file_is_not_for_decord(tmp_path: Path) -> None:
    """decord queues the packets of a whole file, so its memory grows with the file: large ones go to PyAV."""
    found = probe(str(make.video(tmp_path / "v.mp4", "libx264", 20, options=NO_B)), DecodeLimits())
    assert 0 < found.packet_bytes < (tmp_path / "v.mp4").stat().st_size
    assert route(found, AUTO, SPEC)[0] == "decord"
    name, why = route(replace(found, packet_bytes=65 * 1024**2), AUTO, SPEC)
    assert (name, "65 MiB of packets" in why) == ("pyav", True)


def test_random_clips_go_through_decode_and_extract(tmp_path: Path) -> None:
    """From two equal files to rows, by both decoders: for each video exactly the frames of its own random clips are
    sent, the rows are of these frames, and the clips of the two videos differ."""
    sampling = parse_sampling("random:3@4", clip_frames=4)
    for name in ("a.mp4", "b.mp4"):
        make.video(tmp_path / name, "libx264", 90, options=NO_B)
    videos = tuple(VideoRef(**row) for row in find(str(tmp_path), StoreOptions()).videos.to_pylist())
    shard, starts = ShardPlan(1, "0123abcd", 0, videos), []
    for decoder in ("decord", "pyav"):
        policy = DecodePolicy(decoder=decoder)  # type: ignore[arg-type] # one of the two
        where = {"policy": policy, "limits": DecodeLimits(), "store_options": StoreOptions(), "scratch": tmp_path}
        messages = [
            (at, one) for at, video in enumerate(videos) for one in decode_messages(video, SPEC, sampling, **where)
        ]  # type: ignore[arg-type]

        def encode(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
            written_N = np.array(make.numbers_in(frames_NHWC), np.float32) + 1
            return written_N[index_BT], np.empty((len(index_BT), 0), np.float32)

        rows = extract_shard(
            shard,
            messages,
            encode,
            sampling=sampling,
            batch_size=4,
            feature_dim=4,
            n_scores=0,
            embedding_dtype="float32",
        )
        for at, video in enumerate(videos):
            sent = [n for i, one in messages if i == at and isinstance(one, FrameBlock) for n in one.numbers_N.tolist()]
            assert sent == needed_frames(sampling.for_video(video.video_id), 90).tolist()
        starts.append([clip.span.start_frame for clip in rows.clips])
        np.testing.assert_array_equal(rows.features_RD, np.array(starts[-1])[:, None] + np.arange(1, 5))
    assert starts[0] == starts[1] and len(starts[0]) == 6 and starts[0][:3] != starts[0][3:]


def test_auto_takes_the_faster_of_two_correct_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` uses PyAV for small pictures and codecs for which decord is slower, and says so; decord reads both."""
    monkeypatch.undo()
    for codec, hw, expected in (
        ("prores_ks", (240, 320), "pyav"),
        ("prores_ks", (300, 400), "decord"),
        ("prores_ks", (640, 160), "pyav"),
        ("prores_ks", (720, 176), "decord"),
        ("libx264", (300, 400), "pyav"),
        ("mpeg4", (300, 400), "pyav"),
    ):
        pixel_format = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        path = make.video(tmp_path / "video.mov", codec, 4, hw=hw, pixel_format=pixel_format)
        found = probe(str(path), DecodeLimits())
        name, why = route(found, AUTO, SPEC)
        assert name == expected and ("faster" in why) == (expected == "pyav")
        assert route(found, DecodePolicy(decoder="decord"), SPEC)[0] == "decord"
