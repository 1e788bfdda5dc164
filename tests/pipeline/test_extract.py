"""The messages of a shard -> its rows: every row is computed from its own frames, whatever arrived in between.

The encoder here is not a network: the feature of a clip lists the codes of its frames, so a wrong frame anywhere
gives a wrong number. Legend: N frames, B clips of a batch, T frames of a clip, D = 1 + T features, R rows.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.pipeline.clips.rules import Sampling, clip_spans, frame_numbers, needed_frames
from p3d.pipeline.dataset.schema import check_rows, outcomes_json, parse_outcomes
from p3d.pipeline.errors import MALFORMED, Reason
from p3d.pipeline.extract import FrameBuffers, InferenceThreads, Progress, extract_shard
from p3d.pipeline.types import (
    FLOAT32,
    INT64,
    UINT8,
    ClipRow,
    DecodeMessage,
    Failure,
    FrameBlock,
    ShardPlan,
    ShardRows,
    VideoEnd,
    VideoInfo,
    VideoOutcome,
    VideoRef,
    VideoStart,
)

FPS = 25
WRONG = (128, 192)  # added to the video number in frames of a first and second attempt, which must leave no trace
Numbers = Sequence[int] | INT64


def frame_codes(frames_NHWC: UINT8) -> FLOAT32:
    """The number stored in the one pixel of a frame: video * 65536 + frame, exact in float32."""
    return frames_NHWC[:, 0, 0].astype(np.float32) @ np.array([65536, 256, 1], np.float32)


def frames_of(video: int, numbers: Numbers) -> UINT8:
    """[N, 1, 1, 3] uint8: which video, which frame."""
    numbers_N = np.asarray(numbers, np.int64)
    return np.stack([np.full_like(numbers_N, video), numbers_N >> 8, numbers_N & 255], 1).astype(np.uint8)[
        :, None, None
    ]


def block(video: int, numbers: Numbers) -> FrameBlock:
    times_N = np.asarray(numbers, np.float64) / FPS
    return FrameBlock(np.asarray(numbers, np.int64), times_N, times_N + 1 / FPS, frames_of(video, numbers))


def info(n_frames: int) -> VideoInfo:
    return VideoInfo(n_frames, 320, 240, 0, float(FPS), n_frames / FPS, "mp4", "h264", 0, "decord")


def blocks(video: int, numbers: Numbers, size: int) -> list[FrameBlock]:
    return [block(video, numbers[at : at + size]) for at in range(0, len(numbers), size)]


def stream(video: int, n_frames: int, size: int = 64, *, sampling: Sampling | None = None) -> list[DecodeMessage]:
    """A whole video in blocks of `size`; with a sampling, only the frames that its clips need."""
    numbers = needed_frames(sampling.for_video(f"id{video}"), n_frames) if sampling else np.arange(n_frames)
    return [VideoStart(1), info(n_frames), *blocks(video, numbers, size), VideoEnd(n_frames, n_frames / FPS)]


def mixed(streams: dict[int, list[DecodeMessage]], random: Random) -> list[tuple[int, DecodeMessage]]:
    """The streams interleaved at random, each in its own order."""
    turns = [at for at, messages in streams.items() for _ in messages]
    random.shuffle(turns)
    waiting = {at: iter(messages) for at, messages in streams.items()}
    return [(at, next(waiting[at])) for at in turns]


def in_turn(streams: dict[int, list[DecodeMessage]]) -> list[tuple[int, DecodeMessage]]:
    """One stream after the other."""
    return [(at, message) for at, messages in streams.items() for message in messages]


@dataclass
class Spy:
    """The encoder: [1, codes of the T frames] of each clip. Checks that a batch holds each frame once, and no other."""

    scale: Callable[[FLOAT32], FLOAT32] = lambda features_BD: features_BD
    batches: list[FLOAT32] = field(default_factory=list)  # codes [B, T] of each batch

    def __call__(self, frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        codes_N = frame_codes(frames_NHWC)
        assert len(np.unique(codes_N)) == len(codes_N), "a frame is in the batch twice"
        assert np.array_equal(np.unique(index_BT), np.arange(len(codes_N))), "a frame is in the batch for nothing"
        assert frames_NHWC.dtype == np.uint8 and index_BT.dtype == np.int64
        codes_BT = codes_N[index_BT]
        self.batches.append(codes_BT)
        return self.scale(np.concatenate([np.ones((len(codes_BT), 1), np.float32), codes_BT], 1))


def plan(n_videos: int) -> ShardPlan:
    refs = [VideoRef(f"id{at}", f"{at}.mp4", f"file:///{at}.mp4", "0" * 16, 10) for at in range(n_videos)]
    return ShardPlan(1, "0123abcd", 0, tuple(refs))


def run(
    messages: Sequence[tuple[int, DecodeMessage]] | Iterator[tuple[int, DecodeMessage]],
    n_videos: int,
    sampling: Sampling,
    encode: Callable[[UINT8, INT64], FLOAT32] | None = None,
    *,
    scores: Callable[[FLOAT32], FLOAT32] | None = None,
    batch_size: int = 4,
    dtype: str = "float32",
    progress: Progress | None = None,
    inference_threads: int | InferenceThreads | None = 0,
) -> ShardRows:
    spy = encode or Spy()
    threads = inference_threads
    if isinstance(threads, int):
        threads = InferenceThreads(threads) if threads else None

    def pair(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
        features_BD = spy(frames_NHWC, index_BT)
        return features_BD, scores(features_BD) if scores else np.empty((len(features_BD), 0), np.float32)

    rows = extract_shard(
        plan(n_videos),
        messages,
        pair,
        sampling=sampling,
        n_scores=2 if scores else 0,
        batch_size=batch_size,
        feature_dim=1 + sampling.clip_frames,
        embedding_dtype=dtype,
        progress=progress,
        inference_threads=threads,
    )
    check_rows(rows, 1 + sampling.clip_frames, sampling.clip_frames, 2 if scores else 0)
    return rows


def expected(n_of: dict[int, int], sampling: Sampling) -> tuple[list[ClipRow], list[list[float]]]:
    """Clip rows and features of the videos that were read, computed directly from the arithmetic of clips."""
    clips, features = [], []
    for at, n_frames in sorted(n_of.items()):
        for span in clip_spans(sampling.for_video(f"id{at}"), n_frames):
            numbers_T = frame_numbers(sampling, span, n_frames)
            start_s, end_s = numbers_T[0] / FPS, numbers_T[-1] / FPS + 1 / FPS
            clips.append(ClipRow(f"id{at}", f"{at}.mp4", span, start_s, end_s))
            features.append([1.0, *(at * 65536.0 + numbers_T)])
    return clips, features


def assert_rows(rows: ShardRows, n_of: dict[int, int], sampling: Sampling) -> None:
    """The rows are exactly those of the videos in `n_of` (position -> frames), in manifest order."""
    clips, features = expected(n_of, sampling)
    assert list(rows.clips) == clips
    np.testing.assert_array_equal(
        rows.features_RD, np.array(features, np.float32).reshape(len(clips), 1 + sampling.clip_frames)
    )
    assert rows.features_RD.dtype == np.float32
    assert [o.video for o in rows.outcomes] == list(rows.shard.videos)
    assert [o.n_clips for o in rows.outcomes] == [
        len(clip_spans(sampling.for_video(f"id{at}"), n_of[at])) if at in n_of else 0
        for at in range(len(rows.outcomes))
    ]


EVERY = Sampling("every", 16, 16)
SMALL = Sampling("every", 4, 4)

samplings = st.builds(
    lambda rule, *numbers: Sampling(rule, *numbers, seed=5 if rule == "random" else None),
    st.sampled_from(["every", "uniform", "spread", "random"]),
    st.integers(1, 24),
    st.integers(1, 16),
    st.integers(1, 3),
)


@dataclass(frozen=True)
class Drawn:
    """One video of a generated shard: its outcome, and the messages that lead to it."""

    fate: str
    n_frames: int
    messages: list[DecodeMessage]


@st.composite
def shards(draw: st.DrawFn) -> tuple[Sampling, list[Drawn]]:
    """A sampling and up to four videos that are read or fail in the middle, some after one or two restarts.

    Blocks have 0 to 64 frames. A decoder sends all frames or only those that are needed, and with `every` the container
    may declare a wrong number of frames.
    """
    sampling = draw(samplings)
    drawn = []
    for at in range(draw(st.integers(1, 4))):
        messages: list[DecodeMessage] = [VideoStart(1)]
        n_frames = draw(st.integers(1, 100))
        needed = draw(st.booleans()) and not sampling.needs_every_frame
        numbers = needed_frames(sampling.for_video(f"id{at}"), n_frames) if needed else np.arange(n_frames)
        promised = n_frames if sampling.needs_the_count else draw(st.integers(0, 120))

        def cut(video: int, numbers: INT64) -> Iterator[FrameBlock]:
            first = 0
            while first < len(numbers):
                size = 64 - draw(st.integers(0, 64))
                yield block(video, numbers[first : first + size])
                first += size

        for wrong in WRONG[: draw(st.sampled_from([0, 0, 1, 2]))]:
            other = draw(st.integers(1, 100))
            messages += [info(other), *cut(at + wrong, np.arange(draw(st.integers(0, other))))]
        fate = draw(st.sampled_from(["read", "read", "fails"]))
        messages.append(info(promised))
        if fate == "read":
            messages += [*cut(at, numbers), VideoEnd(n_frames, n_frames / FPS)]
        else:
            messages += [*cut(at, numbers[: draw(st.integers(0, len(numbers)))]), Failure(Reason.TRUNCATED, "ends", 2)]
        drawn.append(Drawn(fate, n_frames, messages))
    return sampling, drawn


@settings(deadline=None, max_examples=150)
@given(shards(), st.integers(1, 9), st.integers(0, 2**32))
def test_rows_are_those_of_their_own_frames(shard: tuple[Sampling, list[Drawn]], batch_size: int, seed: int) -> None:
    """However the streams are split and mixed, whatever fails or restarts: the rows of the videos that were read match
    the clip arithmetic, and every batch except the last is full."""
    sampling, videos = shard
    spy, progress = Spy(), Progress()
    messages = mixed({at: video.messages for at, video in enumerate(videos)}, Random(seed))
    rows = run(messages, len(videos), sampling, spy, batch_size=batch_size, progress=progress)
    assert_rows(rows, {at: video.n_frames for at, video in enumerate(videos) if video.fate == "read"}, sampling)
    for outcome, video in zip(rows.outcomes, videos, strict=True):
        if video.fate == "read":
            assert outcome.end == VideoEnd(video.n_frames, video.n_frames / FPS)
        else:
            assert outcome.failure == Failure(Reason.TRUNCATED, "ends", 2)
    assert all(len(batch) == batch_size for batch in spy.batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in spy.batches)
    assert progress.videos == len(videos) and progress.failed == sum(video.fate == "fails" for video in videos)
    assert progress.clips == sum(map(len, spy.batches)) >= len(rows.clips)
    assert progress.frames == sum(len(m.numbers_N) for _, m in messages if isinstance(m, FrameBlock))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.integers(1, 64), st.integers(0, 2**32))
def test_rows_do_not_depend_on_the_order_of_arrival(n_frames: list[int], size: int, seed: int) -> None:
    """The same streams, mixed or one after the other, in any blocks, give equal rows."""
    one = run(in_turn({at: stream(at, n) for at, n in enumerate(n_frames)}), len(n_frames), EVERY)
    two = run(mixed({at: stream(at, n, size) for at, n in enumerate(n_frames)}, Random(seed)), len(n_frames), EVERY)
    assert one.clips == two.clips and one.outcomes == two.outcomes
    np.testing.assert_array_equal(one.features_RD, two.features_RD)


def test_a_batch_mixes_videos() -> None:
    """Three videos of one clip each fill one batch; their rows come back in manifest order."""
    spy = Spy()
    messages = in_turn({at: stream(at, 16) for at in (2, 0, 1)})
    assert_rows(run(messages, 3, EVERY, spy, batch_size=3), {0: 16, 1: 16, 2: 16}, EVERY)
    assert [(batch[:, 0] // 65536).tolist() for batch in spy.batches] == [[2, 0, 1]]


def test_a_batch_is_encoded_as_soon_as_it_is_full() -> None:
    """The second batch does not wait for the end of the video."""
    spy, full = Spy(), []

    def messages() -> Iterator[tuple[int, DecodeMessage]]:
        for message in stream(0, 96, 32):
            yield 0, message
            full.append(len(spy.batches))

    run(messages(), 1, EVERY, spy, batch_size=2)
    assert full == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("inference_threads", [1, 3])
def test_inference_threads_change_no_row(inference_threads: int) -> None:
    """Batches that are encoded in parallel and finish out of order give the same rows as one thread."""
    random, spy = Random(inference_threads), Spy()

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        time.sleep(random.random() / 100)
        return spy(frames_NHWC, index_BT)

    n_of = {at: 16 * (1 + at % 5) for at in range(12)}
    messages = mixed({at: stream(at, n_frames) for at, n_frames in n_of.items()}, Random(0))
    assert_rows(run(messages, 12, EVERY, encode, batch_size=3, inference_threads=inference_threads), n_of, EVERY)
    assert sorted(map(len, spy.batches))[1:] == [3] * (len(spy.batches) - 1)


def test_as_many_batches_are_encoded_at_once_as_there_are_inference_threads() -> None:
    """With three threads, three batches meet at a barrier, repeatedly, and never a fourth."""
    meet, there, most = threading.Barrier(3, timeout=20), 0, 0

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        nonlocal there, most
        there += 1
        most = max(most, there)
        meet.wait()
        there -= 1
        meet.wait()  # so that no batch starts while another is still counted
        return Spy()(frames_NHWC, index_BT)

    progress = Progress()
    assert_rows(
        run(in_turn({0: stream(0, 9 * 16)}), 1, EVERY, encode, batch_size=1, inference_threads=3, progress=progress),
        {0: 144},
        EVERY,
    )
    assert most == 3 and progress.clips == 9


def test_an_error_in_an_inference_thread_is_raised() -> None:
    """An error of the encoder in its thread is raised by `extract_shard`, and no thread still works after it."""
    calls, at_work, begun = count(), set(), threading.Event()

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        if next(calls) == 0:
            begun.wait(5)
            raise RuntimeError("no space on the device")
        at_work.add(threading.get_ident())
        begun.set()
        time.sleep(0.2)  # longer than the error takes to arrive
        at_work.discard(threading.get_ident())
        return np.ones((len(index_BT), 1 + len(index_BT[0])), np.float32)

    with pytest.raises(RuntimeError, match="no space"):
        run(in_turn({0: stream(0, 1600)}), 1, EVERY, encode, batch_size=1, inference_threads=2)
    assert begun.is_set() and not at_work
    assert next(calls) <= 4


def test_threads_gather_into_kept_buffers_that_they_do_not_share() -> None:
    """Each inference thread has one buffer for all batches of all shards. While a batch is encoded, nothing writes into
    it, also if other threads are encoding."""
    random, lock = Random(0), threading.Lock()
    allocated: list[UINT8] = []
    used: dict[int, set[int]] = {}  # thread -> addresses of its batches

    def new_buffer(n_bytes: int) -> UINT8:
        allocated.append(np.zeros(n_bytes, np.uint8))
        return allocated[-1]

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        before = frames_NHWC.copy()
        time.sleep(random.random() / 100)  # an asynchronous copy would read the frames now
        assert np.array_equal(frames_NHWC, before) and frames_NHWC.flags.c_contiguous and frames_NHWC.flags.writeable
        with lock:
            used.setdefault(threading.get_ident(), set()).add(frames_NHWC.ctypes.data)
        return Spy()(frames_NHWC, index_BT)

    inference_threads, n_of = InferenceThreads(3, new_buffer), {at: 16 * (1 + at % 5) for at in range(12)}
    with ThreadPoolExecutor(2) as shards:
        messages = [mixed({at: stream(at, n) for at, n in n_of.items()}, Random(seed)) for seed in (0, 1)]
        given = [(one, 12, EVERY, encode) for one in messages]
        done = [shards.submit(run, *one, batch_size=3, inference_threads=inference_threads) for one in given]
        for one in done:
            assert_rows(one.result(), n_of, EVERY)
    addresses = [address for of_thread in used.values() for address in of_thread]
    assert len(allocated) == len(used) == 3 and len(addresses) == len(set(addresses)) == 3
    assert {buffer.ctypes.data for buffer in allocated} == set(addresses)


def test_a_buffer_grows_with_the_frames() -> None:
    """A batch of larger frames, or of more of them, gets a larger buffer; a smaller one does not."""
    sizes = list[int]()
    buffers = FrameBuffers(lambda n_bytes: sizes.append(n_bytes) or np.empty(n_bytes, np.uint8))  # type: ignore[func-returns-value]
    for n, most, side in ((2, 4, 3), (4, 4, 3), (1, 1, 3), (2, 2, 5), (9, 4, 5)):
        frames = [np.full((side, side, 3), number, np.uint8) for number in range(n)]
        assert np.array_equal(buffers.gather(frames, most), np.stack(frames))
    assert sizes == [4 * 27, 2 * 75, 9 * 75]


@pytest.mark.parametrize("inference_threads", [0, 2])
def test_a_video_that_has_ended_holds_no_frame(inference_threads: int) -> None:
    """Each frame would keep its whole message in shared memory until the shard has ended."""
    alive = list[int]()
    held: list[weakref.ref[UINT8]] = []

    def messages() -> Iterator[tuple[int, DecodeMessage]]:
        for at in range(8):
            for message in stream(at, 40):
                if isinstance(message, FrameBlock):
                    held.append(weakref.ref(message.frames_NHWC.base))  # which its views refer to
                yield at, message
            del message
            alive.append(sum(one() is not None for one in held))

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        return Spy()(frames_NHWC, index_BT)

    run(messages(), 8, EVERY, encode, batch_size=3, inference_threads=inference_threads)
    assert max(alive) <= 1 + 2 * inference_threads, alive  # what the batches need that are not gathered yet


def test_frames_that_clips_share_are_in_a_batch_once() -> None:
    """Clips that overlap by three quarters bring each frame to the encoder once."""
    sampling, sizes = Sampling("every", 4, 16), []

    def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        sizes.append((len(frames_NHWC), index_BT.shape))
        return Spy()(frames_NHWC, index_BT)

    assert_rows(run(in_turn({0: stream(0, 40)}), 1, sampling, encode, batch_size=7), {0: 40}, sampling)
    assert sizes == [(40, (7, 16))]


def test_a_second_info_restarts_the_video() -> None:
    """Everything that the first attempt computed is dropped, including encoded clips; the second info is kept."""
    first = [info(64), *blocks(WRONG[0], np.arange(64), 16)]
    spy = Spy()
    rows = run(in_turn({0: [*first, *stream(0, 40)], 1: stream(1, 16)}), 2, EVERY, spy, batch_size=3)
    assert len(spy.batches) > 1 and spy.batches[0][0, 0] == WRONG[0] * 65536
    assert_rows(rows, {0: 40, 1: 16}, EVERY)
    assert rows.outcomes[0].info == info(40)


def test_a_video_may_restart_after_a_failure() -> None:
    """A retry that follows a Failure replaces it."""
    messages = [(0, info(16)), (0, Failure(Reason.DECODER_CRASH, "died"))]
    assert_rows(run([*messages, *in_turn({0: stream(0, 20)})], 1, EVERY), {0: 20}, EVERY)


@pytest.mark.parametrize("n_seen", [0, 16])
def test_a_video_that_restarts_needs_a_new_end(n_seen: int) -> None:
    """An end from before the second VideoInfo does not count: fewer clips than the video has are never stored."""
    messages = [*in_turn({0: stream(0, 40)}), (0, info(40)), (0, block(WRONG[0], range(n_seen)))]
    with pytest.raises(ValueError, match="stopped without an end"):
        run(messages, 1, EVERY, batch_size=1)


def test_a_failure_in_the_middle_drops_only_its_own_clips() -> None:
    """Clips of the failed video share batches with others. Only its own clips are dropped, encoded or not."""
    bad = [*stream(1, 64, 16)[:-1], Failure(Reason.CORRUPT_FRAMES, "frame 65", 3)]
    messages = mixed({0: stream(0, 64, 16), 1: bad, 2: stream(2, 64, 16)}, Random(1))
    progress = Progress()
    rows = run(messages, 3, EVERY, batch_size=5, progress=progress)
    assert_rows(rows, {0: 64, 2: 64}, EVERY)
    assert rows.outcomes[1] == VideoOutcome(rows.shard.videos[1], failure=Failure(Reason.CORRUPT_FRAMES, "frame 65", 3))
    assert (progress.videos, progress.failed) == (3, 1)


def test_a_failure_after_the_end_counts() -> None:
    """A source that changed while it was read is reported after the last frame: the video has no rows."""
    changed = Failure(Reason.SOURCE_CHANGED, "changed while it was read")
    rows = run(in_turn({0: [*stream(0, 40), changed], 1: stream(1, 20)}), 2, EVERY)
    assert_rows(rows, {1: 20}, EVERY)
    assert rows.outcomes[0].failure == changed


def test_a_video_is_counted_once() -> None:
    """Progress never shows more videos than the shard has, though a failure may follow an end."""
    progress = Progress()
    failed = Failure(Reason.SOURCE_CHANGED, "changed while it was read")
    run(in_turn({0: [*stream(0, 40), failed]}), 1, EVERY, progress=progress)
    assert (progress.videos, progress.failed) == (1, 1)


def test_videos_that_never_began_are_failures() -> None:
    """A Failure alone is a complete stream; a shard may contain nothing else."""
    failed = Failure(Reason.SOURCE_MISSING, "gone")
    rows = run([(1, failed), (0, VideoStart(1)), (0, failed)], 2, EVERY)
    assert [o.failure for o in rows.outcomes] == [failed, failed]
    assert rows.clips == () and rows.features_RD.shape == (0, 17)


def test_a_video_of_no_frames_is_a_failure() -> None:
    """If no frame could be decoded, the video fails with no_frames."""
    rows = run(in_turn({0: stream(0, 0), 1: stream(1, 16)}), 2, EVERY)
    assert rows.outcomes[0].failure == Failure(Reason.NO_FRAMES, "no frame could be decoded")
    assert_rows(rows, {1: 16}, EVERY)


# --- features that cannot be used -------------------------------------------------------------------------------------


def spoil(video: int, value: float, *, whole: bool = True, frame: int = 16) -> Callable[[FLOAT32], FLOAT32]:
    """Set the feature (or one number) of the clip that starts at `frame` of a video; all others become small."""

    def scale(features_BD: FLOAT32) -> FLOAT32:
        out_BD = features_BD / np.float32(1e6)
        hit_B = features_BD[:, 1] == video * 65536 + frame
        out_BD[hit_B, slice(None) if whole else slice(3, 4)] = value
        return out_BD

    return scale


@pytest.mark.parametrize(
    ("value", "whole", "dtype"),
    [
        (np.nan, False, "float32"),
        (np.inf, False, "float32"),
        (-np.inf, False, "float16"),
        (0.0, True, "float32"),
        (-0.0, True, "float32"),
        (70_000.0, False, "float16"),
        (-70_000.0, False, "float16"),
        (1e-9, True, "float16"),
    ],
)
@pytest.mark.fault(11)
def test_a_feature_that_cannot_be_used_fails_its_own_video_only(value: float, whole: bool, dtype: str) -> None:
    """NaN, infinity, only zeros, or a value that becomes one of them in the stored type: this video is non_finite, and
    other videos in the same batches keep their rows."""
    spy, progress = Spy(spoil(1, value, whole=whole)), Progress()
    streams = {at: stream(at, 40) for at in range(3)}
    rows = run(in_turn(streams), 3, EVERY, spy, batch_size=9, dtype=dtype, progress=progress)
    assert [o.failure.reason if o.failure else None for o in rows.outcomes] == [None, Reason.NON_FINITE, None]
    assert rows.outcomes[1].failure.detail == "1 of 3 clips have no usable feature, the first is 1"  # type: ignore[union-attr]
    assert {clip.video_id for clip in rows.clips} == {"id0", "id2"} and rows.features_RD.shape == (6, 17)
    clean = run(in_turn(streams), 3, EVERY, Spy(spoil(9, 0.0)), dtype=dtype)
    np.testing.assert_array_equal(rows.features_RD, clean.features_RD[[0, 1, 2, 6, 7, 8]])
    assert (progress.videos, progress.failed) == (3, 1)


@pytest.mark.parametrize(("value", "whole"), [(70_000.0, False), (1e-9, True), (0.0, False)])
def test_what_the_stored_type_can_hold_is_kept(value: float, whole: bool) -> None:
    """Numbers too large or too small for float16 are valid as float32, and single zeros are always valid."""
    rows = run(in_turn({0: stream(0, 40), 1: stream(1, 40)}), 2, EVERY, Spy(spoil(1, value, whole=whole)))
    assert all(o.failure is None for o in rows.outcomes)
    assert rows.features_RD[4, 3] == np.float32(value)


def test_features_are_rounded_to_what_is_stored() -> None:
    """With float16 embeddings, the float32 rows have exactly the stored values, and pooling uses these."""
    rows = run(in_turn({0: stream(0, 40)}), 1, EVERY, Spy(lambda features_BD: features_BD / 7), dtype="float16")
    exact = run(in_turn({0: stream(0, 40)}), 1, EVERY, Spy(lambda features_BD: features_BD / 7))
    assert rows.features_RD.dtype == np.float32 and not np.array_equal(rows.features_RD, exact.features_RD)
    np.testing.assert_array_equal(rows.features_RD, exact.features_RD.astype(np.float16).astype(np.float32))


# --- scores -----------------------------------------------------------------------------------------------------------


def score(features_BD: FLOAT32) -> FLOAT32:
    """Two class probabilities that identify their clip."""
    first_B = features_BD[:, 1] / np.float32(2**20)
    return np.stack([first_B, 1 - first_B], 1)


@settings(deadline=None, max_examples=30)
@given(shards(), st.integers(1, 9), st.integers(0, 2**32))
def test_scores_are_stored_with_the_features_of_their_clip(
    shard: tuple[Sampling, list[Drawn]], batch_size: int, seed: int
) -> None:
    """However the streams are mixed, fail or restart: each row has the scores of its own clip, float32 [R, 2]."""
    sampling, videos = shard
    messages = mixed({at: video.messages for at, video in enumerate(videos)}, Random(seed))
    rows = run(messages, len(videos), sampling, scores=score, batch_size=batch_size)
    assert (rows.probs_RK.dtype, rows.probs_RK.shape) == (np.float32, (len(rows.clips), 2))
    np.testing.assert_array_equal(rows.probs_RK, score(rows.features_RD))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.fault(11)
def test_scores_that_are_not_finite_fail_their_own_video_only(value: float) -> None:
    """NaN or infinity in one class of one clip, with valid features: that video is non_finite, others keep rows."""

    def spoiled(features_BD: FLOAT32) -> FLOAT32:
        probs_BK = score(features_BD)
        probs_BK[features_BD[:, 1] == 65536 + 16, 1] = value
        return probs_BK

    rows = run(in_turn({at: stream(at, 40) for at in range(3)}), 3, EVERY, scores=spoiled, batch_size=9)
    assert [o.failure.reason if o.failure else None for o in rows.outcomes] == [None, Reason.NON_FINITE, None]
    assert rows.outcomes[1].failure.detail == "1 of 3 clips have no usable feature, the first is 1"  # type: ignore[union-attr]
    assert {clip.video_id for clip in rows.clips} == {"id0", "id2"} and rows.probs_RK.shape == (6, 2)


def test_scores_are_not_rounded_with_the_features() -> None:
    """With float16 embeddings, the probabilities stay float32, as the network returned them."""
    by_7 = Spy(lambda features_BD: features_BD / 7)
    narrow = run(in_turn({0: stream(0, 40)}), 1, EVERY, by_7, scores=lambda one: score(one * 7), dtype="float16")
    np.testing.assert_array_equal(narrow.probs_RK, run(in_turn({0: stream(0, 40)}), 1, EVERY, scores=score).probs_RK)


def test_an_encoder_of_other_scores_is_refused() -> None:
    """If the number of score rows is not that of the clips, it is a ValueError; rows are not shifted."""
    with pytest.raises(ValueError, match="zip"):
        run(in_turn({0: stream(0, 40)}), 1, EVERY, scores=lambda one: score(one)[1:])


# --- short videos, long videos ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "value", "n_clips"), [("every", 16, 1), ("uniform", 3, 3)])
@pytest.mark.parametrize("n_frames", [1, 5, 15])
def test_a_short_video_is_padded_by_its_last_frame(rule: str, value: int, n_clips: int, n_frames: int) -> None:
    """`n_padded` counts the repeats, and the clip ends with its last frame, not where a longer one would."""
    sampling = Sampling(rule, value, 16)  # type: ignore[arg-type] # one of the two
    rows = run(in_turn({0: stream(0, n_frames)}), 1, sampling)
    assert len(rows.clips) == n_clips
    for clip, feature_D in zip(rows.clips, rows.features_RD, strict=True):
        assert (clip.span.start_frame, clip.span.end_frame, clip.span.n_padded) == (0, n_frames, 16 - n_frames)
        assert (clip.start_s, clip.end_s) == (0.0, pytest.approx(n_frames / FPS))
        assert feature_D[1:].tolist() == [min(t, n_frames - 1) for t in range(16)]


def test_times_are_those_of_the_frames() -> None:
    """A clip starts with its first frame and ends with its last, at their own times, however uneven these are."""
    start_s_N = np.cumsum(np.arange(40) % 3 + 1.0)
    end_s_N = np.append(start_s_N[1:], 100.0)
    uneven = FrameBlock(np.arange(40), start_s_N, end_s_N, frames_of(0, range(40)))
    rows = run([(0, info(40)), (0, uneven), (0, VideoEnd(40, 100.0))], 1, EVERY)
    assert [(clip.start_s, clip.end_s) for clip in rows.clips] == [
        (start_s_N[first], end_s_N[first + 15]) for first in (0, 16, 24)
    ]


@pytest.mark.parametrize(("stride", "step"), [(16, 1), (4, 1), (16, 3)])
def test_memory_does_not_grow_with_the_length_of_a_video(stride: int, step: int) -> None:
    """Of 10 000 frames in blocks of 64, at most a clip, a stride and a few blocks are in memory at a time."""
    sampling, alive, most = Sampling("every", stride, 16, step), 0, 0

    def gone(count: int) -> None:
        nonlocal alive
        alive -= count

    def messages() -> Iterator[tuple[int, DecodeMessage]]:
        nonlocal alive, most
        yield 0, info(10_000)
        for first in range(0, 10_000, 64):
            made = block(0, range(first, min(first + 64, 10_000)))
            pixels = made.frames_NHWC if made.frames_NHWC.base is None else made.frames_NHWC.base
            weakref.finalize(pixels, gone, len(made.numbers_N))
            alive += len(made.numbers_N)
            most = max(most, alive)
            del pixels
            yield 0, made
            del made
        yield 0, VideoEnd(10_000, 400.0)

    assert_rows(run(messages(), 1, sampling, batch_size=2), {0: 10_000}, sampling)
    assert most <= sampling.span + stride + 4 * 64


def test_an_empty_block_changes_nothing() -> None:
    """A block without frames is accepted anywhere: before the first frame, between frames, after the last."""
    empty = block(0, [])
    messages = [info(20), empty, block(0, range(10)), empty, block(0, range(10, 20)), empty, VideoEnd(20, 0.8)]
    assert_rows(run(in_turn({0: messages}), 1, EVERY), {0: 20}, EVERY)


# --- inconsistent messages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_stream_that_stops_without_an_end_is_refused(kept: int) -> None:
    """Without an end or a failure, a ValueError names the video, wherever its stream stopped."""
    with pytest.raises(ValueError, match="id1: the messages of this video stopped without an end or a failure"):
        run(in_turn({0: stream(0, 40), 1: stream(1, 40)[:kept]}), 2, EVERY)


@pytest.mark.parametrize("numbers", [[0, 1, 1], [0, 2, 1], [5, 0]])
def test_frames_out_of_order_are_refused(numbers: list[int]) -> None:
    """A frame that arrives twice or too late is a ValueError."""
    with pytest.raises(ValueError, match=r"frame \d came after frame \d"):
        run([(0, info(40)), (0, block(0, numbers))], 1, EVERY)


@pytest.mark.parametrize(("promised", "true"), [(40, 20), (40, 44), (20, 40)])
@pytest.mark.parametrize("sampling", [Sampling("uniform", 4, 4), Sampling("random", 4, 4, seed=0)])
def test_clips_of_a_wrong_promise_are_refused(sampling: Sampling, promised: int, true: int) -> None:
    """If the clips were chosen by the declared count, another count at the end is a ValueError."""
    messages = [info(promised), *blocks(0, np.arange(true), 8), VideoEnd(true, true / FPS)]
    with pytest.raises(ValueError, match=f"clips were cut for {promised} frames, but the video has {true}"):
        run(in_turn({0: messages}), 1, sampling)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), samplings.filter(lambda one: one.needs_the_count), st.integers(1, 64))
def test_a_wrong_promise_never_gives_wrong_rows(promised: int, true: int, sampling: Sampling, size: int) -> None:
    """If clips depend on the count, whatever the container declares: the rows match the true count, or it is a
    ValueError."""
    messages = [info(promised), *blocks(0, np.arange(true), size), VideoEnd(true, true / FPS)]
    try:
        rows = run(in_turn({0: messages}), 1, sampling)
    except ValueError:
        assert promised != true
    else:
        assert_rows(rows, {0: true}, sampling)


def test_more_frames_than_the_end_says_are_refused() -> None:
    """An end that excludes frames which are already in clips is a ValueError."""
    with pytest.raises(ValueError, match="the video has 10"):
        run([(0, info(40)), (0, block(0, range(40))), (0, VideoEnd(10, 0.4))], 1, SMALL)


def test_an_encoder_of_other_rows_is_refused() -> None:
    """If the number of features is not that of the clips, it is a ValueError; rows are not shifted."""
    with pytest.raises(ValueError, match="zip"):
        run(in_turn({0: stream(0, 40)}), 1, EVERY, lambda frames_NHWC, index_BT: np.ones((2, 17), np.float32))


MISFITS: dict[str, list[DecodeMessage]] = {
    "frames before an info": [block(0, range(16)), VideoEnd(16, 0.64)],
    "an end before an info": [VideoEnd(16, 0.64)],
    "frames after a failure": [info(16), Failure(Reason.TRUNCATED, "ends"), block(0, range(16))],
    "a frame left out": [info(16), block(0, [*range(7), *range(8, 16)]), VideoEnd(16, 0.64)],
    "the first frame left out": [info(16), block(0, range(1, 16)), VideoEnd(16, 0.64)],
    "the last frame left out": [info(16), block(0, range(15)), VideoEnd(16, 0.64)],
}


@pytest.mark.parametrize("what", MISFITS)
def test_inconsistent_messages_are_refused(what: str) -> None:
    """A ValueError with a message if frames are missing or outside of a video."""
    with pytest.raises(ValueError, match=r"id0|frame"):
        run(in_turn({0: MISFITS[what]}), 1, EVERY)


# --- the outcomes in the footer ---------------------------------------------------------------------------------------

words, counts = st.text(max_size=12), st.integers(0, 2**40)
seconds = st.floats(0, 1e9)
refs = st.builds(VideoRef, words, words, words, words, st.integers(-1, 2**50), st.none() | counts, st.none() | words)
infos = st.builds(VideoInfo, counts, counts, counts, counts, seconds, seconds, words, words, counts, words)
outcomes = st.one_of(
    st.builds(
        VideoOutcome, refs, st.integers(0, 2**31 - 1), infos, st.builds(VideoEnd, counts, seconds, st.booleans())
    ),
    st.builds(VideoOutcome, refs, failure=st.builds(Failure, st.sampled_from(Reason), words, counts)),
)


@settings(deadline=None)
@given(st.lists(outcomes, max_size=4).map(tuple))
def test_outcomes_come_back_from_the_footer(given_: tuple[VideoOutcome, ...]) -> None:
    """The outcomes of the videos survive JSON, as text and as bytes, with reasons of the fixed set."""
    text = outcomes_json(given_, 1)
    assert parse_outcomes(text, 1) == parse_outcomes(text.encode(), 1) == given_
    assert all(isinstance(o.failure.reason, Reason) for o in parse_outcomes(text, 1) if o.failure)


def test_outcomes_of_a_shard_come_back() -> None:
    """The outcomes of an extraction survive: rows and failures."""
    rows = run(in_turn({0: stream(0, 40), 1: [Failure(Reason.NOT_A_VIDEO, "text \u00fc")]}), 2, EVERY)
    assert parse_outcomes(outcomes_json(rows.outcomes, 1), 1) == rows.outcomes


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["video", "n_clips", "info", "end", "failure", "reason"]), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values.map(json.dumps) | st.text(max_size=20))
def test_text_that_is_not_a_record_of_outcomes_is_refused(text: str) -> None:
    """Anything else raises one of MALFORMED, which readers treat as damage."""
    try:
        assert parse_outcomes(text, 1) == ()
    except MALFORMED:
        return
    assert json.loads(text) in ([], {}, "")
