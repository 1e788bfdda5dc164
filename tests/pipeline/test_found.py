"""Bugs that fuzzing found (`make fuzz-videos`), one test each: files that ended in a defect or a wrong result."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.container import raise_unless_damage
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.decord import DecordGaveUp, read_decord
from p3d.pipeline.decode.wanted_frames import wanted_by
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec, VideoInfo
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import cases, make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))
BY_SIDE = FrameSpec(crop_hw=(112, 112), short_side=128)
ENDS = {Reason.TRUNCATED, Reason.CORRUPT_FRAMES, Reason.NO_VIDEO_STREAM, Reason.NOT_A_VIDEO, Reason.NO_FRAMES}
EVERY = parse_sampling("every:16", clip_frames=16)


def numbers(path: Path, partial: str = "fail") -> list[int]:
    messages = open_frames(str(path), SPEC, EVERY, policy=DecodePolicy(partial=partial))  # type: ignore[arg-type]
    return make.numbers_in(np.concatenate([m.frames_NHWC for m in messages if isinstance(m, FrameBlock)]))


def refused(path: Path, spec: FrameSpec = SPEC, decoder: str = "auto") -> Reason:
    with pytest.raises(VideoError) as caught:
        list(open_frames(str(path), spec, EVERY, policy=DecodePolicy(decoder=decoder)))  # type: ignore[arg-type]
    return caught.value.reason


def with_audio_first(path: Path, n_frames: int, rotation: int) -> Path:
    """Stream 0 is sound, stream 1 a turned video whose decoder returns its pictures only when it is flushed."""
    with av.open(str(path), "w") as output:
        sound = output.add_stream("aac", rate=16000)
        pictures = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "3"})
        pictures.height, pictures.width, pictures.pix_fmt = 192, 192, "yuv420p"
        pictures.set_display_rotation(rotation)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(sound.encode(frame))
        for number in range(n_frames):
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(make.picture(number, 192, 192), format="rgb24")))
        for stream in (sound, pictures):
            output.mux(stream.encode())
    return path


@pytest.mark.fault(18)
@pytest.mark.parametrize("n_frames", [1, 3])
def test_a_short_video_after_its_sound_is_turned_too(n_frames: int, tmp_path: Path) -> None:
    """The flush packet of stream 1 was attributed to stream 0, so the first picture and its rotation were missed."""
    path = with_audio_first(tmp_path / "v.mp4", n_frames, 90)
    messages = list(open_frames(str(path), SPEC, EVERY, policy=DecodePolicy()))
    (info,) = [m for m in messages if isinstance(m, VideoInfo)]
    assert (info.stream_index, info.rotation) == (1, 270)
    frames_NHWC = np.concatenate([m.frames_NHWC for m in messages if isinstance(m, FrameBlock)])
    assert make.numbers_in(np.rot90(frames_NHWC, -1, axes=(1, 2))) == list(range(n_frames))


@pytest.mark.fault(18)
def test_streams_that_appear_in_mid_file_are_no_defect(tmp_path: Path) -> None:
    """A broadcast in which sound starts midway is read to its end, every frame once."""
    one = make.video(tmp_path / "a.ts", "libx264", 200, options=cases.FAST | {"qp": "1"}, noise=120)
    two = with_audio_first(tmp_path / "b.ts", 12, 0)
    joined = tmp_path / "c.ts"
    joined.write_bytes(one.read_bytes() + two.read_bytes() + one.read_bytes())  # FFmpeg also reads the end
    assert joined.stat().st_size > 6_000_000  # FFmpeg looks for streams in the first 5 MB
    found = probe(str(joined), DecodeLimits())
    assert found.n_frames >= 400
    with av.open(str(joined)) as container:
        assert len(container.streams) == 1, "all streams were there from the start: nothing is tested"
    assert len(numbers(joined)) == found.n_frames


@pytest.mark.fault(16)
def test_a_file_that_ends_before_its_first_stream(tmp_path: Path) -> None:
    """FFmpeg's "end of file" and "input/output error" for a cut file concern the file, not the machine."""
    whole = make.video(tmp_path / "w.mkv", "libx264", 24, options=cases.FAST, noise=40)
    raw = make.video(tmp_path / "w.h264", "libx264", 16, options=cases.FAST, container="h264")
    for source, sizes in ((whole, (30, 100, 400, 700, 1500)), (raw, (5, 20, 100))):
        for n_bytes in sizes:
            cut = make.cut(source, tmp_path / f"c{source.suffix}", n_bytes / source.stat().st_size)
            assert refused(cut) in ENDS, (source.suffix, n_bytes)


