"""Videos on S3 are fetched while others decode. The limit of decodes holds, copies are removed, failures stay alone."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from p3d.jobs.scheduler.cluster import local_cluster
from p3d.jobs.worker import decode_task, decoding
from p3d.jobs.worker.concurrency import Use
from p3d.jobs.worker.decode_task import DecodeSpec
from p3d.jobs.worker.decoding import Decoding
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.jobs.worker.parallel_decode import Pace
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.deadlines import SMALL_BYTES
from p3d.pipeline.errors import Reason, StoreError
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import (
    DecodeMessage,
    Failure,
    FrameBlock,
    FrameSpec,
    ShardPlan,
    VideoAlive,
    VideoEnd,
    VideoFetched,
    VideoRef,
)
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.s3.conftest import new_store
from tests.s3.proxy import Fault, Proxy
from tests.zoo import make

TASKS, VIDEOS, FRAMES = 2, 8, 30


@pytest.fixture
def shard(moto_front: Proxy, tmp_path: Path) -> ShardPlan:
    """Eight videos on S3."""
    store = new_store(moto_front)
    path = make.video(tmp_path / "v.mp4", "libx264", FRAMES, options={"preset": "ultrafast"})
    for number in range(VIDEOS):
        store.create(f"{number}.mp4", path)
    rows = find(store.url, DEFAULTS).videos.to_pylist()
    moto_front.requests.clear()
    return ShardPlan(1, "00000000", 0, tuple(VideoRef(**row) for row in rows))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def cluster(moto_proxy: Proxy) -> Iterator[None]:
    """Ray whose workers reach S3 through the proxy, started once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto_proxy.env.items():
            patch.setenv(name, value)
        with local_cluster(cpus=TASKS):
            yield


def spec(**changes: Any) -> DecodeSpec:
    frames, sampling = FrameSpec((64, 64), (72, 96)), parse_sampling("every:16", clip_frames=16)
    made = DecodeSpec(frames, sampling, DecodePolicy(), DecodeLimits(), DEFAULTS, TASKS, 60.0)
    return replace(made, **changes)


def watched(monkeypatch: pytest.MonkeyPatch, state: Path, ahead: int = 0, hang: str = "") -> None:
    """Each decode writes a file with its times [after its copy, end) and how many videos had been fetched by then.

    It waits until `ahead` videos are fetched, at most 30 s. The copy of the video `hang` never ends.
    """
    state.mkdir()
    (state.parent / "fetched").mkdir()

    def decode(video: VideoRef, made: DecodeSpec, scratch: Path, note: Path, _: object) -> Iterator[DecodeMessage]:
        began, fetched, all_fetched = 0.0, 0, state.parent / "fetched"
        for message in decode_task.decode_video(video, made, scratch, note):
            yield message
            fetched += isinstance(message, VideoFetched)
            if fetched:
                (all_fetched / video.path).touch()
            if fetched == 1 + decode_task.BLOCKS_AHEAD and not began:
                began = time.monotonic()
                time.sleep(1000 * (video.path == hang))
                while len(list(all_fetched.iterdir())) < ahead and time.monotonic() < began + 30:
                    time.sleep(0.01)
        (state / video.path).write_text(f"{began} {time.monotonic()} {len(list(all_fetched.iterdir()))}")

    def in_message_batches(*given: Any) -> Iterator[MessageBatch]:
        yield from message_batches(decode(*given))

    options = {"num_returns": "streaming", "max_retries": 0}
    remote = ray.remote(num_cpus=1, _generator_backpressure_num_objects=decode_task.BLOCKS_AHEAD, **options)(
        in_message_batches
    )
    monkeypatch.setattr(decoding, "_decode_video", remote)


def gather(shard: ShardPlan, scratch: Path, made: DecodeSpec) -> dict[str, list[DecodeMessage]]:
    found: dict[str, list[DecodeMessage]] = {}
    for at, message in Decoding(shard, made, scratch).messages():
        found.setdefault(shard.videos[at].path, []).append(message)
    return found


