"""How large shards are by default: about a minute of one worker, estimated while a job is launched."""

from __future__ import annotations

from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from p3d.jobs.planning import shard_size
from p3d.jobs.planning.shard_size import Cost, Sample, cpu_sizing, known_sizing, sizing_of
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.recipe import PlanRecord, ShardSizing
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS

EVERY = parse_sampling("every:16", clip_frames=16, frame_step=1, fps=None)
COUNT = parse_sampling("uniform:4", clip_frames=16, frame_step=1, fps=None)


def plan(sizing: ShardSizing) -> PlanRecord:
    return PlanRecord(1, "a" * 64, "b" * 64, 1, 1, 0, 0, (), sizing)


def rate() -> float:
    """Clips per second of the network."""
    return 2.0


def test_the_cost_is_that_of_the_network_and_of_decoding() -> None:
    """Two workers share the cores, so that each takes twice as long; rules of a number of clips go by the video."""
    found = [Cost(4_000_000, 30, 2e9), Cost(1_000_000, 10, 3e9)]
    sizing = sizing_of(found, EVERY, workers=2, cpus=4, clips_per_s=2.0)
    assert sizing.seconds_per_mb == pytest.approx(2 * (40 / 2.0 + 5e9 / shard_size.PIXELS_PER_S / 4) / 5)
    assert (sizing.device, sizing.seconds_per_video) == ("cpu", 0)
    fixed = sizing_of(found, COUNT, workers=2, cpus=4, clips_per_s=2.0)
    assert fixed.seconds_per_video == pytest.approx(sizing.seconds_per_mb * 5 / 2) and fixed.seconds_per_mb == 0


def test_nothing_is_known_without_a_readable_video() -> None:
    """Without a probed video, or one with clips, shards have a fixed number of videos."""
    assert sizing_of([], EVERY, workers=1, cpus=2, clips_per_s=2.0) == ShardSizing()
    assert cpu_sizing(EVERY, 0.0, 3, 1.0) == ShardSizing()


def test_what_was_chosen_or_measured_before_is_used_again() -> None:
    """The user's number first, then the newest plan that measured this kind of device; a GPU is not measured."""
    slow, fast = (ShardSizing(4096, "cpu", seconds_per_mb=mb) for mb in (9.0, 1.0))
    plans = [plan(slow), plan(fast), plan(ShardSizing(7))]
    assert known_sizing(5, plans, "cpu") == ShardSizing(5)
    assert known_sizing(None, plans, "cpu") == fast
    assert known_sizing(None, plans, "cuda") == known_sizing(None, [], "cuda") == ShardSizing()
    assert known_sizing(None, [plan(ShardSizing(7))], "cpu") is None
    assert known_sizing(None, [plan(ShardSizing(7))], "") == ShardSizing()  # what was chosen once is for that plan


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_size, "LEAST_BYTES", 1)
    monkeypatch.setattr(shard_size, "WAIT_S", 60.0)


@pytest.mark.usefixtures("measured")
def test_videos_are_probed_in_a_child_wherever_they_are(archive: Path, bucket: str) -> None:
    """Of a folder and of a prefix in S3 the same costs are found; files that are not videos are left out."""
    local = _found(find(str(archive), DEFAULTS).videos)
    for path in archive.rglob("*.*"):
        boto3.client("s3").upload_file(str(path), bucket, f"films/{path.relative_to(archive)}")
    assert local and sorted(local, key=str) == sorted(_found(find(f"s3://{bucket}/films", DEFAULTS).videos), key=str)
    assert all(one.n_clips > 0 and one.n_pixels >= 64 * 48 for one in local)


def _found(videos: pa.Table) -> list[Cost]:
    with Sample(videos, EVERY, DEFAULTS, None) as sample:
        assert sample.sizing(rate, 1).is_known
        return sample.found


def test_a_small_source_is_not_probed(archive: Path) -> None:
    """Fewer bytes than LEAST_BYTES are not worth a child process."""
    with Sample(find(str(archive), DEFAULTS).videos, EVERY, DEFAULTS, None) as sample:
        assert sample.sizing(lambda: pytest.fail("the network was timed"), 1) == ShardSizing()
    assert not sample.found


@pytest.mark.usefixtures("measured")
def test_a_probe_that_does_not_answer_does_not_hold_up_a_launch(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch waits WAIT_S for the child, and then uses the fixed number of videos."""
    monkeypatch.setattr(shard_size, "WAIT_S", 0.0)
    with Sample(find(str(archive), DEFAULTS).videos, EVERY, DEFAULTS, None) as sample:
        assert sample.sizing(rate, 1) == ShardSizing()
