"""Decodes in separate processes: one that crashes, is killed or hangs does not affect other videos."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode

from p3d.jobs.machine import Machines
from p3d.jobs.scheduler.cluster import local_cluster
from p3d.jobs.worker import decode_task, decoding
from p3d.jobs.worker.concurrency import DecodeConcurrency, ShardTurn, Use
from p3d.jobs.worker.decode_task import DecodeSpec
from p3d.jobs.worker.decoding import CRASHES_WITH_NOTE, DEATHS, Decoding, gpus_of_a_decode, gpus_of_a_worker
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.errors import NodeFault, Reason, StoreUnknown
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.types import (
    DecodeMessage,
    Failure,
    FrameBlock,
    FrameSpec,
    ShardPlan,
    VideoEnd,
    VideoInfo,
    VideoRef,
    VideoStart,
)
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

NAMES = ("good1", "good2", "bad", "good3", "good4")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A GPU is declared, which nothing uses."""
    with patch("ray.init", partial(ray.init, num_gpus=1)), local_cluster(cpus=2) as found:
        assert found.machines == Machines(2, 2, 1, ((2, 1),))
        yield


@pytest.fixture
def shard(tmp_path: Path) -> ShardPlan:
    """Five videos. The tests make the decode of `bad` fail."""
    (tmp_path / "v").mkdir()
    first = make.video(tmp_path / "v" / "good1.mp4", "libx264", 80, options={"preset": "ultrafast"})
    for name in NAMES[1:]:
        shutil.copy(first, tmp_path / "v" / f"{name}.mp4")
    videos = find(str(tmp_path / "v"), StoreOptions()).videos.to_pylist()
    return ShardPlan(1, "00000000", 0, tuple(VideoRef(**row) for row in videos))


def spec(**changes: Any) -> DecodeSpec:
    frames = FrameSpec(crop_hw=(64, 64), resize_hw=(72, 96))
    sampling = parse_sampling("every:16", clip_frames=16)
    made = DecodeSpec(frames, sampling, DecodePolicy(), DecodeLimits(), StoreOptions(), 2, 30.0)
    return replace(made, **changes)