def assert_whole(messages: list[DecodeMessage]) -> None:
    assert isinstance(messages[-1], VideoEnd), messages[-1]
    assert sum(len(message.numbers_N) for message in messages if isinstance(message, FrameBlock)) == FRAMES


def test_fetching_overlaps_decoding_and_no_more_decode(
    moto_front: Proxy, cluster: None, shard: ShardPlan, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `decode_tasks` videos decode, the next are fetched, each once, and then wait; no copy is left."""
    watched(monkeypatch, tmp_path / "state", ahead=TASKS + 1)
    moto_front.latency_s = 0.1
    found = gather(shard, scratch, spec())
    for messages in found.values():
        assert_whole(messages)
    spans = [tuple(map(float, path.read_text().split())) for path in (tmp_path / "state").iterdir()]
    assert len(spans) == VIDEOS == moto_front.counts()["GET"]
    assert max(sum(began <= at < ended for began, ended, _ in spans) for at, _, _ in spans) <= TASKS
    assert min(fetched for _, _, fetched in spans) > TASKS  # the first decodes ended after another video was fetched
    assert list(scratch.iterdir()) == []


@pytest.mark.fault(29)
def test_a_slow_video_does_not_delay_others(moto_front: Proxy, cluster: None, shard: ShardPlan, scratch: Path) -> None:
    """A body that never ends is `decode_timeout` at its deadline. Others are complete by then; its copy is removed."""
    moto_front.faults = [Fault("trickle", method="GET", key="/3.mp4", rate=200.0)]
    found = gather(shard, scratch, spec(video_timeout_s=6.0))
    failure = found["3.mp4"][-1]
    assert isinstance(failure, Failure) and failure.reason == Reason.DECODE_TIMEOUT
    for path, messages in found.items():
        if path != "3.mp4":
            assert_whole(messages)
    moto_front.faults = []
    until = time.monotonic() + 10  # the killed process may live a moment longer
    while list(scratch.iterdir()) and time.monotonic() < until:
        gather(replace(shard, videos=shard.videos[:1]), scratch, spec())
    assert list(scratch.iterdir()) == []


@pytest.mark.fault(29)
def test_a_slow_fetch_sends_signs_of_life(moto_front: Proxy, tmp_path: Path, scratch: Path) -> None:
    """A large copy may take longer than the deadline while its bytes arrive."""
    path = make.video(tmp_path / "v.mp4", "libx264", FRAMES)
    with path.open("ab") as file:
        file.write(SMALL_BYTES.to_bytes(4, "big") + b"free" + bytes(SMALL_BYTES - 8))
    store = new_store(moto_front)
    store.create("large.mp4", path)
    video = VideoRef(**find(store.url, DEFAULTS).videos.to_pylist()[0])
    moto_front.faults = [Fault("trickle", method="GET", key="/large.mp4", rate=2e6)]
    made = spec(video_timeout_s=1.0)
    began = time.monotonic()
    kinds = [type(message) for message in decode_task._messages(video, made, scratch, None)]
    assert time.monotonic() - began > made.video_timeout_s
    assert kinds[: kinds.index(VideoFetched)].count(VideoAlive) >= 4
    assert kinds[-1] is VideoEnd and list(scratch.iterdir()) == []


@pytest.mark.fault(14)
def test_waiting_for_ones_turn_is_not_silence(
    moto_front: Proxy, cluster: None, shard: ShardPlan, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video with its copy may wait for a decode longer than its deadline; one that hangs may not.

    The deadline must be long enough for a good video on a busy machine.
    """
    watched(monkeypatch, tmp_path / "state", hang="0.mp4")
    found = gather(replace(shard, videos=shard.videos[:2]), scratch, spec(decode_tasks=1, video_timeout_s=12.0))
    assert [type(found[path][-1]) for path in ("0.mp4", "1.mp4")] == [Failure, VideoEnd]


@pytest.mark.fault(26, 28)
def test_reasons_and_outages_are_as_before(moto_front: Proxy, cluster: None, shard: ShardPlan, scratch: Path) -> None:
    """A replaced object fails only its own video; an outage of the store is raised and fails no video."""
    moto_front.faults = [Fault("status", method="GET", key="/2.mp4", status=412, code="PreconditionFailed")]
    found = gather(shard, scratch, spec())
    failure = found["2.mp4"][-1]
    assert isinstance(failure, Failure) and failure.reason == Reason.SOURCE_CHANGED
    assert sum(isinstance(messages[-1], VideoEnd) for messages in found.values()) == VIDEOS - 1
    moto_front.faults = [Fault("status", key="/2.mp4", status=400, code="OddRequest")]
    with pytest.raises(StoreError, match="does not accept this request"):
        gather(shard, scratch, spec())


@pytest.fixture
def many(shard: ShardPlan, moto_front: Proxy) -> ShardPlan:
    """Sixteen videos on S3. If one video is decoded at a time, the first four form a group of short videos."""
    videos = [replace(video, video_id=f"{at}", path=f"{at}.mp4") for at, video in enumerate(shard.videos * 2)]
    return replace(shard, videos=tuple(videos))


def test_short_videos_are_fetched_side_by_side_by_one_task(
    moto_front: Proxy, cluster: None, many: ShardPlan, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages equal those of single decodes. Each is fetched once, those of a group in one round trip."""
    begun, submit_run = list[int](), Decoding._submit_group
    monkeypatch.setattr(
        Decoding, "_submit_group", lambda made, cases: (begun.append(len(cases)), submit_run(made, cases))
    )
    gate = threading.Barrier(4, timeout=60)
    moto_front.gates = iter([gate] * 4)
    runs = gather(many, scratch, spec(decode_tasks=1))
    assert begun[0] == 4 and sum(begun) == len(many.videos) > len(begun)
    assert moto_front.counts()["GET"] == len(many.videos) and not gate.broken
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(decoding, "GROUP_VIDEOS", 1)
    singles = gather(many, scratch, spec(decode_tasks=1))
    for path, messages in singles.items():
        assert [type(message) for message in runs[path]] == [type(message) for message in messages]
        pixels = [[m.frames_NHWC for m in of[path] if isinstance(m, FrameBlock)] for of in (runs, singles)]
        assert np.array_equal(np.concatenate(pixels[0]), np.concatenate(pixels[1]))


@pytest.mark.parametrize("fault", ["replaced", "silent"])
def test_one_bad_object_of_a_group_fails_alone(
    fault: str, moto_front: Proxy, cluster: None, many: ShardPlan, scratch: Path
) -> None:
    """An object was replaced, or its body never arrives: the other videos of its group are complete."""
    other = replace(many.videos[1], uri=many.videos[1].uri.replace("1.mp4", "7.mp4"))
    videos = (many.videos[0], other, *many.videos[2:7], *many.videos[8:15])  # only one asks for 7.mp4
    moto_front.faults = [
        Fault("status", method="GET", key="/7.mp4", status=412, code="PreconditionFailed")
        if fault == "replaced"
        else Fault("silent", method="GET", key="/7.mp4", at=100)
    ]
    found = gather(replace(many, videos=videos), scratch, spec(decode_tasks=1, video_timeout_s=6.0))
    failure = found.pop("1.mp4")[-1]
    expected = {"replaced": Reason.SOURCE_CHANGED, "silent": Reason.DECODE_TIMEOUT}[fault]
    assert isinstance(failure, Failure) and failure.reason == expected
    assert len(found) == len(videos) - 1
    for messages in found.values():
        assert_whole(messages)


def test_an_outage_in_a_group_fails_no_video(moto_front: Proxy, cluster: None, many: ShardPlan, scratch: Path) -> None:
    """The error is raised, and existing copies are removed."""
    moto_front.faults = [Fault("status", key="/2.mp4", status=400, code="OddRequest")]
    with pytest.raises(StoreError, match="does not accept this request"):
        gather(many, scratch, spec(decode_tasks=1))
    until = time.monotonic() + 10  # the killed process may live a moment longer
    while list(scratch.iterdir()) and time.monotonic() < until:
        gather(replace(many, videos=many.videos[:1]), scratch, spec())
    assert list(scratch.iterdir()) == []


def test_what_is_fetched_ahead_is_bounded(shard: ShardPlan, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many as may decode, within the limit of bytes; local videos are never started ahead."""
    started = []

    class Task:
        def options(self, **_: float) -> Task:
            return self

        def remote(self, video: VideoRef, *_: object) -> str:
            started.append(video.path)
            return video.path

    monkeypatch.setattr(decoding, "_decode_video", Task())
    here = replace(shard.videos[0], uri="file:///x.mp4")
    for video, limit, count in ((shard.videos[0], 1 << 40, 2 * TASKS), (shard.videos[0], 0, TASKS), (here, 0, TASKS)):
        monkeypatch.setattr(decoding, "FETCHED_BYTES", limit)
        made = Decoding(shard, spec(), scratch)
        while made._may_start(video, Use(wants=False), TASKS):
            made._submit(decoding._Case(0, replace(video, path=f"{len(started)}")))
        assert len(made.streams) == count


def test_copies_of_dead_processes_are_swept(scratch: Path) -> None:
    """Only copies of processes of this machine that no longer exist are removed."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = platform.node()
    for name in (f"video-{here}-{gone.pid}-a_b", f"video-{here}-{os.getppid()}-x", f"video-else-{gone.pid}-x"):
        (scratch / name).mkdir()
        (scratch / name / "video.mp4").touch()
    decode_task._tidy(scratch)
    assert {path.name for path in scratch.iterdir()} == {f"video-{here}-{os.getppid()}-x", f"video-else-{gone.pid}-x"}


def test_a_long_video_on_s3_is_shared(
    moto_front: Proxy, cluster: None, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decodes with one copy each return the same frames as one decode, and no copy is left."""
    monkeypatch.setattr(Pace, "left_s", lambda pace, _: 1e9 if pace.last >= pace.first else 0.0)
    params = {"preset": "ultrafast", "x264-params": "keyint=50:min-keyint=50:scenecut=0:bframes=0:open-gop=0"}
    store = new_store(moto_front)
    store.create("long.mp4", make.video(tmp_path / "v.mp4", "libx264", 3000, hw=(48, 160), options=params))
    (row,) = find(store.url, DEFAULTS).videos.to_pylist()
    shard = ShardPlan(1, "00000000", 0, (VideoRef(**row),))
    said = {}
    for decode_tasks in (1, 2):
        decodes = Decoding(shard, spec(decode_tasks=decode_tasks), scratch)
        found, most = list[DecodeMessage](), 0
        for _, message in decodes.messages():
            found.append(message)
            most = max(most, len(decodes.streams))
        blocks = [message for message in found if isinstance(message, FrameBlock)]
        pixels = hashlib.sha256(b"".join(block.frames_NHWC.tobytes() for block in blocks)).hexdigest()
        said[decode_tasks] = pixels, np.concatenate([block.numbers_N for block in blocks]).tolist(), found[-1]
        assert most == decode_tasks
    assert said[1] == said[2] and said[1][1] == list(range(3000))


@pytest.mark.parametrize(("size_bytes", "n_decodes", "expected"), [(1, 2, 8 + 2 * 2 * 3), (5 << 30, 2, math.inf)])
def test_copies_are_part_of_what_sharing_costs(
    size_bytes: int, n_decodes: int, expected: float, tmp_path: Path
) -> None:
    """A video on S3 is shared only if it is long enough to outweigh its copies; too large copies are not made."""
    video = VideoRef("v", "v.mp4", "s3://bucket/v.mp4", "0", size_bytes)
    made = Decoding(ShardPlan(1, "0" * 8, 0, (video,)), spec(), tmp_path)
    assert made._worth_s(decoding._Case(0, video, fetch_s=3.0), n_decodes) == expected
    local = replace(video, uri="file:///v.mp4")
    assert made._worth_s(decoding._Case(0, local), n_decodes) == 8
