"""A long video that several decodes share: bit-identical to one decode, whatever goes wrong in a share."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import WorkerCrashedError

from p3d.jobs.job import golden_of
from p3d.jobs.machine import code_digest
from p3d.jobs.planning.prepare import JobSpec, add_plan, create_job, prepare
from p3d.jobs.scheduler.cluster import local_cluster
from p3d.jobs.worker import decode_task, decoding
from p3d.jobs.worker.actor import Done, ShardWorker, WorkerSpec
from p3d.jobs.worker.decode_task import DecodeSpec
from p3d.jobs.worker.decoding import CRASHES_WITH_NOTE, MOST_ATTEMPTS, Decoding
from p3d.jobs.worker.message_batches import MessageBatch
from p3d.jobs.worker.parallel_decode import BELIEVED_S, Pace, Shared, UnexpectedMessage
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.gop_chunks import Share, chunks_of
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.decode.probe import Probe, probe
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import Reason
from p3d.pipeline.recipe import RunOptions, ShardSizing
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import (
    ChunkEnd,
    DecodeMessage,
    Failure,
    FrameBlock,
    FrameSpec,
    ShardPlan,
    VideoEnd,
    VideoFetched,
    VideoInfo,
    VideoRef,
    VideoShareable,
    VideoStart,
)
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

SPEC = FrameSpec(crop_hw=(64, 64), resize_hw=(72, 108))
N_FRAMES = 1000  # four GOP chunks
PROBED: dict[Path, Probe] = {}
INFO = VideoInfo(N_FRAMES, 192, 96, 0, 25.0, 40.0, "mp4", "h264", 0, "decord")
END = VideoEnd(N_FRAMES, 40.0)


def x264(gop: int, b_frames: int = 0) -> dict[str, str]:
    params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:open-gop=0"
    return {"preset": "ultrafast", "x264-params": params}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four GOP chunks of 250 frames."""
    return make.video(tmp_path_factory.mktemp("long") / "long.mp4", "libx264", N_FRAMES, options=x264(50))


def said(messages: list[DecodeMessage]) -> tuple[Any, ...]:
    """The content of a video's messages since the last VideoInfo, independent of the division into blocks."""
    since = max((at for at, message in enumerate(messages) if isinstance(message, VideoInfo)), default=0)
    blocks = [message for message in messages[since:] if isinstance(message, FrameBlock)]
    arrays = [
        np.concatenate([getattr(block, name) for block in blocks]).tobytes() if blocks else b""
        for name in ("numbers_N", "start_s_N", "end_s_N", "frames_NHWC")
    ]
    return (*arrays, *(one for one in messages[since:] if isinstance(one, VideoInfo | VideoEnd | Failure)))


