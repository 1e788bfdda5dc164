"""Every hard file of the corpus gives the right frames, times, rotation or reason, under every sampling rule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.errors import VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec, VideoEnd, VideoInfo
from p3d.pipeline.types.policy import DecodePolicy
from tests.conformance.corpus import CASES, Case
from tests.pipeline.test_thumbnail import here, pixels
from tests.zoo import make

SPEC = FrameSpec(crop_hw=(96, 192), resize_hw=(96, 192))
RULES = (
    ("every:16", None),
    ("uniform:2", None),
    ("spread:2", None),
    ("random:2@3", None),
    ("every:16", 10.0),
    ("uniform:2", 25.0),
)


@dataclass
class Decoded:
    info: VideoInfo
    end: VideoEnd
    numbers: list[int]
    start_s: list[float]
    frames_NHWC: np.ndarray


def decoded(path: Path, rule: str, fps: float | None, partial: str = "fail", clip_frames: int = 4) -> Decoded:
    sampling = parse_sampling(rule, clip_frames=clip_frames, fps=fps).for_video("v")
    policy = DecodePolicy(partial=partial)  # type: ignore[arg-type]
    blocks: list[FrameBlock] = []
    info = end = None
    for message in open_frames(str(path), SPEC, sampling, policy=policy):
        if isinstance(message, VideoInfo):
            info, blocks = message, []
        elif isinstance(message, FrameBlock):
            blocks.append(message)
        elif isinstance(message, VideoEnd):
            end = message
    assert info is not None and end is not None
    numbers, starts = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("numbers_N", "start_s_N")
    )
    frames_NHWC = np.concatenate([block.frames_NHWC for block in blocks])
    return Decoded(info, end, numbers.tolist(), starts.tolist(), frames_NHWC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conformance")


def built(case: Case, folder: Path) -> Path:
    path = folder / case.name
    if not path.exists():
        case.build(path)
    return path


@pytest.mark.parametrize("case", [case for case in CASES if not case.reasons], ids=lambda case: case.name)
def test_a_readable_file_gives_its_frames_under_every_rule(case: Case, folder: Path) -> None:
    """Each frame that is sent is the one with that number, and count, duration, rate and rotation do not vary."""
    path = built(case, folder)
    for rule, fps in RULES:
        if fps and case.name.startswith("gap"):
            with pytest.raises(VideoError, match="--fps at most 3600 s"):
                decoded(path, rule, fps)
            continue
        found = decoded(path, rule, fps)
        assert found.end.n_frames == len(case.frames), rule
        assert found.end.duration_s == pytest.approx(case.duration_s, abs=0.0021), rule
        assert found.info.fps == pytest.approx(case.fps, rel=0.01)
        assert found.info.rotation == case.turn and not found.end.truncated
        upright_NHWC = np.rot90(found.frames_NHWC, -(case.turn // 90), axes=(1, 2))
        assert make.numbers_in(upright_NHWC) == [case.frames[number] for number in found.numbers], rule


@pytest.mark.parametrize("case", [case for case in CASES if case.reasons], ids=lambda case: case.name)
def test_an_unreadable_file_fails_for_its_reason_under_every_rule(case: Case, folder: Path) -> None:
    """The reason is the same for every rule; with `--partial keep` the frames before the damage are used and marked."""
    path = built(case, folder)
    reasons = set()
    for rule, fps in RULES:
        if "truncated" not in case.reasons or len(case.reasons) > 1:
            fps = fps and 25.0  # damage is only seen in frames that are decoded, so all of them are asked for
        clip_frames = 16 if rule == "every:16" else 60
        with pytest.raises(VideoError) as caught:
            decoded(path, rule, fps, clip_frames=clip_frames)
        reasons.add(str(caught.value.reason))
    assert len(reasons) == 1 and reasons <= set(case.reasons)
    if case.kept:
        found = decoded(path, "every:16", None, "keep", clip_frames=16)
        assert found.end.truncated and found.end.n_frames >= case.kept
        assert make.numbers_in(found.frames_NHWC) == list(range(found.end.n_frames))


@pytest.mark.parametrize("case", [case for case in CASES if not case.reasons], ids=lambda case: case.name)
def test_the_picture_of_a_second_is_the_frame_of_that_second(case: Case, folder: Path) -> None:
    """The page and the report show the same frames that the rows are made of."""
    path = built(case, folder)
    found = decoded(path, "every:1", None, clip_frames=1)
    at = len(case.frames) * 2 // 3
    (shown,) = here(path, found.start_s[at] + 0.004)
    upright_HWC = np.rot90(pixels(shown), -(case.turn // 90))
    assert make.numbers_in(upright_HWC[None]) == [case.frames[at]]