@pytest.mark.fault(16)
def test_a_disk_that_fails_is_not_attributed_to_the_file(tmp_path: Path) -> None:
    """The same FFmpeg errors for a file whose bytes cannot be read propagate unchanged."""
    error = av.error.OSError(5, "Input/output error")
    whole = tmp_path / "v.mp4"
    whole.write_bytes(b"x" * 10)
    raise_unless_damage(error, str(whole))
    with pytest.raises(OSError, match="Input/output"):
        raise_unless_damage(error, "/proc/self/mem")  # reading it at 0 is an input/output error
    with pytest.raises(VideoError) as caught:
        raise_unless_damage(error, str(tmp_path / "gone.mp4"))
    assert caught.value.reason is Reason.SOURCE_MISSING
    with pytest.raises(MemoryError):
        raise_unless_damage(av.error.MemoryError(12, "Cannot allocate memory"), str(whole))


@pytest.mark.fault(16)
def test_a_stream_without_a_size_has_no_frames(tmp_path: Path) -> None:
    """A cut FLV names its codec but not its size; a division by its short side raised an error."""
    whole = make.video(tmp_path / "w.flv", "libx264", 24, options=cases.FAST, noise=40)
    content = bytearray(whole.read_bytes())
    start = content.index(b"avcC") if b"avcC" in content else 400
    for n_bytes in range(start, start + 1200, 100):
        cut = tmp_path / "c.flv"
        cut.write_bytes(bytes(content[:n_bytes]))
        assert refused(cut, BY_SIDE) in ENDS


@pytest.mark.fault(16, 17)
def test_damage_between_the_wanted_frames_is_always_noticed(tmp_path: Path) -> None:
    """When decord skipped frames, timing decided whether it noticed damage, and pixels varied each time (MJPEG)."""
    whole = make.video(tmp_path / "w.mov", "mjpeg", 12, pixel_format="yuvj420p")
    with av.open(str(whole)) as container:
        positions = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(whole.read_bytes())
    at, size = positions[8]
    assert at is not None
    content[at : at + size] = bytes(size)
    path = tmp_path / "damaged.mov"
    path.write_bytes(bytes(content))
    sparse = parse_sampling("uniform:2", clip_frames=2)  # frames 0, 1, 5 and 6
    for decoder in ("decord", "auto", "pyav") * 3:
        with pytest.raises(VideoError) as caught:
            list(open_frames(str(path), SPEC, sparse, policy=DecodePolicy(decoder=decoder)))  # type: ignore[arg-type]
        assert caught.value.reason is Reason.CORRUPT_FRAMES, decoder


@pytest.mark.fault(17)
def test_too_many_repeats_are_decord_giving_up(tmp_path: Path) -> None:
    """decord's error for repeated frames has its own class, which was taken for a defect of this program."""
    import decord

    class Repeats:
        def get_batch(self, _: object) -> None:
            raise decord.DECORDLimitReachedError("more than 0 duplicate frames that are corrupted")

    found = probe(str(cases.good(tmp_path / "v.mp4")), DecodeLimits())
    with pytest.raises(DecordGaveUp) as caught:
        list(read_decord(Repeats(), found, SPEC, wanted_by(EVERY, found.n_frames)))
    assert caught.value.reason is Reason.CORRUPT_FRAMES


@pytest.mark.fault(18)
def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    """Content decides: each container under the suffix of any other has the same format and frames."""
    for codec, suffix in (
        ("libx264", "mp4"),
        ("libx264", "mkv"),
        ("mpeg4", "avi"),
        ("mpeg2video", "ts"),
        ("gif", "gif"),
    ):
        pixel_format = "rgb8" if codec == "gif" else "yuv420p"
        path = make.video(tmp_path / f"v.{suffix}", codec, 12, pixel_format=pixel_format)
        container = probe(str(path), DecodeLimits()).container
        for other in ("mp4", "avi", "ts", "webm", "jpg", "txt"):
            renamed = Path(shutil.copy(path, tmp_path / f"{suffix}_as.{other}"))
            assert probe(str(renamed), DecodeLimits()).container == container
            assert numbers(renamed) == list(range(12))


@pytest.mark.fault(18)
def test_an_encrypted_file_that_ffmpeg_cannot_open_is_named_so(tmp_path: Path) -> None:
    """FFmpeg refuses some fragmented files with encryption boxes as invalid; they were called damaged."""
    path = make.video(tmp_path / "v.mp4", "libx264", 8, options=cases.FAST, muxer={"movflags": "frag_keyframe"})
    data = path.read_bytes()
    entry = data.index(b"avc1", data.index(b"stsd"))
    data = data[:entry] + b"encv" + data[entry + 4 :]
    table = data.index(b"stsd") - 4
    path.write_bytes(data[:table] + b"\0\0\0\x0c" + data[table + 4 :])  # a box that is too short for its content
    assert refused(path) is Reason.UNSUPPORTED
