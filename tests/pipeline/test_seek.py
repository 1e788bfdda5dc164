"""Exact seek: where `exact_seek` holds, a decode from any key frame gives the frames of a decode from the start."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode import seek as seek_module
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.key_frames import KeyFrame, all_proved, key_frame
from p3d.pipeline.decode.probe import Probe, probe
from p3d.pipeline.decode.routes import pyav as pyav_route_module
from p3d.pipeline.decode.routes.choice import exact_seek, route
from p3d.pipeline.decode.routes.decord import DecordGaveUp, open_decord, read_decord
from p3d.pipeline.decode.routes.pyav import read_pyav, seek_pyav
from p3d.pipeline.decode.seek import (
    SelectiveDecodeError,
    Source,
    cut,
    gop_packets,
    joined,
    needed_packets,
    number_at,
    opened,
    spared_frames,
    wanted_gops,
)
from p3d.pipeline.decode.skippable_frames import layer_of
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import INT64, FrameBlock, FrameSpec, VideoEnd, VideoInfo
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.pipeline.test_decode_shared import GOOD, sample
from tests.zoo import make

SPEC = FrameSpec(crop_hw=(100, 128), resize_hw=(100, 128))
LIMITS = DecodeLimits()
ALL = Wanted(parse_sampling("every:16", clip_frames=16), None)
N_FRAMES = 36


@dataclass(frozen=True)
class Numbers(Wanted):
    """Exactly these frames."""

    sampling: None = None
    ticks_M: None = None
    numbers: tuple[int, ...] = ()

    def of(self, start_s_N: object, end_s_N: object) -> INT64:
        return np.array(self.numbers, np.int64)


def concatenated(messages: Iterable[object]) -> list[np.ndarray]:
    """Numbers, start, end and pixels of all blocks."""
    blocks = [m for m in messages if isinstance(m, FrameBlock) and len(m.numbers_N)]
    return [np.concatenate([getattr(block, field) for block in blocks]) for field in FrameBlock.__slots__]


def assert_every_tail_is_the_same(path: Path | str, *, may_give_up: bool = False) -> int:
    """Compare decodes with one of the whole video; returns the number of key frames.

    By each route: from every key frame to the end, and three frames from there. By PyAV also: arbitrary frames, with
    only the packets that they need. decord may give up if `may_give_up`: it miscounts some streams, which are then
    decoded whole.
    """
    found = probe(str(path), LIMITS, skippable=True)
    assert exact_seek(found)
    whole = concatenated(read_pyav(found, SPEC, ALL, DecodePolicy(), LIMITS))
    assert whole[0].tolist() == list(range(found.n_frames))
    for key in found.key_frames.tolist():
        for end in (found.n_frames, min(key + 3, found.n_frames)):
            wanted = Numbers(numbers=tuple(range(key, end)))
            for got in routes(found, wanted, may_give_up=may_give_up):
                assert all((mine == its[key:end]).all() for mine, its in zip(got, whole, strict=True)), (key, end)
    for step in (1, 2, 3, 7):
        some = np.flatnonzero(np.random.default_rng(step).integers(0, step + 1, found.n_frames) == 0)
        for numbers_M in filter(len, (some, np.arange(step - 1, found.n_frames, step))):
            got = concatenated(seek_pyav(found, SPEC, Numbers(numbers=tuple(numbers_M.tolist())), LIMITS))
            assert all((mine == its[numbers_M]).all() for mine, its in zip(got, whole, strict=True)), numbers_M
    return len(found.key_frames)


def routes(found: Probe, wanted: Wanted, *, may_give_up: bool) -> Iterator[list[np.ndarray]]:
    yield concatenated(seek_pyav(found, SPEC, wanted, LIMITS))
    try:
        route(found, DecodePolicy("decord"), SPEC)
    except VideoError:
        return
    with contextlib.suppress(*([DecordGaveUp] if may_give_up else [])):
        yield concatenated(read_decord(open_decord(found, SPEC), found, SPEC, wanted))


X265 = "log-level=none:keyint=10:min-keyint=10:scenecut=0:bframes=3"
X264 = "keyint=9:min-keyint=9:scenecut=0:b-adapt=0:bframes=5:ref=4:open-gop=0:b-pyramid="
ALTREF = {"deadline": "good", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}
FAST = {"preset": "ultrafast"}
EXACT: dict[str, dict[str, object]] = {
    "intra.mp4": {"codec": "libx264", "n_frames": 12, "gop": 1, "options": FAST},
    "b.mp4": {"codec": "libx264", "gop": 7, "options": {"preset": "veryfast"}},
    "scenes.mkv": {"codec": "libx264", "options": {"preset": "veryfast", "x264-params": "scenecut=90:min-keyint=1"}},
    "pyramid.mp4": {
        "codec": "libx264",
        "options": {"x264-params": X264 + "normal:weightp=2:direct=temporal"},
    },
    "strict.mkv": {"codec": "libx264", "options": {"x264-params": X264 + "strict:slices=4"}},
    "fields.mp4": {"codec": "libx264", "options": {"x264-params": X264 + "none:tff=1:direct=spatial"}},
    "10bit.mkv": {"codec": "libx264", "gop": 10, "options": FAST, "pixel_format": "yuv420p10le"},
    "fragments.mp4": {
        "codec": "libx264",
        "gop": 10,
        "options": {"preset": "veryfast"},
        "muxer": {"movflags": "frag_keyframe+empty_moov"},
    },
    "late.mp4": {
        "codec": "libx264",
        "gop": 7,
        "pts": range(50, 50 + N_FRAMES),
        "muxer": {"avoid_negative_ts": "disabled"},
        "options": {"preset": "veryfast"},
    },
    "vfr.mkv": {"codec": "libx264", "gop": 7, "pts": [3 * i + i % 3 for i in range(N_FRAMES)], "options": FAST},
    "turned.mov": {"codec": "libx264", "gop": 7, "rotation": 180, "options": FAST},
    "hevc.mp4": {"codec": "libx265", "options": {**FAST, "x265-params": X265 + ":open-gop=0"}},
    "hevc_pyramid.mkv": {"codec": "libx265", "options": {**FAST, "x265-params": X265 + ":open-gop=0:b-pyramid=1"}},
    "hevc_layers.mp4": {"codec": "libx265", "options": {**FAST, "x265-params": X265 + ":open-gop=0:temporal-layers=3"}},
    "vp8.webm": {"codec": "libvpx", "gop": 10, "options": ALTREF},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 10, "options": ALTREF},
    "vp9.mp4": {"codec": "libvpx-vp9", "gop": 10, "options": ALTREF},
    "av1.mp4": {"codec": "libsvtav1", "gop": 10, "options": {"preset": "13"}},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 8},
    "mjpeg.mkv": {"codec": "mjpeg", "n_frames": 12, "pixel_format": "yuvj420p"},
    "prores.mov": {"codec": "prores_ks", "n_frames": 12, "pixel_format": "yuv422p10le"},
}
# videos without exact seek
NOT_EXACT: dict[str, dict[str, object]] = {
    "open.mp4": {
        "codec": "libx264",
        "options": {**FAST, "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:b-adapt=0:bframes=3"},
    },
    "refresh.mp4": {"codec": "libx264", "options": {**FAST, "x264-params": "intra-refresh=1:keyint=10:bframes=0"}},
    "hevc_open.mp4": {"codec": "libx265", "options": {**FAST, "x265-params": X265}},
    "hevc_led.mp4": {"codec": "libx265", "options": {**FAST, "x265-params": X265 + ":open-gop=0:radl=2"}},
    "mpeg4_b.mp4": {"codec": "mpeg4", "gop": 8, "b_frames": 2},
    "trimmed.mp4": {
        "codec": "libx264",
        "gop": 7,
        "pts": range(-10, N_FRAMES - 10),
        "muxer": {"avoid_negative_ts": "disabled"},
        "options": FAST,
    },
    "444.mp4": {"codec": "libx264", "gop": 10, "options": FAST, "pixel_format": "yuv444p"},
    "h264.ts": {"codec": "libx264", "gop": 10, "options": FAST},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 8},
}


def made(path: Path, **how: object) -> Path:
    how = {"n_frames": N_FRAMES, "hw": (128, 192), "noise": 25, **how}
    return make.video(path, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", EXACT)
def test_a_decode_from_every_key_frame_equals_the_tail_of_the_whole(name: str, tmp_path: Path) -> None:
    """Pixels, numbers and times from each key frame on are those of a decode from front to back, on both routes."""
    assert assert_every_tail_is_the_same(made(tmp_path / name, **EXACT[name])) >= (1 if name == "scenes.mkv" else 4)


@pytest.mark.parametrize("name", NOT_EXACT)
def test_without_proof_nothing_is_skipped(name: str, tmp_path: Path) -> None:
    """Open GOPs, refreshes without key frames, leading pictures, edit lists and other containers are read whole."""
    path = made(tmp_path / name, **NOT_EXACT[name])
    assert not exact_seek(probe(str(path), LIMITS))
    seen = list(open_frames(str(path), SPEC, parse_sampling("uniform:1", clip_frames=4), policy=DecodePolicy()))
    assert isinstance(seen[-1], VideoEnd)


@pytest.mark.parametrize("name", [name for name in GOOD if "long_20fps" not in name])
@pytest.mark.timeout(60)
def test_every_key_frame_of_the_samples(name: str) -> None:
    """The same for each sample for which exact seek holds."""
    if exact_seek(probe(sample(name), LIMITS)):
        assert_every_tail_is_the_same(sample(name))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gop=st.integers(1, 14),
    b_frames=st.integers(0, 4),
    references=st.integers(1, 5),
    forced=st.sets(st.integers(1, N_FRAMES - 1), max_size=5),
    steps=st.lists(st.integers(1, 4), min_size=N_FRAMES, max_size=N_FRAMES),
    container=st.sampled_from(("mp4", "mov", "mkv")),
    first_pts=st.integers(0, 40),
)
@example(  # decord counts 2 of the 4 frames of one in-memory file, and gives up
    gop=3,
    b_frames=2,
    references=1,
    forced={16},
    steps=[*[1] * 13, 4, 3, *[1] * (N_FRAMES - 15)],
    container="mp4",
    first_pts=0,
)
def test_any_structure_of_gops(
    gop: int,
    b_frames: int,
    references: int,
    forced: set[int],
    steps: list[int],
    container: str,
    first_pts: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """GOPs of any length, forced key frames, any reordering and any frame times: every tail is the same."""
    path = tmp_path_factory.mktemp("v") / f"v.{container}"
    options = {"preset": "ultrafast", "x264-params": f"keyint={gop}:min-keyint=1:ref={references}:b-adapt=0"}
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={**options, "bf": str(b_frames), "forced-idr": "1"})
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        pts = first_pts
        for number in range(N_FRAMES):
            frame = av.VideoFrame.from_ndarray(make.picture(number, 96, 160), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            frame.pict_type = PictureType.I if number in forced else PictureType.NONE
            output.mux(stream.encode(frame))
            pts += steps[number]
        output.mux(stream.encode())
    found = probe(str(path), LIMITS)
    assume(found.n_frames >= found.n_promised)  # hypothesis once found a file with 35 packets for 36 frames
    note(f"{assert_every_tail_is_the_same(path, may_give_up=True)} key frames")
    # three clips of the whole, through `open_frames`, equal those of PyAV even if decord fails on the in-memory files
    by_auto, by_pyav = pictures(path, "auto"), pictures(path, "pyav")
    assert by_pyav and all(np.array_equal(by_auto[number], frame) for number, frame in by_pyav.items())


def pictures(path: Path, decoder: str) -> dict[int, np.ndarray]:
    """Number -> pixels of the frames of three clips; if the decode started again, those of the last start."""
    sampling, found = parse_sampling("uniform:3", clip_frames=4), {}
    for message in open_frames(str(path), SPEC, sampling, policy=DecodePolicy(decoder)):  # type: ignore[arg-type]
        if isinstance(message, VideoInfo):
            found = {}
        if isinstance(message, FrameBlock):
            found.update(zip(message.numbers_N.tolist(), message.frames_NHWC, strict=True))
    return found


def remuxed(source: Path, path: Path, is_key: object) -> Path:
    """The same packets; `is_key(number, was)` says which are marked as key frames."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        copy = output.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(video=0)):
            if packet.size:
                packet.is_keyframe = is_key(number, packet.is_keyframe)  # type: ignore[operator]
                packet.stream = copy
                output.mux(packet)
    return path


