"""Clips are decoded ahead in children, in order; a video that crashes, hangs or is broken is named and skipped."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from p3d.jobs.planning.prepare import frame_spec
from p3d.jobs.training.clips import (
    Clips,
    ClipSource,
    Feeder,
    TrainingClips,
    UniformClips,
    decode_positions,
    largest_frames,
)
from p3d.jobs.training.sampling import Share, drawn
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.errors import Reason, StoreDenied
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import Failure, FrameSpec
from p3d.preprocessing import CAFFE_RGB, IMAGENET_RGB
from tests.zoo import make

HW = (48, 96)
SEED = 5


def source(
    folder: Path, tmp_path: Path, *, rule: str = "uniform:3", step: int = 1, timeout_s: float = 60
) -> ClipSource:
    sampling = parse_sampling(rule, clip_frames=8, frame_step=step)
    videos = find(str(folder), DEFAULTS).videos
    return ClipSource(videos, FrameSpec(HW, HW), sampling, DEFAULTS, tmp_path / "scratch", timeout_s, 1 << 32)


def read(clips: TrainingClips | UniformClips, n: int, children: int) -> list[tuple[int, Clips | Failure]]:
    with Feeder(clips, Share(0, 1, 1, 0, n), children=children, ahead=2) as feeder:
        return list(feeder)


@dataclass(frozen=True)
class _Same:
    """Every position has the clips of video 0."""

    clips: UniformClips

    @property
    def source(self) -> ClipSource:
        return self.clips.source

    def number(self, position: int) -> int:
        return 0

    def at(self, position: int) -> Iterator[object]:
        return self.clips.at(0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of numbered frames, the last one shorter than a clip."""
    folder = tmp_path_factory.mktemp("numbered")
    for number, n_frames in enumerate((40, 33, 64, 30, 5)):
        make.video(folder / f"{number}.mp4", "libx264", n_frames, options={"preset": "ultrafast"}, gop=12)
    return folder


@pytest.mark.parametrize("step", [1, 2])
def test_a_training_clip_is_consecutive_frames_of_its_video(videos: Path, tmp_path: Path, step: int) -> None:
    """Each clip has the frames that a random start gives, the last one repeated where a video is shorter."""
    clips = TrainingClips(source(videos, tmp_path, step=step), HW, False, SEED)
    found = read(clips, 15, 2)
    assert [position for position, _ in found] == list(range(15))
    starts = dict[int, set[int]]()
    for position, clip in found:
        assert isinstance(clip, np.ndarray) and clip.shape == (1, 8, *HW, 3)
        numbers = make.numbers_in(clip[0])
        _, number = drawn(SEED, position, 5)
        last = (40, 33, 64, 30, 5)[number] - 1
        assert numbers == [min(numbers[0] + step * k, last) for k in range(8)]
        starts.setdefault(number, set()).add(numbers[0])
    assert starts[4] == {0} and max(map(len, starts.values())) > 1  # each epoch draws another start


def test_clips_do_not_depend_on_the_number_of_children(videos: Path, tmp_path: Path) -> None:
    """The same bytes with one child and with three, and from a later first position."""
    clips = TrainingClips(source(videos, tmp_path), (40, 80), True, SEED)
    one, three = read(clips, 10, 1), read(clips, 10, 3)
    assert [clip.tobytes() for _, clip in one] == [clip.tobytes() for _, clip in three]
    with Feeder(clips, Share(0, 1, 2, 6, 10), children=2, ahead=1) as feeder:
        assert [(at, clip.tobytes()) for at, clip in feeder] == [(at, clip.tobytes()) for at, clip in one[6:]]