def in_turn(decodes: list[Iterator[DecodeMessage]], last: int, info: VideoInfo = INFO) -> list[DecodeMessage]:
    """The messages of decodes that share a video from `last` on, read as `p3d.jobs.worker.decoding` reads them."""
    shared = Shared(info, last, deque(decodes))
    found: list[DecodeMessage] = []
    while True:
        message = next(shared.decodes[0], None)
        if message is not None:
            found += [block for block in [shared.take(message)] if block is not None]
        elif (end := shared.drop_first()) is not None:
            return [*found, end]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Key frames, wanted frames, the first frame of the shares, and the number of decodes."""
    gops = draw(st.lists(st.integers(1, 250), min_size=5, max_size=12))
    n_frames = sum(gops)
    wanted = draw(st.lists(st.integers(0, n_frames - 1), unique=True, max_size=200))
    keys = np.cumsum([0, *gops]).tolist()
    return keys, sorted(wanted), draw(st.integers(0, n_frames)), draw(st.integers(1, 5))


@settings(deadline=None)
@given(cuts())
def test_shares_put_together_are_the_video(long: Path, cut: tuple[list[int], list[int], int, int]) -> None:
    """Each wanted frame from the first on comes once, in order, for all GOPs, wanted frames and numbers of decodes."""
    (*keys, n_frames), wanted, first, n_decodes = cut
    times_N = np.arange(n_frames) / 25
    found = replace(
        PROBED.setdefault(long, probe(str(long), DecodeLimits())),
        n_frames=n_frames,
        key_frames=np.array(keys),
        start_s_N=times_N,
        end_s_N=times_N,
    )
    only = Wanted(None, None, np.array(wanted, np.int64))

    def decode(index: int) -> Iterator[DecodeMessage]:
        yield from (VideoStart(1), VideoFetched(), INFO)
        for chunk_M in chunks_of(found, only, Share(first, index, n_decodes)):
            assert len(chunk_M) == 0 or chunk_M[-1] - chunk_M[0] < 256
            for at in range(0, len(chunk_M), 64):
                yield block(chunk_M[at : at + 64].tolist())
            yield ChunkEnd()
        yield END

    *blocks, end = in_turn([decode(index) for index in range(n_decodes)], first - 1)
    numbers = [number for one in blocks if isinstance(one, FrameBlock) for number in one.numbers_N.tolist()]
    assert (numbers, end) == ([number for number in wanted if number >= first], END)


def block(numbers: list[int]) -> FrameBlock:
    numbers_N = np.array(numbers, np.int64)
    return FrameBlock(numbers_N, numbers_N / 25, numbers_N / 25, np.zeros((len(numbers), 1, 1, 3), np.uint8))


@pytest.mark.parametrize(
    "second",
    [
        [replace(INFO, n_frames=999)],
        [INFO, Failure(Reason.CORRUPT_FRAMES, "damaged")],
        [INFO, block([2]), ChunkEnd(), END, Failure(Reason.SOURCE_CHANGED, "touched while it was read")],
        [INFO, block([1])],
        [INFO, block([2]), ChunkEnd(), replace(END, n_frames=3)],
        [INFO, block([2]), ChunkEnd()],
    ],
    ids=["another file", "failure", "failure after its end", "a frame twice", "another end", "no end"],
)
def test_a_share_that_does_not_fit_is_detected(second: list[DecodeMessage]) -> None:
    """A message that a decode of the whole video would not have sent is refused, so that the whole video is decoded."""
    first = [INFO, block([0, 1]), ChunkEnd(), END]
    with pytest.raises(UnexpectedMessage):
        in_turn([iter(first), iter(second)], -1)


def test_a_video_is_worth_sharing_by_what_is_left_of_it() -> None:
    """Seconds at its current speed; 0 if it is too early, without a frame, or if the reader waits less than half."""
    pace = Pace(n_frames=1000, since=100.0, last=99, waited_s=2.0)
    assert pace.left_s(104.0) == pytest.approx(36.0)
    assert replace(pace, first=50, last=149).left_s(104.0) == pytest.approx(34.0)
    assert replace(pace, waited_s=1.9).left_s(104.0) == 0
    assert replace(pace, last=-1).left_s(104.0) == 0
    assert replace(pace, waited_s=9.0).left_s(100 + BELIEVED_S / 2) == 0


def test_a_share_that_is_not_read_does_not_time_out(long: Path, tmp_path: Path) -> None:
    """The timeout counts only for the decode that is read, from the start of its turn."""
    video = local_row(long.parent, os.fsencode(long.name))
    made = Decoding(ShardPlan(1, "0" * 8, 0, (video,)), spec(video_timeout_s=5.0), tmp_path)
    shared = Shared(INFO, -1, deque(["a", "b"]))
    case = decoding._Case(0, video, shared=shared)
    long_ago = time.monotonic() - 100
    for name in ("a", "b"):
        made.streams[name] = decoding._Stream(case, tmp_path / name, None, False, silent_since=long_ago)
    assert (made._is_read("a"), made._is_read("b"), made._overdue("a")) == (True, False, True)
    assert not list(made._of_a_share(case, shared, ChunkEnd(), deque()))
    assert (made._is_read("a"), made._is_read("b"), made._overdue("b")) == (False, True, False)


def test_a_share_that_never_began_is_started_again(long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That says nothing about the video, and it keeps its turn. After MOST_ATTEMPTS the video is decoded whole."""

    class Task:
        def options(self, **_: object) -> Task:
            return self

        def remote(self, *given: Any) -> Any:
            return given[-2].stem, given[-1]

    monkeypatch.setattr(decoding, "_decode_video", Task())
    monkeypatch.setattr(Decoding, "_end", lambda made, generator: made.streams.pop(generator))
    video = local_row(long.parent, os.fsencode(long.name))
    made, retried_alone = Decoding(ShardPlan(1, "0" * 8, 0, (video,)), spec(), tmp_path), deque[decoding._Case]()
    case = decoding._Case(0, video, attempts=1, info=INFO, pace=Pace(N_FRAMES, 0.0))
    made._share(case, 2)
    for number in range(MOST_ATTEMPTS + 1):
        assert case.shared is not None and not retried_alone
        (name, share), second = case.shared.decodes
        assert (name, share) == (f"00000000-000000000-0-{number + 2 if number else 1}", Share(0, 0, 2))
        assert second == ("00000000-000000000-0-2", Share(0, 1, 2))
        stream = made.streams.pop(case.shared.decodes[0])
        assert not list(made._over(stream, retried_alone, WorkerCrashedError()))
    assert (list(retried_alone), case.shared, made.streams) == ([case], None, {})