@pytest.mark.parametrize("name", ["mpeg4.mp4", "hevc.mp4"])
def test_false_key_frames(name: str, tmp_path: Path) -> None:
    """A container that marks every frame as a key frame is not trusted, and the frames are still right."""
    path = remuxed(made(tmp_path / f"w_{name}", **EXACT[name]), tmp_path / name, lambda number, was: True)
    found = probe(str(path), LIMITS)
    assert len(found.key_frames) > 20 and not found.proved_keys and not exact_seek(found)
    sparse = parse_sampling("every:30", clip_frames=2)
    numbers_N, _, _, frames_NHWC = concatenated(open_frames(str(path), SPEC, sparse, policy=DecodePolicy()))
    assert numbers_N.tolist() == make.numbers_in(frames_NHWC) == [0, 1, 30, 31, 34, 35]


@pytest.mark.usefixtures("decord_if_right")
def test_decord_is_not_stopped_at_false_key_frames(tmp_path: Path) -> None:
    """Where key frames are not proved, decord reads a video of one GOP chunk, and PyAV a longer one."""
    whole = make.looped(made(tmp_path / "w.mp4", codec="mpeg4", gop=9, hw=(128, 192)), tmp_path / "long.mp4", 8)
    assert route(probe(str(whole), LIMITS), DecodePolicy(), SPEC)[0] == "decord"
    false = probe(str(remuxed(whole, tmp_path / "false.mp4", lambda number, was: True)), LIMITS)
    name, why = route(false, DecodePolicy(), SPEC)
    assert name == "pyav" and "not proved clean starts" in why and false.n_frames == 8 * N_FRAMES
    assert route(replace(false, n_frames=N_FRAMES, n_promised=0), DecodePolicy(), SPEC)[0] == "decord"