def test_test_clips_are_those_of_a_job(videos: Path, tmp_path: Path) -> None:
    """Three uniform clips of each video, in the order of the videos."""
    found = read(UniformClips(source(videos, tmp_path)), 5, 2)
    starts = [[make.numbers_in(clip)[0] for clip in clips] for _, clips in found]
    assert starts == [[i * (n - 8) // 3 for i in range(3)] for n in (40, 33, 64, 30)] + [[0, 0, 0]]


@pytest.mark.usefixtures("broken_children")
def test_videos_that_crash_or_hang_or_are_broken_are_named(videos: Path, tmp_path: Path) -> None:
    """Their positions hold Failures, also in later epochs without another try; all others have their clips."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "crash", "b", "hang", "c"):
        os.link(videos / "0.mp4", folder / f"{name}.mp4")
    (folder / "broken.mp4").write_bytes(b"not a video")
    clips = TrainingClips(source(folder, tmp_path, timeout_s=8), HW, False, SEED)
    found = read(clips, 18, 2)
    names = [clips.source.video(clips.number(position)).path for position, _ in found]
    by_name = {
        name: {getattr(one, "reason", None) for at, (_, one) in enumerate(found) if names[at] == name} for name in names
    }
    assert by_name == {
        "a.mp4": {None},
        "b.mp4": {None},
        "c.mp4": {None},
        "crash.mp4": {Reason.DECODER_CRASH},
        "hang.mp4": {Reason.DECODE_TIMEOUT},
        "broken.mp4": {Reason.NOT_A_VIDEO},
    }


@pytest.mark.usefixtures("broken_children")
def test_a_failure_counts_from_its_own_position_on(videos: Path, tmp_path: Path) -> None:
    """Which clips are used follows from positions alone: a later failure does not take an earlier clip away."""
    folder = tmp_path / "videos"
    folder.mkdir()
    os.link(videos / "0.mp4", folder / "a.mp4")
    clips = UniformClips(source(folder, tmp_path))
    known = {0: (7, Failure(Reason.TOO_LONG, "at position 7"))}
    found = dict(decode_positions(_Same(clips), Share(0, 1, 1, 0, 10), 5, 1, known))
    assert [isinstance(found[position], Failure) for position in range(5, 10)] == [False] * 3 + [True] * 2


@pytest.mark.usefixtures("broken_children")
def test_leaving_does_not_wait_for_a_video_that_hangs(videos: Path, tmp_path: Path) -> None:
    """The end of a feeder kills a child that would be silent until its timeout."""
    folder = tmp_path / "videos"
    folder.mkdir()
    os.link(videos / "0.mp4", folder / "hang.mp4")
    clips = UniformClips(source(folder, tmp_path, timeout_s=300))
    before = set(psutil.Process().children())
    with Feeder(clips, Share(0, 1, 1, 0, 1), children=1, ahead=1):
        while not set(psutil.Process().children()) - before:
            threading.Event().wait(0.01)
    assert set(psutil.Process().children()) <= before


def test_known_failures_are_not_decoded(videos: Path, tmp_path: Path) -> None:
    """A video that failed before keeps that failure."""
    clips, known = UniformClips(source(videos, tmp_path)), {1: Failure(Reason.TOO_LONG, "before")}
    with Feeder(clips, Share(0, 1, 1, 0, 5), children=1, ahead=1, known=known) as feeder:
        assert [one for _, one in feeder if isinstance(one, Failure)] == [known[1]]


def test_a_feeder_that_is_left_early_leaves_no_process(videos: Path, tmp_path: Path) -> None:
    """Its children end with it, while they wait for space as well."""
    before = set(psutil.Process().children())
    with Feeder(UniformClips(source(videos, tmp_path)), Share(0, 1, 1, 0, 5), children=2, ahead=1) as feeder:
        next(iter(feeder))
    assert set(psutil.Process().children()) <= before


def test_an_error_of_the_store_ends_the_training(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses is the job's problem, not a video's: the reader gets the error."""
    (tmp_path / "sitecustomize.py").write_text(
        "import p3d.pipeline.decode.messages as messages\n"
        "from p3d.pipeline.errors import StoreDenied\n"
        "def decode_messages(*given, **named):\n    raise StoreDenied('no permission')\n    yield\n"
        "messages.decode_messages = decode_messages\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StoreDenied, match="no permission"):
        read(UniformClips(source(videos, tmp_path)), 5, 2)


def test_frames_are_whole_where_a_crop_is_drawn() -> None:
    """The frames of a training are as large as the recipe resizes them; those of a test are its centre."""
    assert largest_frames(CAFFE_RGB) == FrameSpec((182, 242), (182, 242))
    assert frame_spec(CAFFE_RGB) == FrameSpec((160, 160), (182, 242))
    assert largest_frames(IMAGENET_RGB) == FrameSpec((256, 256), short_side=256)
