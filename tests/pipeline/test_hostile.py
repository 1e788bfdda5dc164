"""Only the named file is read: no other file and no address, whatever its name or content refers to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import av
import numpy as np
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.watch import Listener, Opened, listening, opened
from tests.zoo import cases, hostile, make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))
EVERY = parse_sampling("every:16", clip_frames=16)


class Watched:
    """A folder with a decoy video that must not be opened, and a port that must not be contacted."""

    def __init__(self, root: Path, listener: Listener, seen: Opened) -> None:
        self.root, self.listener, self.seen = root, listener, seen
        self.decoy = root / "decoy.mov"

    def touched(self) -> list[object]:
        """Opens of the decoy and connections to the port since the last call."""
        return [*self.seen.take(), *self.listener.calls]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    decoy = make.video(tmp_path / "decoy.mov", "libx264", 20, options=cases.FAST)
    with listening() as listener, opened(decoy) as seen:
        yield Watched(tmp_path, listener, seen)


def numbers(path: Path, decoder: str = "auto") -> list[int]:
    blocks = open_frames(str(path), SPEC, EVERY, policy=DecodePolicy(decoder=decoder))  # type: ignore[arg-type]
    return make.numbers_in(np.concatenate([b.frames_NHWC for b in blocks if isinstance(b, FrameBlock)]))


def test_the_watch_sees_what_it_watches(watched: Watched) -> None:
    """An open of the decoy and a connection to the port are noticed; otherwise the tests below could not fail."""
    watched.decoy.read_bytes()
    with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{watched.listener.port}/", timeout=5):
        pass
    assert "decoy.mov" in watched.seen.take() and watched.listener.calls


@pytest.mark.fault(21)
def test_a_mov_whose_samples_are_in_another_file_reads_none_of_it(watched: Watched) -> None:
    """Neither decoder follows an external data reference; the test shows that FFmpeg does if it is allowed to."""
    whole = make.video(watched.root / "whole.mov", "libx264", 20, options=cases.FAST)
    path = hostile.outside_reference(whole, watched.root / "outside.mov", watched.decoy)
    with opened(watched.decoy) as seen:
        with av.open(str(path), container_options={"enable_drefs": "1"}) as container:
            assert len(list(container.decode(video=0))) == 20
        assert seen.take()
    watched.seen.take()
    for decoder in ("auto", "pyav", "decord"):
        with pytest.raises(VideoError):
            numbers(path, decoder)
    import decord

    with contextlib.suppress(decord.DECORDError, RuntimeError):
        decord.VideoReader(str(path), num_threads=1)
    assert watched.touched() == []


@pytest.mark.fault(21)
def test_playlists_are_not_videos(watched: Watched) -> None:
    """Playlists, also disguised ones, end in a reason; no file that they name is opened, no connection is made."""
    texts = hostile.texts(watched.decoy, watched.listener.port)
    for name, content in texts.items():
        (watched.root / name).write_bytes(content)
        for decoder in ("auto", "pyav", "decord"):
            with pytest.raises(VideoError) as caught:
                numbers(watched.root / name, decoder)
            assert caught.value.reason in (Reason.NOT_A_VIDEO, Reason.TRUNCATED), name
    assert watched.touched() == []


@pytest.mark.fault(21, 24)
def test_a_name_is_never_an_address(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that look like protocols, patterns or options are read as plain file names, by both decoders."""
    monkeypatch.chdir(watched.root)
    good = cases.good(watched.root / "good.mp4")
    for name in hostile.names(watched.decoy, watched.listener.port):
        shutil.copy(good, watched.root / name)
        for decoder in ("decord", "pyav"):
            assert numbers(Path(name), decoder) == list(range(20)), name
    assert watched.touched() == []


@pytest.mark.fault(21)
def test_only_known_demuxers_and_local_files_are_ever_opened(watched: Watched) -> None:
    """Files are opened with closed lists: no protocol but `file`, no demuxer that reads other files."""
    from p3d.pipeline.decode.container import DEMUXERS

    readers_of_others = {"hls", "concat", "dash", "image2", "sdp", "rtsp", "rtp", "lavfi", "imf", "applehttp", "tee"}
    assert not readers_of_others & set(DEMUXERS.split(","))
    passed: list[dict[str, str]] = []
    real = av.open

    def spy(path: str, **options: object) -> object:
        assert os.path.isabs(path)  # noqa: PTH117 - a str, as it is passed
        passed.append(options["container_options"])  # type: ignore[arg-type]
        return real(path, **options)

    good = cases.good(watched.root / "good.ts")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(av, "open", spy)
        numbers(good)
    assert len(passed) == 2 and all(one["protocol_whitelist"] == "file" for one in passed)
    assert all(one["format_whitelist"] == DEMUXERS for one in passed)


@pytest.mark.fault(20)
def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    """A canvas of 16384x16384 in a thousand bytes and a day of black: refused by the probe, with little memory."""
    peaks = []
    for name, reason in (("16k.gif", Reason.TOO_LARGE), ("a_day_and_more.mp4", Reason.TOO_LONG)):
        case = next(case for case in cases.CASES if case.name == name)
        case.build(tmp_path / name)
        before = _private_mib()
        with pytest.raises(VideoError) as caught:
            list(open_frames(str(tmp_path / name), SPEC, EVERY, policy=DecodePolicy()))
        assert caught.value.reason is reason
        peaks.append(_private_mib() - before)
    assert max(peaks) < 100, peaks


def _private_mib() -> int:
    _, resident, shared = (int(word) for word in Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.fault(20)
def test_only_one_of_many_streams_is_decoded(tmp_path: Path) -> None:
    """Of sixty video streams one is read, and decord, which decodes ahead, is not used."""
    case = next(case for case in cases.CASES if case.name == "many_streams.mov")
    case.build(tmp_path / case.name)
    found = probe(str(tmp_path / case.name), DecodeLimits())
    assert found.n_video_streams == 60 and found.n_frames == 1
    assert route(found, DecodePolicy(), SPEC)[0] == "pyav"
    assert numbers(tmp_path / case.name) == [1]