def test_decord_gets_a_long_file_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames are those of PyAV, and the file itself is never read by decord."""
    whole = made(tmp_path / "w.mp4", codec="libx264", gop=7, options={"preset": "veryfast"})
    found = probe(str(make.looped(whole, tmp_path / "long.mp4", 9)), LIMITS)
    reader, by_pyav = open_decord(found, SPEC), concatenated(read_pyav(found, SPEC, ALL, DecodePolicy(), LIMITS))
    monkeypatch.setattr("p3d.pipeline.decode.routes.decord.in_pieces", exact_seek)
    monkeypatch.setattr(reader, "get_batch", None)
    by_decord = concatenated(read_decord(reader, found, SPEC, ALL))
    assert all((mine == its).all() for mine, its in zip(by_decord, by_pyav, strict=True))
    assert by_decord[0].tolist() == list(range(9 * N_FRAMES))


def test_unmarked_key_frames(tmp_path: Path) -> None:
    """A container that does not mark some key frames only costs time."""
    whole = made(tmp_path / "w.mp4", **EXACT["mpeg4.mp4"])
    unmarked = remuxed(whole, tmp_path / "unmarked.mp4", lambda number, was: was and number % 16 == 0)
    assert assert_every_tail_is_the_same(unmarked) < len(probe(str(whole), LIMITS).key_frames)


def test_only_the_wanted_gops_are_decoded(tmp_path: Path) -> None:
    """PyAV gets only the packets of the wanted GOPs, and decord a file of them."""
    found = probe(str(made(tmp_path / "v.mp4", codec="libx264", gop=6, options=FAST)), LIMITS)
    gops = wanted_gops(found, np.array([7, 8, 13, 35]))
    assert gops == [(6, 12), (12, 18), (30, 36)] and joined(gops) == [(6, 18), (30, 36)]
    assert joined(gops, 6) == gops
    with opened(found) as source:
        assert len(list(gop_packets(source, found, 6, 18))) == 12
        with cut(source, found, joined(gops)) as path, av.open(path) as container:
            assert sum(1 for packet in container.demux() if packet.size) == 18


@pytest.mark.parametrize(
    ("name", "skippable"),
    [
        *((name, True) for name in ("pyramid.mp4", "strict.mkv", "fields.mp4", "hevc.mp4", "hevc_layers.mp4")),
        *((name, False) for name in ("10bit.mkv", "vp9.webm", "mpeg4.mp4")),
    ],
)
def test_skippable_frames_are_left_out(name: str, skippable: bool, tmp_path: Path) -> None:
    """From each GOP, PyAV gets no packet after the last wanted one, and no skippable one that is not wanted."""
    found = probe(str(made(tmp_path / name, **EXACT[name])), LIMITS, skippable=True)
    assert found.skippable_N is not None and found.skippable_N.any() == skippable
    assert not found.skippable_N[found.key_frames].any()
    keys = [*found.key_frames.tolist(), found.n_frames]
    at = next(at for at, key in enumerate(keys) if keys[at + 1] >= key + 5)
    first, second, end = keys[at : at + 3]
    wanted_M = np.array([first + 2, second])
    with opened(found) as source:
        stored = [number_at(found, source, packet.pts) for packet in gop_packets(source, found, first, end)]
        sent = [number for number, _ in needed_packets(source, found, wanted_M, first, end)]
    before = stored[: stored.index(first + 2) + 1]
    needed = [one for one in before if one == first + 2 or not found.skippable_N[one]]
    assert sent == [*needed, second] and len(sent) < len(stored)
    assert probe(found.path, LIMITS).skippable_N is None


def test_below_the_highest_temporal_layer_none_is_skippable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet describes only its own layer, and frames of a higher layer may refer to it."""
    path = str(made(tmp_path / "v.mp4", codec="libx264", gop=6, options={**FAST, "bf": "0"}))
    says = iter([(0, False), (1, True), (0, True), (2, True), (2, False), (1, True)] * 6)
    monkeypatch.setattr(importlib.import_module("p3d.pipeline.decode.probe"), "layer_of", lambda *_: next(says))
    skippable_N = probe(path, LIMITS, skippable=True).skippable_N
    assert skippable_N is not None and np.flatnonzero(skippable_N).tolist() == list(range(3, N_FRAMES, 6))


