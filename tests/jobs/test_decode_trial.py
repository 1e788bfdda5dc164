"""A trial decodes what it is given in children, and comes back in time whatever they meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from p3d.jobs.planning.decode_trial import How, trial
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.errors import Reason
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, FrameSpec, VideoEnd, VideoRef
from p3d.pipeline.types.policy import DecodePolicy
from tests.zoo import make

HOW = How(FrameSpec((96, 192), (96, 192)), parse_sampling("every:16", clip_frames=16), DecodePolicy(), StoreOptions())


@pytest.fixture
def videos(tmp_path: Path) -> list[VideoRef]:
    """Two good videos, of 40 and 5 frames, and a file that is not a video."""
    make.video(tmp_path / "a.mp4", "libx264", 40, options={"preset": "ultrafast"})
    make.video(tmp_path / "b.mp4", "libx264", 5, options={"preset": "ultrafast"})
    (tmp_path / "c.mp4").write_text("no video")
    return [VideoRef(**row) for row in find(str(tmp_path), StoreOptions()).videos.to_pylist()]


def test_each_video_is_decoded_once_and_for_real(videos: list[VideoRef]) -> None:
    """Frames are counted, the first of a clip's length are kept, seconds are not zero, and no video is lost."""
    found = {one.video.path: one for one in trial(videos, HOW, children=2, longest_s=60)}
    assert sorted(found) == ["a.mp4", "b.mp4", "c.mp4"]
    ends = {name: one.end for name, one in found.items()}
    assert isinstance(ends["a.mp4"], VideoEnd) and ends["a.mp4"].n_frames == 40
    assert isinstance(ends["c.mp4"], Failure) and ends["c.mp4"].reason == Reason.NOT_A_VIDEO
    assert make.numbers_in(found["a.mp4"].frames_NHWC) == list(range(16))
    assert make.numbers_in(found["b.mp4"].frames_NHWC) == list(range(5))
    assert found["a.mp4"].cpu_s > 0


def test_a_child_is_ended_when_its_time_is_up(videos: list[VideoRef]) -> None:
    """One that has done nothing by then gives nothing, and no error."""
    assert trial(videos[:1], HOW, children=1, longest_s=0.001) == []


def test_what_a_child_did_before_it_died_counts(
    videos: list[VideoRef], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The videos before the one that ends the process are kept, that one has failed, and the rest is decoded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import p3d.jobs.planning.decode_trial as t, os\n"
        "decode = t._decode\n"
        "t._decode = lambda video, *rest: decode(video, *rest) if video.path != 'b.mp4' else os._exit(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    counted: list[int] = []
    found = trial(videos, HOW, children=1, longest_s=60, on_done=lambda: counted.append(1))
    ends = [(one.video.path, getattr(one.end, "reason", None)) for one in found]
    assert ends == [("a.mp4", None), ("b.mp4", Reason.DECODER_CRASH), ("c.mp4", Reason.NOT_A_VIDEO)]
    assert len(counted) == 3