def run(
    shard: ShardPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault_code: str,
    after: type = FrameBlock,
    **changes: Any,
) -> Any:
    """All messages by video name. `fault_code` is run by the decode of `bad` after its first block (`after`)."""
    state = tmp_path / "state"
    state.mkdir()

    def decode(video: VideoRef, made: DecodeSpec, scratch: Path, note: Path, _: object) -> Iterator[DecodeMessage]:
        for message in decode_task.decode_video(video, made, scratch, note):
            yield message
            if video.path == "bad.mp4" and isinstance(message, after):
                exec(fault_code, {"state": state})

    def in_message_batches(*given: Any) -> Iterator[MessageBatch]:
        yield from message_batches(decode(*given))

    remote = ray.remote(num_cpus=1, num_returns="streaming", max_retries=0)(in_message_batches)
    monkeypatch.setattr(decoding, "_decode_video", remote)
    monkeypatch.setattr(decoding, "GROUP_VIDEOS", 1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found: dict[str, list[DecodeMessage]] = {}
    for at, message in Decoding(shard, spec(**changes), scratch).messages():
        found.setdefault(Path(shard.videos[at].path).stem, []).append(message)
    return found


def assert_other_videos_are_whole(found: dict[str, list[DecodeMessage]]) -> None:
    for name in NAMES:
        if name != "bad":
            assert sum(len(m.numbers_N) for m in found[name] if isinstance(m, FrameBlock)) == 80
            assert isinstance(found[name][-1], VideoEnd)


@pytest.mark.usefixtures("cluster")
class TestFaults:
    """One video whose decode fails among four good ones, in a real Ray."""

    @pytest.mark.fault(13)
    def test_a_video_that_crashes_twice_fails(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A segmentation fault, twice, is `decoder_crash` with the signal's name; other videos are whole (row 13)."""
        found = run(shard, tmp_path, monkeypatch, "import ctypes; ctypes.string_at(0)")
        failure = found["bad"][-1]
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.attempts) == (Reason.DECODER_CRASH, CRASHES_WITH_NOTE)
        assert "Segmentation fault" in failure.detail
        assert_other_videos_are_whole(found)

    def test_a_single_crash_is_retried(self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A decode that crashes once is tried again from the start."""
        fault_code = (
            "import ctypes; first = not list(state.iterdir()); (state / 'x').touch(); first and ctypes.string_at(0)"
        )
        found = run(shard, tmp_path, monkeypatch, fault_code)
        assert list((tmp_path / "state").iterdir())
        since = max(at for at, message in enumerate(found["bad"]) if isinstance(message, VideoInfo))
        assert sum(len(m.numbers_N) for m in found["bad"][since:] if isinstance(m, FrameBlock)) == 80
        assert isinstance(found["bad"][-1], VideoEnd)
        assert_other_videos_are_whole(found)

    @pytest.mark.fault(13)
    def test_a_video_fails_at_the_third_death_without_a_note(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SIGKILL leaves no note and may have come from outside, so it takes three deaths, the last two alone."""
        found = run(shard, tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        failure = found["bad"][-1]
        assert isinstance(failure, Failure)
        assert (failure.reason, failure.attempts) == (Reason.DECODER_CRASH, DEATHS)
        assert_other_videos_are_whole(found)

    @pytest.mark.fault(14)
    def test_a_hang_ends_at_the_deadline(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A decode that hangs and ignores SIGTERM is killed: `decode_timeout`; the others continue (row 14)."""
        fault_code = (
            "import os, signal, time\n(state / str(os.getpid())).touch()\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
        )
        found = run(shard, tmp_path, monkeypatch, fault_code, video_timeout_s=2.0)
        failure = found["bad"][-1]
        assert isinstance(failure, Failure)
        assert failure.reason == Reason.DECODE_TIMEOUT
        assert_other_videos_are_whole(found)
        (pid,) = (int(path.name) for path in (tmp_path / "state").iterdir())
        end = time.monotonic() + 5
        while _alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _alive(pid)

    @pytest.mark.fault(15)
    def test_a_decoder_that_hangs_when_it_is_closed_costs_nothing(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All frames are there, so the video is whole; its process is killed after the timeout."""
        found = run(
            shard, tmp_path, monkeypatch, "import time\nwhile True: time.sleep(1)", VideoEnd, video_timeout_s=2.0
        )
        assert_other_videos_are_whole(found | {"good5": found["bad"]})
        assert [isinstance(message, Failure) for message in found["bad"]].count(True) == 0

    def test_a_slow_reader_is_not_a_hang(self, shard: ShardPlan, tmp_path: Path) -> None:
        """The timeout counts the decode's silence, not the time that its reader takes between messages."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        ends = Counter[str]()
        for _, message in Decoding(shard, spec(video_timeout_s=0.5, decode_tasks=1), scratch).messages():
            if isinstance(message, FrameBlock):
                time.sleep(0.8)  # the slow reader itself
            ends[type(message).__name__] += 1
        assert ends["VideoEnd"] == len(NAMES)
        assert ends["Failure"] == 0

    @pytest.mark.fault(28)
    def test_a_store_error_fails_no_video(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A store that does not answer is an error of the job: it is raised, and no video fails (row 28)."""
        with pytest.raises(StoreUnknown, match="outage"):
            run(
                shard,
                tmp_path,
                monkeypatch,
                "from p3d.pipeline.errors import StoreUnknown; raise StoreUnknown('outage')",
            )

    def test_nothing_is_left_behind(self, shard: ShardPlan, tmp_path: Path) -> None:
        """After a shard, scratch is empty: no note, no copy."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        list(Decoding(shard, spec(), scratch).messages())
        assert not list(scratch.iterdir())


class Holder:
    """A worker that only says which GPUs Ray has given it."""

    def gpus(self) -> list[str]:
        return [str(one) for one in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


@pytest.mark.parametrize(("decoder", "workers_per_gpu"), [("auto", 6), ("nvdec", 3)])
@pytest.mark.usefixtures("cluster")
def test_workers_share_a_gpu_with_their_decodes(decoder: str, workers_per_gpu: int) -> None:
    """All start on the one GPU, and decodes next to them."""
    share = gpus_of_a_worker(decoder, 2, workers_per_gpu)
    workers = [
        ray.remote(num_cpus=0)(Holder).options(num_gpus=share).remote()  # type: ignore[attr-defined]
        for _ in range(workers_per_gpu)
    ]
    decode = ray.remote(num_cpus=0, num_gpus=gpus_of_a_decode(workers_per_gpu))(lambda: True)
    try:
        assert ray.get([worker.gpus.remote() for worker in workers], timeout=60) == [["0"]] * workers_per_gpu
        if decoder == "nvdec":
            assert ray.get(decode.remote(), timeout=60)
    finally:
        for worker in workers:
            ray.kill(worker)


@pytest.mark.usefixtures("cluster")
def test_other_users_cannot_reach_a_local_cluster() -> None:
    """Its token is in no command line and no file, and its sockets and logs lie in a folder of mode 0700."""
    token, session = os.environ["RAY_AUTH_TOKEN"], Path(ray._private.worker._global_node.get_session_dir_path())
    assert get_authentication_mode() == AuthenticationMode.TOKEN and len(token) == 64
    private = session.parent.parent
    assert (private.stat().st_mode & 0o777, private.stat().st_uid) == (0o700, os.geteuid())
    sockets = [
        Path(path) for path in ray._private.worker._global_node.address_info.values() if "/sockets/" in str(path)
    ]
    assert sockets and all(path.is_relative_to(private) for path in sockets)
    words = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or []]
    assert len(words) > 2 and not any(token in word for word in words)
    assert not [path for path in session.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@pytest.mark.usefixtures("cluster")
def test_processes_that_wait_for_a_video_are_kept() -> None:
    """Ray would end those beyond one per core after an idle second, and a new one takes a second to start."""

    @ray.remote(num_cpus=0.5)
    def who() -> int:
        time.sleep(0.5)
        return os.getpid()

    until, pids = time.monotonic() + 60, set[int]()
    while len(pids) < 4 and time.monotonic() < until:  # a process may start late, after another has done its task
        pids = set(ray.get([who.remote() for _ in range(4)]))
    assert len(pids) == 4
    time.sleep(4)
    assert all(map(_alive, pids))


@pytest.mark.usefixtures("cluster")
class TestGroups:
    """Twelve short videos, of which the first six are one group, in a real Ray."""

    @pytest.fixture
    def shorts(self, shard: ShardPlan) -> ShardPlan:
        folder = Path(shard.videos[0].uri.removeprefix("file://")).parent
        for number in range(12 - len(NAMES)):
            shutil.copy(folder / "bad.mp4", folder / f"more{number}.mp4")
        return ShardPlan(
            1, "00000000", 0, tuple(VideoRef(**row) for row in find(str(folder), DEFAULTS).videos.to_pylist())
        )

    @staticmethod
    def read(shorts: ShardPlan, scratch: Path, **changes: Any) -> dict[int, list[DecodeMessage]]:
        scratch.mkdir()
        found: dict[int, list[DecodeMessage]] = {}
        for at, message in Decoding(shorts, spec(**changes), scratch).messages():
            found.setdefault(at, []).append(message)
        assert not list(scratch.iterdir())
        return found

    def test_a_group_sends_what_single_decodes_send(
        self, shorts: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same messages per video, from fewer tasks."""
        begun = []
        true = Decoding._submit_group
        monkeypatch.setattr(
            Decoding, "_submit_group", lambda made, cases: (begun.append(len(cases)), true(made, cases))
        )
        groups = self.read(shorts, tmp_path / "groups")
        assert begun[0] == 6 and sum(begun) == len(shorts.videos) > len(begun)
        monkeypatch.setattr(decoding, "GROUP_VIDEOS", 1)
        singles = self.read(shorts, tmp_path / "singles")
        assert groups.keys() == singles.keys() == set(range(12))
        for at, messages in singles.items():
            assert [type(m) for m in groups[at]] == [type(m) for m in messages]
            assert groups[at][-1] == messages[-1] == VideoEnd(80, 3.2)
            pixels = [[m.frames_NHWC for m in of[at] if isinstance(m, FrameBlock)] for of in (groups, singles)]
            assert np.array_equal(np.concatenate(pixels[0]), np.concatenate(pixels[1]))

    @pytest.mark.parametrize(
        "fault_code",
        [
            "import ctypes; ctypes.string_at(0)",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "import time\nwhile True: time.sleep(1)",
        ],
    )
    def test_a_failure_in_a_group_fails_no_video(
        self, shorts: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_code: str
    ) -> None:
        """A crash, a kill or a hang in the second video of a group: all its videos are whole, decoded one by one."""

        def decode(videos: tuple[VideoRef, ...], made: DecodeSpec, scratch: Path, note: Path) -> Iterator[MessageBatch]:
            for at, video in enumerate(videos):
                for message in decode_task.decode_video(video, made, scratch, note):
                    yield (message,)
                    if at == 1 and isinstance(message, FrameBlock):
                        exec(fault_code)

        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": decode_task.BLOCKS_AHEAD}
        monkeypatch.setattr(decoding, "_decode_group", ray.remote(num_cpus=1, max_retries=0, **options)(decode))
        found = self.read(shorts, tmp_path / "scratch", video_timeout_s=2.0)
        assert len(found) == 12
        for messages in found.values():
            since = max(at for at, message in enumerate(messages) if isinstance(message, VideoInfo))
            assert sum(len(m.numbers_N) for m in messages[since:] if isinstance(m, FrameBlock)) == 80
            assert isinstance(messages[-1], VideoEnd)
        assert sum(isinstance(m, VideoInfo) for m in found[0]) == 1  # it had ended before

    def test_one_broken_video_of_a_group_fails_alone(self, shorts: ShardPlan, tmp_path: Path) -> None:
        """A file that is not a video is a failure, and the group continues after it."""
        Path(shorts.videos[1].uri.removeprefix("file://")).write_bytes(b"x" * shorts.videos[1].size_bytes)
        found = self.read(shorts, tmp_path / "scratch")
        kinds = Counter(type(messages[-1]) for messages in found.values())
        assert kinds == {VideoEnd: 11, Failure: 1} and isinstance(found[1][-1], Failure)


@pytest.mark.usefixtures("cluster")
def test_two_shards_share_the_decode_concurrency_of_a_worker(shard: ShardPlan, tmp_path: Path) -> None:
    """Each is read by its own thread and is whole. At most two videos decode at once, and the younger shard starts none
    while the older one has a video to start."""
    concurrency, most = DecodeConcurrency(2), 0
    begun, found = list[int](), {number: dict[int, list[DecodeMessage]]() for number in (0, 1)}

    def read(number: int) -> None:
        nonlocal most
        with concurrency.turn() as turn:
            queued.set()
            turn.await_turn()
            made = Decoding(replace(shard, shard=number), spec(), tmp_path, turn)
            for at, message in made.messages():
                most = max(most, concurrency.use.running)
                found[number].setdefault(at, []).append(message)
                if isinstance(message, VideoStart):
                    begun.append(number)

    threads = []
    for number in (0, 1):
        queued = threading.Event()
        threads.append(threading.Thread(target=read, args=(number,)))
        threads[-1].start()
        assert queued.wait(5)
    for thread in threads:
        thread.join(60)
    assert most == 2
    for messages in found.values():
        assert sorted(messages) == list(range(len(NAMES)))
        assert all(isinstance(of_video[-1], VideoEnd) for of_video in messages.values())
    assert begun[: begun.index(1)].count(0) >= len(NAMES) - 1  # its last one may begin a moment after its start


class TestGpuErrors:
    """A decode on a GPU that is full or fails. PyAV decodes in its place, and raises what `read_nvdec` raises."""

    @staticmethod
    def read(
        shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
    ) -> tuple[dict[str, list[DecodeMessage]], list[str]]:
        """All messages by video name, and the processes that decoded `bad`. Its first `times` decodes raise `error`."""
        pids = tmp_path / "pids"
        pids.touch()

        def frames(given: Any, video: VideoRef, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
            for message in decode_task.decode_video(video, given, scratch, note):
                yield message
                if video.path == "bad.mp4" and isinstance(message, FrameBlock):
                    with pids.open("a") as file:
                        file.write(f"{os.getpid()}\n")
                    if len(pids.read_text().splitlines()) <= times:
                        if isinstance(error, NodeFault):
                            raise error
                        yield Failure(Reason.DECODE_MEMORY, str(error))
                        return

        def task(video: VideoRef, made: DecodeSpec, scratch: Path, note: Path, _: object) -> Iterator[MessageBatch]:
            given = replace(made, policy=DecodePolicy())
            yield from message_batches(decode_task.with_faults(frames(given, video, scratch, note)))

        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": decode_task.BLOCKS_AHEAD}
        monkeypatch.setattr(decoding, "_decode_video", ray.remote(num_cpus=1, max_retries=0, **options)(task))
        monkeypatch.setattr(decoding, "GPU_SHARE", 0)
        found: dict[str, list[DecodeMessage]] = {}
        made = spec(policy=DecodePolicy(decoder="nvdec"))
        try:
            for at, message in Decoding(shard, made, tmp_path / "scratch").messages():
                found.setdefault(Path(shard.videos[at].path).stem, []).append(message)
        finally:
            used = pids.read_text().split()
        return found, used

    @pytest.mark.fault(9, 10)
    @pytest.mark.usefixtures("cluster")
    @pytest.mark.parametrize("error", [MemoryError("the GPU is full"), NodeFault("the GPU has failed")])
    def test_the_video_is_decoded_again_alone(
        self, error: Exception, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is whole then, and no video fails. A process whose GPU has failed decodes nothing more."""
        found, pids = self.read(shard, tmp_path, monkeypatch, error, 1)
        assert_other_videos_are_whole(found)
        since = max(at for at, message in enumerate(found["bad"]) if isinstance(message, VideoInfo))
        assert sum(len(m.numbers_N) for m in found["bad"][since:] if isinstance(m, FrameBlock)) == 80
        assert not [message for messages in found.values() for message in messages if isinstance(message, Failure)]
        if isinstance(error, NodeFault):
            assert pids[0] not in pids[1:] and not _alive(int(pids[0]))

    @pytest.mark.fault(9)
    @pytest.mark.usefixtures("cluster")
    def test_out_of_memory_again_fails_that_video(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then it was alone, so it needs too much: `decode_memory`, with the text that names the GPU."""
        found, pids = self.read(shard, tmp_path, monkeypatch, MemoryError("NVIDIA T4 of vm has 0.1 of 15 GB"), 9)
        assert_other_videos_are_whole(found)
        assert found["bad"][-1] == Failure(Reason.DECODE_MEMORY, "NVIDIA T4 of vm has 0.1 of 15 GB", 2)
        assert len(pids) == 2

    @pytest.mark.fault(10)
    @pytest.mark.usefixtures("cluster")
    def test_a_gpu_that_fails_again_stops_the_job(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the text of the error, and the video that it happened with twice."""
        with pytest.raises(NodeFault, match=r"vm: its GPU failed\. It was decoding .*bad\.mp4, for the second"):
            self.read(shard, tmp_path, monkeypatch, NodeFault("vm: its GPU failed"), 9)


def test_the_decodes_of_a_gpu_fit_into_its_free_memory() -> None:
    """About 1.5 GB each, never fewer than none."""
    assert 1.2e9 < decoding.DECODE_BYTES < 1.6e9
    cases = {-1: 0, 10**9: 0, 12 * 10**9: 7, 70 * 10**9: 45}
    assert {free: decoding.decodes_that_fit(free) for free in cases} == cases
    assert decoding.decodes_that_fit(10, 3) == 3


class TestTurns:
    """What one shard may start while another one decodes, without Ray: tests of `_start_decodes` alone."""

    @staticmethod
    def made(shard: ShardPlan, tmp_path: Path, turn: ShardTurn, monkeypatch: pytest.MonkeyPatch) -> Decoding:
        made = Decoding(shard, spec(), tmp_path, turn)

        def submit(case: Any) -> None:
            made.streams[object()] = decoding._Stream(case, tmp_path / "x", None, fetching=False, silent_since=0.0)

        monkeypatch.setattr(Decoding, "_submit", lambda _, case: submit(case))
        return made

    def test_a_video_that_is_retried_is_alone(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It starts when nothing else decodes on its worker, and no younger shard starts while it runs."""
        concurrency = DecodeConcurrency(2)
        with concurrency.turn() as older, concurrency.turn() as younger:
            made = self.made(shard, tmp_path, older, monkeypatch)
            retried_alone = deque([decoding._Case(0, shard.videos[0], deaths=1)])
            younger.tell(Use(running=1, begun=1))
            made._start_decodes(older, retried_alone)
            assert retried_alone and not made.streams and not younger.may_start
            younger.tell(Use())
            made._start_decodes(older, retried_alone)
            assert not retried_alone and len(made.streams) == 1
            assert not older.use.wants and older.use.alone and not younger.may_start

    def test_copies_of_an_older_shard_go_on_first(
        self, shard: ShardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A halted decode of a younger shard waits while an older shard has one."""
        concurrency = DecodeConcurrency(2)
        with concurrency.turn() as older, concurrency.turn() as younger:
            made = self.made(shard, tmp_path, younger, monkeypatch)
            case = decoding._Case(0, shard.videos[0])
            stream = made.streams["a"] = decoding._Stream(case, tmp_path, None, fetching=False, halted=True)
            older.tell(Use(running=1, halted=1, wants=False))
            made._start_decodes(younger, deque())
            assert stream.halted
            older.tell(Use(running=1, begun=1, wants=False))
            made._start_decodes(younger, deque())
            assert not stream.halted

    def test_a_shard_that_has_read_all_leaves_its_decodes(self, shard: ShardPlan, tmp_path: Path) -> None:
        """While its last clips are embedded, the next shard may decode."""
        concurrency = DecodeConcurrency(1)
        with concurrency.turn() as older, concurrency.turn() as younger:
            assert list(Decoding(ShardPlan(1, "0" * 8, 0, ()), spec(), tmp_path, older).messages()) == []
            assert older.use == Use(wants=False) and younger.may_start


def test_a_group_takes_short_videos_and_leaves_work_for_the_other_decodes(shard: ShardPlan, tmp_path: Path) -> None:
    """Its size is what waits divided by the concurrency. A long video, or one whose group failed, is not grouped."""
    short, long = replace(shard.videos[0], size_bytes=1000), replace(shard.videos[0], size_bytes=decoding.GROUP_BYTES)
    made = Decoding(shard, spec(), tmp_path)

    def sizes(videos: list[VideoRef], concurrency: int, **of_first: bool) -> list[int]:
        made.waiting.extend(decoding._Case(at, video) for at, video in enumerate(videos))
        for name, value in of_first.items():
            setattr(made.waiting[0], name, value)
        taken = []
        while made.waiting:
            taken.append(len(made._group(concurrency)))
        return taken

    assert sizes([short] * 64, 2) == [16, 16, 16, 8, 4, 2, 1, 1]
    assert sizes([short] * 8, 4) == [2, 1, 1, 1, 1, 1, 1]
    assert sizes([long, *[short] * 12], 1)[:2] == [1, 12]
    assert sizes([short] * 13, 1, single=True)[:2] == [1, 12]
    remote = replace(short, uri="s3://bucket/v.mp4")
    assert sizes([remote] * 64, 2)[:3] == [8, 7, 6]  # twice as many tasks run as may decode
    assert sizes([short, short, *[remote] * 30], 1)[:2] == [2, 7]  # local and remote videos do not mix


@pytest.mark.fault(14)
@pytest.mark.parametrize("size_bytes", [1000, 100 << 30])
def test_the_deadline_does_not_depend_on_the_size(size_bytes: int, shard: ShardPlan, tmp_path: Path) -> None:
    """A decode is overdue after `video_timeout_s` without a message, and every message restarts that time."""
    made = Decoding(shard, spec(video_timeout_s=30.0), tmp_path)
    case = decoding._Case(0, replace(shard.videos[0], size_bytes=size_bytes))
    stream = made.streams["decode"] = decoding._Stream(case, tmp_path / "note", None, fetching=False)
    for silent_s, overdue in ((29.0, False), (31.0, True)):
        stream.silent_since = time.monotonic() - silent_s
        assert made._overdue("decode") is overdue


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"