@pytest.mark.parametrize("how", ["twice", "out of order", "not requested"])
def test_decoded_frames_that_do_not_match_their_packets(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They raise SelectiveDecodeError, even if the video has a frame at each of their times."""
    path = made(tmp_path / "v.mp4", codec="libx264", gop=6, options={**FAST, "bf": "0"})
    found, real = probe(str(path), LIMITS), pyav_route_module._decoded

    def mismatched(*given: object) -> Iterator[object]:
        frames = list(real(*given))  # type: ignore[arg-type]
        sent = given[-1]
        assert isinstance(sent, set)
        if how == "twice":
            sent.add(6)
            frames.insert(1, frames[0])
        elif how == "out of order":
            frames[:2] = frames[1::-1]
        else:
            sent.remove(7)
        return iter(frames)

    wanted = Numbers(numbers=(6, 7, 8))
    assert concatenated(seek_pyav(found, SPEC, wanted, LIMITS))[0].tolist() == [6, 7, 8]
    monkeypatch.setattr(pyav_route_module, "_decoded", mismatched)
    with pytest.raises(SelectiveDecodeError, match="came after"):
        list(seek_pyav(found, SPEC, wanted, LIMITS))


def test_how_many_frames_are_spared(tmp_path: Path) -> None:
    """Those of other GOPs, those after the last wanted one, and skippable ones: each counts once."""
    found = probe(str(made(tmp_path / "v.mp4", codec="libx264", gop=6, options={**FAST, "bf": "0"})), LIMITS)
    assert spared_frames(found, np.array([6, 8, 13])) == 36 - 3 - 2
    skippable_N = np.zeros(36, np.bool_)
    skippable_N[[7, 8, 10, 12, 30]] = True
    assert spared_frames(replace(found, skippable_N=skippable_N), np.array([6, 8, 13])) == 36 - 3 - 2 + 2
    assert spared_frames(found, np.arange(36)) == 0 and spared_frames(found, np.empty(0, np.int64)) == 36


@pytest.mark.usefixtures("decord_if_right")
@pytest.mark.parametrize("clips", ["every:20", "every:16"])
def test_clips_that_leave_frames_out_are_read_by_pyav(clips: str, tmp_path: Path) -> None:
    """Under `auto`, if enough frames can be left out; frames equal those of decord, with and without a rate."""
    params = "keyint=50:min-keyint=50:scenecut=0:b-adapt=0:bframes=3"
    path = made(tmp_path / "v.mp4", codec="libx264", n_frames=100, options={**FAST, "x264-params": params})
    for fps, few in ((None, clips == "every:20"), (8.0, True)):
        sampling = parse_sampling(clips, clip_frames=8 if few else 16, fps=fps)
        policies = DecodePolicy("auto"), DecodePolicy("decord")
        auto, decord = (list(open_frames(str(path), SPEC, sampling, policy=policy)) for policy in policies)
        assert isinstance(auto[0], VideoInfo) and auto[0].route == ("pyav" if few else "decord")
        assert all((a == b).all() for a, b in zip(concatenated(auto), concatenated(decord), strict=True))


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("clips", ["every:16", "uniform:20"])
def test_nothing_is_decoded_ahead_of_a_reader_that_stalls(decoder: str, clips: str, tmp_path: Path) -> None:
    """Once a block has come, no thread of the process works until the next is requested."""
    clip = made(tmp_path / "clip.mp4", codec="libx264", n_frames=250, gop=50, options=FAST)
    long = make.looped(clip, tmp_path / "long.mp4", 30)
    sampling = parse_sampling(clips, clip_frames=16)
    messages = open_frames(str(long), SPEC, sampling, policy=DecodePolicy(decoder))  # type: ignore[arg-type]
    block = next(message for message in messages if isinstance(message, FrameBlock))
    before_s = time.process_time()
    time.sleep(0.3)  # no event can tell that nothing happens
    worked_s = time.process_time() - before_s
    assert len(block.numbers_N) and worked_s < 0.01


DAMAGED_GOP = 3  # of six


def damaged(tmp_path: Path, gop: int) -> Path:
    """A video with one GOP overwritten, except for the first bytes of its key frame."""
    whole = made(tmp_path / "w.mp4", codec="libx264", gop=6, noise=60, options={**FAST, "bf": "0"})
    content = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packet = next(p for n, p in enumerate(container.demux(video=0)) if n == 6 * gop + 1)
        content[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(content))
    return path


@pytest.mark.fault(16)
@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("partial", ["fail", "keep"])
def test_damage_counts_only_in_decoded_gops(decoder: str, partial: str, tmp_path: Path) -> None:
    """Damage in a GOP that no clip needs goes unnoticed, and the rows equal those of the whole file. In a GOP that is
    needed, it is handled as usual, in a decode from the first frame on."""
    path = damaged(tmp_path, DAMAGED_GOP)
    policy = DecodePolicy(decoder, partial)  # type: ignore[arg-type]
    sparse = parse_sampling("every:30", clip_frames=2)  # frames 0, 1, 30, 31 and the last two
    messages = list(open_frames(str(path), SPEC, sparse, policy=policy))
    assert sum(isinstance(m, VideoInfo) for m in messages) == 1
    assert messages[-1] == VideoEnd(N_FRAMES, pytest.approx(N_FRAMES / 25))  # type: ignore[arg-type]
    numbers_N, _, _, frames_NHWC = concatenated(messages)
    assert numbers_N.tolist() == make.numbers_in(frames_NHWC) == [0, 1, 30, 31, 34, 35]
    hit = parse_sampling("every:20", clip_frames=2)  # 20 is in the damaged GOP
    if partial == "fail" or decoder == "decord":
        with pytest.raises(VideoError) as caught:
            list(open_frames(str(path), SPEC, hit, policy=policy))
        assert caught.value.reason is Reason.CORRUPT_FRAMES
    else:
        messages = list(open_frames(str(path), SPEC, hit, policy=policy))
        infos = [at for at, m in enumerate(messages) if isinstance(m, VideoInfo)]
        assert len(infos) == 2 and isinstance(messages[-1], VideoEnd) and messages[-1].truncated
        numbers_N, _, _, frames_NHWC = concatenated(messages[infos[-1] :])
        assert 18 <= messages[-1].n_frames <= 20 and numbers_N.tolist() == make.numbers_in(frames_NHWC)


def test_a_frame_at_another_time_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose times differ from the probe's is read from front to back, with the right frames."""
    path = made(tmp_path / "v.mp4", codec="libx264", gop=6, options=FAST)
    found = probe(str(path), LIMITS)
    wrong = replace(found, key_dts_K=found.key_dts_K + 512, key_pts_K=found.key_pts_K + 512)
    shifted = [replace(found, first_pts=found.first_pts + ticks) for ticks in (512, 1)]  # by a frame, by less
    for other in (wrong, *shifted):
        with pytest.raises(SelectiveDecodeError):
            list(seek_pyav(other, SPEC, Numbers(numbers=(13, 14)), LIMITS))

    def all_but(lost: int) -> None:
        def incomplete(source: Source, found: Probe, first: int, end: int) -> Iterator[object]:
            packets = list(gop_packets(source, found, first, end))
            yield from packets[:lost] + packets[lost + 1 :]

        monkeypatch.setattr(seek_module, "gop_packets", incomplete)

    sparse = parse_sampling("every:30", clip_frames=6)
    for lost in range(6):  # one packet of each range, which is a GOP
        all_but(lost)
        messages = list(open_frames(str(path), SPEC, sparse, policy=DecodePolicy()))
        infos = [at for at, m in enumerate(messages) if isinstance(m, VideoInfo)]
        assert len(infos) == 2, "the missing packet was not noticed"
        numbers_N, _, _, frames_NHWC = concatenated(messages[infos[-1] :])
        assert numbers_N.tolist() == make.numbers_in(frames_NHWC) == [*range(6), *range(30, 36)]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "gif"])