FORMS: dict[str, Callable[[Path], Path]] = {
    "b_frames.mp4": lambda p: make.video(p, "libx264", 620, options=x264(12, 3)),
    "long_gops.mkv": lambda p: make.video(p, "libx264", 620, options=x264(200)),
    "mpeg4.mov": lambda p: make.video(p, "mpeg4", 620, gop=30),
    "vp9.webm": lambda p: make.video(p, "libvpx-vp9", 540, gop=40, options={"deadline": "realtime", "cpu-used": "8"}),
    "vfr.mp4": lambda p: make.video(p, "libx264", 620, options=x264(50), pts=[at * 3 + at % 2 for at in range(620)]),
}


@pytest.mark.parametrize(
    ("name", "rule", "fps", "n_decodes", "decoder"),
    [
        ("b_frames.mp4", "every:16", None, 2, "auto"),
        ("b_frames.mp4", "uniform:5", None, 3, "decord"),
        ("long_gops.mkv", "every:16", 7.0, 2, "decord"),
        ("mpeg4.mov", "random:9@3", None, 3, "decord"),
        ("vp9.webm", "every:16", None, 4, "auto"),
        ("vfr.mp4", "uniform:5", 60.0, 2, "decord"),
        *((name, "every:16", None, 3, "pyav") for name in FORMS),
        ("b_frames.mp4", "every:50", None, 2, "auto"),
        ("b_frames.mp4", "every:16", 7.0, 3, "auto"),
        ("vfr.mp4", "uniform:5", None, 2, "pyav"),
    ],
)
def test_pixels_and_times_are_those_of_one_decode(
    name: str, rule: str, fps: float | None, n_decodes: int, decoder: Any, tmp_path: Path
) -> None:
    """Bit-identical, from the start and from any frame, for several codecs, GOPs, clip rules and rates."""
    path = str(FORMS[name](tmp_path / name))
    sampling = parse_sampling(rule, clip_frames=16, fps=fps).for_video("a")
    policy = DecodePolicy(decoder)
    whole: list[DecodeMessage] = list(open_frames(path, SPEC, sampling, policy=policy))
    assert any(isinstance(message, VideoShareable) for message in whole)
    blocks = [message for message in whole if isinstance(message, FrameBlock)]
    (info,) = (message for message in whole if isinstance(message, VideoInfo))
    for kept in (0, 1):
        last = int(blocks[kept - 1].numbers_N[-1]) if kept else -1
        shares = [Share(last + 1, index, n_decodes) for index in range(n_decodes)]
        decodes = [iter(open_frames(path, SPEC, sampling, policy=policy, share=share)) for share in shares]
        assert said([info, *blocks[:kept], *in_turn(decodes, last, info)]) == said(whole)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_cluster(cpus=2):
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every video is shared after its first block."""
    monkeypatch.setattr(Pace, "left_s", lambda pace, _: 1e9 if pace.last >= pace.first else 0.0)


def spec(**changes: Any) -> DecodeSpec:
    sampling = parse_sampling("every:16", clip_frames=16)
    return replace(DecodeSpec(SPEC, sampling, DecodePolicy(), DecodeLimits(), DEFAULTS, 2, 30.0), **changes)


class Decoded:
    """A long video, and others, decoded in a real Ray.

    `fault_code` is code that its decodes run after each FrameBlock and after the VideoEnd.
    """

    def __init__(
        self,
        path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        fault_code: str = "",
        *others: Path,
        **changes: Any,
    ) -> None:
        state, scratch = tmp_path / "state", tmp_path / "scratch"
        state.mkdir()
        scratch.mkdir()

        def decode(
            video: VideoRef, made: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
        ) -> Iterator[DecodeMessage]:
            (state / f"{note.stem}-{'whole' if share is None else share.index}").write_text(str(os.getpid()))
            for message in decode_task.decode_video(video, made, scratch, note, share):
                yield message
                if isinstance(message, FrameBlock | VideoEnd):
                    exec(fault_code, {"share": share, "message": message, "FrameBlock": FrameBlock})

        def one_by_one(*given: Any) -> Iterator[MessageBatch]:
            for message in decode(*given):
                yield (message,)  # so that a decode is never ahead by a whole video

        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": decode_task.BLOCKS_AHEAD}
        monkeypatch.setattr(decoding, "_decode_video", ray.remote(num_cpus=1, max_retries=0, **options)(one_by_one))
        videos = (local_row(one.parent, os.fsencode(one.name)) for one in (path, *others))
        decodes = Decoding(ShardPlan(1, "0" * 8, 0, tuple(videos)), spec(**changes), scratch)
        self.most, self.all = 0, list[tuple[int, DecodeMessage]]()
        for at, message in decodes.messages():
            self.most = max(self.most, len(decodes.streams))
            self.all.append((at, message))
        self.messages = [message for at, message in self.all if at == 0]
        self.n_infos = sum(isinstance(message, VideoInfo) for message in self.messages)
        # which share, or "whole" -> the processes that decoded it of the long video
        self.started = dict[str, list[int]]()
        for one in state.glob("00000000-000000000-0-*"):
            self.started.setdefault(one.name.rpartition("-")[2], []).append(int(one.read_text()))
        assert not list(scratch.iterdir())


def by_one(path: Path, tmp_path: Path, policy: DecodePolicy = DecodePolicy()) -> tuple[Any, ...]:  # noqa: B008 - frozen
    """The messages of a single decode of a video."""
    made, video = spec(policy=policy), local_row(path.parent, os.fsencode(path.name))
    rules = {"policy": policy, "limits": made.limits, "store_options": DEFAULTS, "scratch": tmp_path}
    return said(list(decode_messages(video, made.frames, made.sampling, **rules)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("cluster", "at_once")
class TestShared:
    """One long video, and a free decode that nothing else needs."""

    def test_it_is_shared(self, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two decodes, never three at once, send what one sends, and nothing is restarted."""
        made = Decoded(long, tmp_path, monkeypatch)
        assert made.started.keys() == {"whole", "0", "1"} and len(made.started["whole"]) == 1
        assert said(made.messages) == by_one(long, tmp_path)
        assert (made.most, made.n_infos) == (2, 1)

    @pytest.mark.parametrize(
        "fault_code",
        [
            "import os, signal; share and share.index and os.kill(os.getpid(), signal.SIGKILL)",
            "import ctypes; share and share.index and ctypes.string_at(0)",
            "import time\nwhile share and share.index: time.sleep(1)",
            "if share and share.index: raise MemoryError",
        ],
        ids=["killed", "segfault", "hang", "memory"],
    )
    def test_a_failure_in_a_share_costs_only_time(
        self, fault_code: str, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The video is decoded again by one decode, and whole. A share that hung is killed."""
        timeout_s = 3.0 if "sleep" in fault_code else 30.0
        made = Decoded(long, tmp_path, monkeypatch, fault_code, video_timeout_s=timeout_s)
        assert len(made.started["whole"]) == 2 and "1" in made.started
        assert said(made.messages) == by_one(long, tmp_path)
        assert made.n_infos == 2
        until = time.monotonic() + 5
        while timeout_s == 3.0 and any(map(alive, made.started["1"])):
            assert time.monotonic() < until, "the share that hung is still there"
            time.sleep(0.05)

    def test_a_share_that_hangs_when_it_is_closed_costs_nothing(
        self, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All its frames have arrived, so its process is killed, and the video is not decoded again."""
        fault_code = "import time\nwhile share and not isinstance(message, FrameBlock): time.sleep(1)"
        made = Decoded(long, tmp_path, monkeypatch, fault_code, video_timeout_s=3.0)
        assert made.started.keys() == {"whole", "0", "1"} and len(made.started["whole"]) == 1
        assert said(made.messages) == by_one(long, tmp_path)

    def test_a_video_that_crashes_every_decode_fails_by_the_same_rule(
        self, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two crashes of decodes of the whole video, and as many attempts, as if it had never been shared."""
        fault_code = (
            "import ctypes\nif isinstance(message, FrameBlock) and message.numbers_N[-1] > 500: ctypes.string_at(0)"
        )
        made = Decoded(long, tmp_path, monkeypatch, fault_code)
        (failure,) = (message for message in made.messages if isinstance(message, Failure))
        assert (failure.reason, failure.attempts) == (Reason.DECODER_CRASH, CRASHES_WITH_NOTE)
        assert len(made.started["whole"]) == 1 + CRASHES_WITH_NOTE

    @pytest.mark.parametrize("partial", ["fail", "keep"])
    def test_damage_in_the_middle_ends_as_it_does_for_one(
        self, partial: Any, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same reason and message, or the same frames before the damage, marked as truncated."""
        path, policy = make.damaged(long, tmp_path / "damaged.mp4", 0.6, 2000), DecodePolicy(partial=partial)
        expected = by_one(path, tmp_path, policy)
        assert isinstance(expected[-1], Failure) if partial == "fail" else expected[-1].truncated
        made = Decoded(path, tmp_path, monkeypatch, policy=policy)
        assert len(made.started["whole"]) == 2 and "1" in made.started
        # One more attempt was seen once, probably because Ray sent a task to a process that had just been killed
        messages = [replace(m, attempts=1) if isinstance(m, Failure) else m for m in made.messages]
        assert said(messages) == expected

    def test_shares_reserve_no_cpu_in_ray(self, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A share that is ahead never holds a core that the previous one needs: one free CPU is enough for both."""
        hog = ray.remote(num_cpus=1)(Counter).remote()
        try:
            ray.get(hog.total.remote())
            made = Decoded(long, tmp_path, monkeypatch, video_timeout_s=3.0)
        finally:
            ray.kill(hog)
        assert made.started.keys() == {"whole", "0", "1"} and len(made.started["whole"]) == 1
        assert said(made.messages) == by_one(long, tmp_path)

    def test_decodes_are_first_for_videos_that_wait(
        self, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With two short videos after it, the long one is shared when both have begun; all three are whole."""
        short = make.video(tmp_path / "short.mp4", "libx264", 20)
        slow = "import time; share is None and isinstance(message, FrameBlock) and time.sleep(0.1)"  # on a busy machine
        made = Decoded(long, tmp_path, monkeypatch, slow, short, short)
        kinds = [(at, type(message)) for at, message in made.all]
        assert made.most == 2 and made.started.keys() == {"whole", "0", "1"}
        assert kinds.index((2, VideoStart)) < kinds.index((0, VideoEnd))
        for at in (1, 2):
            assert said([message for whose, message in made.all if whose == at]) == by_one(short, tmp_path)
        assert said(made.messages) == by_one(long, tmp_path)

    def test_rows_are_those_of_one_decode(self, long: Path, tmp_path: Path, small_weights: Path) -> None:
        """A worker commits bit-identical rows from one decode and from two."""
        prepared = prepare(JobSpec(None, str(small_weights), clips="every:100"))
        tables = []
        for decode_tasks in (1, 2):
            store = open_store(str(tmp_path / f"out{decode_tasks}"), DEFAULTS)
            job = create_job(store, prepared)
            plan = add_plan(store, job, find(str(long), DEFAULTS), sizing=ShardSizing(1), limit=None)
            assert plan is not None
            manifest = Manifest(store, plan)
            options = RunOptions(1, 4, 1, decode_tasks, device="cpu")
            given = (store.url, job.recipe, options, tuple(golden_of(store, job.recipe)))
            worker = ShardWorker(WorkerSpec(*given, code_digest(), str(tmp_path)))
            worker.setup()
            done = worker.run_shard(manifest.shard(0), manifest.user_columns(0))
            assert isinstance(done, Done)
            tables.append([pq.read_table(next((tmp_path / f"out{decode_tasks}" / name).glob("*"))) for name in ROWS])
        assert tables[0] == tables[1] and tables[0][0].num_rows > 2


ROWS = ("clips", "videos")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"