@given(extradata=st.binary(max_size=30), packet=st.binary(max_size=200))
@settings(max_examples=60)
def test_any_bytes_have_an_answer(codec: str, extradata: bytes, packet: bytes) -> None:
    """No packet, however broken, makes the functions raise or loop without end."""
    assert isinstance(key_frame(codec, b"\x01" + extradata, memoryview(packet)), KeyFrame)
    assert layer_of(codec, b"\x01" + extradata, memoryview(packet))[0] in range(-1, 7)


H264_HEAD, HEVC_HEAD = b"\x01" + bytes(3) + b"\xff", b"\x01" + bytes(20) + b"\xff"


@pytest.mark.parametrize(
    ("codec", "units", "layer", "skippable"),
    [
        ("h264", ["0190", "0190"], 0, True),
        ("h264", ["0930", "0605", "0190"], 0, True),
        ("h264", ["0190", "4190"], 0, False),  # a second field to which others refer
        ("h264", ["6742", "0190"], 0, False),  # parameter sets, which later frames need
        ("h264", ["6842", "0190"], 0, False),
        ("h264", ["0290"], 0, False),  # data partitions
        ("h264", ["0590"], 0, False),
        ("h264", ["0605"], 0, False),  # no slice
        ("h264", ["0190", "1490"], 0, False),  # a second view
        ("hevc", ["0001"], 0, True),
        ("hevc", ["4601", "0003", "0003"], 2, True),
        ("hevc", ["0401"], 0, True),
        ("hevc", ["0001", "0201"], 0, False),
        ("hevc", ["1001"], 0, False),  # leading pictures
        ("hevc", ["2601"], 0, False),
        ("hevc", ["0009"], 0, False),  # another view
        ("hevc", ["4401", "0001"], 0, False),
        ("vp9", ["0001"], 0, False),
    ],
)
def test_skippable_packets(codec: str, units: list[str], layer: int, skippable: bool) -> None:
    """By slices and the NAL units next to them; a packet whose lengths do not add up is never skippable."""
    head = HEVC_HEAD if codec == "hevc" else H264_HEAD
    packet = b"".join(len(bytes.fromhex(unit)).to_bytes(4, "big") + bytes.fromhex(unit) for unit in units)
    assert layer_of(codec, head, memoryview(packet)) == (layer, skippable)
    for broken in (packet[:-1], packet + b"\0", packet + bytes(4)):
        assert layer_of(codec, head, memoryview(broken)) == (0, False)


def test_parameter_sets_come_with_all_or_with_none() -> None:
    """If only some key frames include parameter sets, a seek might miss them."""
    assert all_proved({KeyFrame.CLEAN}) and all_proved({KeyFrame.WITH_PARAMETERS})
    assert not all_proved({KeyFrame.CLEAN, KeyFrame.WITH_PARAMETERS})
    assert not all_proved({KeyFrame.CLEAN, KeyFrame.UNPROVED}) and not all_proved(set())


def test_encoders_leave_the_thread_priority_unchanged(tmp_path: Path) -> None:
    """SVT-AV1, run by root, makes its caller a real-time thread; `make.video` undoes that."""
    before = os.sched_getscheduler(0)
    make.video(tmp_path / "av1.mp4", "libsvtav1", 4)
    assert os.sched_getscheduler(0) == before
