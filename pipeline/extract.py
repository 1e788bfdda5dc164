"""The decode messages of one shard -> its rows. Clips are batched across videos and collected per video. No Ray here.

    (video, message) ...  ->  tracks, one per video: frames in, clips out as soon as they are complete
                          ->  one batch of B clips of any videos -> encode -> features back to their tracks
                          ->  rows in manifest order

A track keeps only the frames that a later clip may need, so memory does not grow with the length of a video. The batch
shape is fixed (the encoder pads the last one), so a row's numbers do not depend on its neighbours. Batches may be
encoded by `inference_threads` while the thread that receives messages fills the next one. Shards that are extracted at
the same time may share these threads.

Legend: N frames, B clips of a batch, T frames of a clip, D feature dimension, K classes whose scores are stored (0
without `--scores`), R rows.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from p3d.pipeline.clips.rules import (
    Sampling,
    clip_spans,
    frame_numbers,
    grid_span,
    laid_over,
    settled_spans,
    ticks_of,
    whole_ticks,
)
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import (
    FLOAT32,
    INT64,
    UINT8,
    ChunkEnd,
    ClipRow,
    ClipSpan,
    DecodeMessage,
    Failure,
    FrameBlock,
    ShardPlan,
    ShardRows,
    VideoAlive,
    VideoEnd,
    VideoFetched,
    VideoInfo,
    VideoOutcome,
    VideoRef,
    VideoShareable,
    VideoStart,
)

# frames_NHWC, index_BT -> features_BD, probs_BK; the frames are in memory that is used again once it has returned
Encode = Callable[[UINT8, INT64], tuple[FLOAT32, FLOAT32]]
NewBuffer = Callable[[int], UINT8]  # number of bytes -> memory of that size, uint8 with one axis
_Encoded = tuple[FLOAT32, FLOAT32, float]  # the result of `Encode`, and the seconds it took
_Owner = tuple["_Track", int]  # the track that a clip belongs to, and the index of the clip


@dataclass(slots=True)
class Progress:
    """Counters that grow while a shard is computed; another thread may read them at any time.

    Times: `encode_s` is the mean per inference thread, `wait_s` the time waiting for messages, and `full_s` the time
    waiting for an inference thread while the next batch is ready.
    """

    videos: int = 0
    failed: int = 0
    clips: int = 0
    frames: int = 0
    encode_s: float = 0.0
    wait_s: float = 0.0
    full_s: float = 0.0

    def count(self, before: VideoEnd | Failure | None, now: VideoEnd | Failure | None) -> None:
        """Count the end `now` of a video, which replaces the end `before` of an earlier decode if there was one."""
        self.videos += (now is not None) - (before is not None)
        self.failed += isinstance(now, Failure) - isinstance(before, Failure)


def plain_buffer(n_bytes: int) -> UINT8:
    """Ordinary memory for frames: uint8 [n_bytes]."""
    return np.empty(n_bytes, np.uint8)


class FrameBuffers:
    """One buffer per thread for the frames of its batches.

    It is kept, because the kernel maps fresh memory page by page, and the copy is half slower. A batch may lie in
    the buffer of its thread until `encode` has returned: by then its results are on the host, so no copy to a device
    that reads the buffer is still in flight, also where copies are asynchronous.
    """

    def __init__(self, new_buffer: NewBuffer = plain_buffer) -> None:
        self._new_buffer, self._of_thread = new_buffer, threading.local()

    def gather(self, frames: Sequence[UINT8], most: int) -> UINT8:
        """The frames [H, W, C] as one array [N, H, W, C], valid until the same thread gathers again.

        A buffer that is too small is replaced by one for `most` such frames, so it is seldom replaced.
        """
        size = frames[0].size
        kept: UINT8 | None = getattr(self._of_thread, "buffer", None)
        if kept is None or kept.size < len(frames) * size:
            kept = self._of_thread.buffer = self._new_buffer(max(most, len(frames)) * size)
        frames_NHWC = kept[: len(frames) * size].reshape(len(frames), *frames[0].shape)
        return np.stack(frames, out=frames_NHWC)


class InferenceThreads:
    """`n` threads that compute one batch each at a time. `new_buffer` allocates the memory for its frames."""

    def __init__(self, n: int, new_buffer: NewBuffer = plain_buffer) -> None:
        self.n, self.pool = n, ThreadPoolExecutor(n, thread_name_prefix="inference")
        self.buffers = FrameBuffers(new_buffer)
        self.under_way = 0  # batches, including those that wait for a thread
        self._lock = threading.Lock()

    def submit(self, run: Callable[[], _Encoded]) -> Future[_Encoded]:
        """Compute a batch as soon as a thread is free."""
        with self._lock:
            self.under_way += 1
        future = self.pool.submit(run)
        future.add_done_callback(self._done)
        return future

    def run_in_each(self, run: Callable[[], None]) -> None:
        """Call `run` once in each thread, in all at the same time. Raises the error of the first that fails."""
        together = threading.Barrier(self.n)

        def one() -> None:
            together.wait()  # so that no thread takes two
            run()

        for future in [self.pool.submit(one) for _ in range(self.n)]:
            future.result()

    def _done(self, _: Future[_Encoded]) -> None:
        with self._lock:
            self.under_way -= 1


def extract_shard(
    shard: ShardPlan,
    messages: Iterable[tuple[int, DecodeMessage]],
    encode: Encode,
    *,
    sampling: Sampling,
    batch_size: int,
    feature_dim: int,
    n_scores: int,
    embedding_dtype: str,
    progress: Progress | None = None,
    inference_threads: InferenceThreads | None = None,
) -> ShardRows:
    """Compute the rows of a shard. `messages` are (position of the video in the shard, message), in any interleaving.

    `encode` is called by the `inference_threads` in parallel, or by the calling thread if None. Each thread
    holds one batch of frames of each shard that uses it.

    A `VideoInfo` starts a video, or restarts it: everything computed for it before is dropped. A video whose features
    or scores are not finite, or whose features are all zero, becomes a failure. ValueError if the messages of a video
    are inconsistent.
    """
    progress = progress or Progress()
    tracks, ends = _computed(
        shard.videos, messages, encode, sampling, batch_size, progress, inference_threads=inference_threads
    )
    outcomes: list[VideoOutcome] = []
    clips: list[ClipRow] = []
    features = [np.empty((0, feature_dim), np.float32)]
    probs = [np.empty((0, n_scores), np.float32)]
    for at, video in enumerate(shard.videos):
        outcome, features_ND, probs_NK = _settle(video, tracks.get(at), ends.get(at), embedding_dtype)
        progress.failed += outcome.failure is not None and not isinstance(ends.get(at), Failure)
        outcomes.append(outcome)
        if outcome.failure is None:
            clips += [ClipRow(video.video_id, video.path, *times) for times in tracks[at].clips]
            features.append(features_ND)
            probs.append(probs_NK)
    return ShardRows(shard, tuple(outcomes), tuple(clips), np.concatenate(features), np.concatenate(probs))


def _computed(
    videos: Sequence[VideoRef],
    messages: Iterable[tuple[int, DecodeMessage]],
    encode: Encode,
    sampling: Sampling,
    batch_size: int,
    progress: Progress,
    *,
    inference_threads: InferenceThreads | None = None,
    wanted: Mapping[int, frozenset[int]] = MappingProxyType({}),
) -> tuple[dict[int, _Track], dict[int, VideoEnd | Failure]]:
    """The track and the end of each video, by its position. With `wanted`, only these clips of a video are encoded."""
    tracks: dict[int, _Track] = {}
    ends: dict[int, VideoEnd | Failure] = {}
    with _Batch(encode, batch_size, progress, inference_threads) as batch:
        for at, message in _timed(messages, progress):
            match message:
                case VideoStart() | VideoFetched() | VideoAlive() | VideoShareable() | ChunkEnd():
                    continue
                case VideoInfo():
                    tracks[at] = _Track(message, sampling.for_video(videos[at].video_id), wanted.get(at))
                    progress.count(ends.pop(at, None), None)
                    continue
                case Failure():
                    tracks.pop(at, None)
                case _ if at not in tracks:
                    name = type(message).__name__
                    raise ValueError(f"{videos[at].video_id}: {name} without a VideoInfo before it")
                case FrameBlock():
                    progress.frames += len(message.numbers_N)
                    batch.add(tracks[at], tracks[at].take(message))
                    continue
                case VideoEnd():
                    batch.add(tracks[at], tracks[at].finish(message))
                    tracks[at].release()
            progress.count(ends.get(at), message)
            ends[at] = message
        batch.finish()
    return tracks, ends


@dataclass(frozen=True, slots=True, eq=False)
class ClipValues:
    """One clip with all that its row says: its place in the video, its feature [D], rounded as stored, and scores [K].

    Two are compared by `p3d.pipeline.results.agreement`."""

    span: ClipSpan
    start_s: float
    end_s: float
    feature_D: FLOAT32
    prob_K: FLOAT32


@dataclass(frozen=True, slots=True, eq=False)
class SomeClips:
    """The number of clips of a video, and those of its clips that were wanted and exist, by their index."""

    n_clips: int
    clips: Mapping[int, ClipValues]


def extract_clips(
    videos: Sequence[VideoRef],
    messages: Iterable[tuple[int, DecodeMessage]],
    encode: Encode,
    wanted: Mapping[int, frozenset[int]],
    *,
    sampling: Sampling,
    batch_size: int,
    embedding_dtype: str,
) -> list[SomeClips | Failure]:
    """Compute the clips `wanted` of each video, by its position and their indices, as `extract_shard` does.

    The other clips are cut, and not encoded. ValueError if the messages of a video are inconsistent.
    """
    tracks, ends = _computed(videos, messages, encode, sampling, batch_size, Progress(), wanted=wanted)
    found: list[SomeClips | Failure] = []
    for at, video in enumerate(videos):
        end, track = ends.get(at), tracks.get(at)
        if isinstance(end, Failure):
            found.append(end)
        elif track is None or end is None:
            raise _stopped(video)
        else:
            found.append(SomeClips(len(track.clips), dict(_values_of(track, wanted[at], embedding_dtype))))
    return found


def _values_of(track: _Track, wanted: frozenset[int], dtype: str) -> Iterator[tuple[int, ClipValues]]:
    for at, (place, feature_D, prob_K) in enumerate(zip(track.clips, track.features, track.probs, strict=True)):
        if at in wanted:
            assert feature_D is not None and prob_K is not None, "each clip that is wanted was encoded"
            yield at, ClipValues(*place, _rounded(feature_D, dtype), prob_K)


def _stopped(video: VideoRef) -> ValueError:
    return ValueError(f"{video.video_id}: the messages of this video stopped without an end or a failure")


def _rounded(values: FLOAT32, dtype: str) -> FLOAT32:
    """As they are stored. Values too large for float16 become infinity."""
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(np.float32)


def _settle(
    video: VideoRef, track: _Track | None, end: VideoEnd | Failure | None, dtype: str
) -> tuple[VideoOutcome, FLOAT32, FLOAT32]:
    """The outcome of one video. If it has rows, also its features [N, D] and scores [N, K] as they will be stored."""
    nothing = np.empty((0, 0), np.float32)
    if isinstance(end, Failure):
        return VideoOutcome(video, failure=end), nothing, nothing
    if track is None or end is None:
        raise _stopped(video)
    if not track.clips:
        return VideoOutcome(video, failure=Failure(Reason.NO_FRAMES, "no frame could be decoded")), nothing, nothing
    features_ND = _rounded(np.stack(track.features), dtype)  # type: ignore[arg-type] # all are set
    probs_NK = np.stack(track.probs)  # type: ignore[arg-type] # as above
    good_N = np.isfinite(features_ND).all(1) & (features_ND != 0).any(1) & np.isfinite(probs_NK).all(1)
    if not good_N.all():
        detail = f"{int((~good_N).sum())} of {len(good_N)} clips have no usable feature, the first is {good_N.argmin()}"
        return VideoOutcome(video, failure=Failure(Reason.NON_FINITE, detail)), nothing, nothing
    return VideoOutcome(video, n_clips=len(track.clips), info=track.info, end=end), features_ND, probs_NK


@dataclass(slots=True)
class _Track:
    """One video in progress: the frames that a later clip may still need, and the clips that were made.

    Clips count ticks (`clips.rules.ticks_of`): the frames of the video, or with `--fps` those of the resampled video.
    A frame is kept once, however many ticks it has.
    """

    info: VideoInfo
    sampling: Sampling
    wanted: frozenset[int] | None = None  # the indices of the clips to encode; None for all
    kept: list[_Kept] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # first tick of each kept frame
    clips: list[tuple[ClipSpan, float, float]] = field(default_factory=list)
    features: list[FLOAT32 | None] = field(default_factory=list)
    probs: list[FLOAT32 | None] = field(default_factory=list)
    last_number: int = -1
    n_whole: int = 0  # ticks that no later frame can change
    n_promised: int = field(init=False)  # ticks that the container declares
    promised: list[ClipSpan] = field(init=False)  # clips for that count, if they depend on the count; else empty

    def __post_init__(self) -> None:
        self.n_promised = laid_over(self.sampling, self.info.n_frames, self.info.duration_s)
        self.promised = clip_spans(self.sampling, self.n_promised) if self.sampling.needs_the_count else []

    def take(self, block: FrameBlock) -> list[tuple[ClipSpan, list[_Kept]]]:
        """Add frames. Returns the clips (span, T frames) that are now complete."""
        times = block.start_s_N.tolist(), block.end_s_N.tolist()
        for number, start_s, end_s, frame_HWC in zip(block.numbers_N.tolist(), *times, block.frames_NHWC, strict=True):
            if number <= self.last_number:
                raise ValueError(f"frame {number} came after frame {self.last_number}")
            first, end = ticks_of(self.sampling, number, start_s, end_s)
            self.kept.append(_Kept(number, end, start_s, end_s, frame_HWC))
            self.firsts.append(first)
            self.last_number, self.n_whole = number, whole_ticks(self.sampling, number, end_s)
        cut = []
        while (span := self._next_whole()) is not None:
            cut.append(self._cut(span, max(self.n_promised, span.end_frame)))
        return cut

    def finish(self, end: VideoEnd) -> list[tuple[ClipSpan, list[_Kept]]]:
        """The remaining clips, which could only be determined with the last frame."""
        n_ticks = laid_over(self.sampling, end.n_frames, end.duration_s)
        spans = clip_spans(self.sampling, n_ticks)
        if [clip[0] for clip in self.clips] != spans[: len(self.clips)]:
            raise ValueError(f"clips were cut for {self.n_promised} frames, but the video has {n_ticks}")
        return [self._cut(span, n_ticks, end.duration_s) for span in spans[len(self.clips) :]]

    def _next_whole(self) -> ClipSpan | None:
        """The next clip that no later frame can change, if its frames have arrived."""
        at = len(self.clips)
        if not self.sampling.needs_the_count:
            return grid_span(self.sampling, at) if at < settled_spans(self.sampling, self.n_whole) else None
        spans = self.promised
        return spans[at] if at < len(spans) and spans[at].end_frame <= self.n_whole else None

    def _cut(self, span: ClipSpan, n_ticks: int, duration_s: float = float("inf")) -> tuple[ClipSpan, list[_Kept]]:
        numbers_T = frame_numbers(self.sampling, span, n_ticks).tolist()
        frames = [self._at(span, tick, n_ticks) for tick in numbers_T]
        start_s, end_s = frames[0].start_s, frames[-1].end_s
        if self.sampling.fps is not None:
            start_s = numbers_T[0] / self.sampling.fps
            end_s = min((numbers_T[-1] + 1) / self.sampling.fps, duration_s)
        self.clips.append((span, start_s, end_s))
        self.features.append(None)
        self.probs.append(None)
        return span, frames

    def _at(self, span: ClipSpan, tick: int, n_ticks: int) -> _Kept:
        """The frame at a tick: the last one that starts at or before it."""
        at = bisect_right(self.firsts, tick) - 1
        if at < 0 or self.kept[at].end <= tick:
            raise ValueError(f"clip {span.index} needs frame {tick} of {n_ticks}, which was not sent")
        return self.kept[at]

    def release(self) -> None:
        """Drop all frames, since no clip is left to cut. Each would keep its whole message in shared memory."""
        self.kept.clear()
        self.firsts.clear()

    def forget(self) -> None:
        """Drop the frames before the newest clip's start. Every later clip starts at or after it."""
        if self.clips:
            first = self.clips[-1][0].start_frame
            n_dropped = next((at for at, kept in enumerate(self.kept) if kept.end > first), len(self.kept))
            del self.kept[:n_dropped], self.firsts[:n_dropped]


class _Kept(NamedTuple):
    """A frame that a clip may still need: its number, the end of its ticks, its time and its pixels [H, W, 3]."""

    number: int
    end: int
    start_s: float
    end_s: float
    frame_HWC: UINT8


class _Batch:
    """Clips of any videos that wait for the encoder. A frame that several clips share is stored once.

    At most one batch per inference thread is in progress. An error of a thread is raised at the next full batch.
    """

    def __init__(
        self, encode: Encode, size: int, progress: Progress, inference_threads: InferenceThreads | None
    ) -> None:
        self.encode, self.size, self.progress, self.inference_threads = encode, size, progress, inference_threads
        self.buffers = inference_threads.buffers if inference_threads else FrameBuffers()
        self.frames: list[UINT8] = []
        self.position_of: dict[tuple[int, int], int] = {}  # (id of track, frame number) -> index in frames
        self.index: list[list[int]] = []
        self.owners: list[_Owner] = []
        self.running: dict[Future[_Encoded], list[_Owner]] = {}

    def __enter__(self) -> _Batch:
        return self

    def __exit__(self, *raised: object) -> None:
        for future in self.running:
            future.cancel()
        wait(self.running)

    def add(self, track: _Track, clips: list[tuple[ClipSpan, list[_Kept]]]) -> None:
        for span, frames_T in clips:
            if track.wanted is not None and span.index not in track.wanted:
                continue
            self.index.append([self._position(track, kept) for kept in frames_T])
            self.owners.append((track, span.index))
            if len(self.owners) == self.size:
                self._flush()
        track.forget()

    def finish(self) -> None:
        """Encode the remaining clips, and wait for all inference threads."""
        if self.owners:
            self._flush()
        while self.running:
            self._take()

    def _position(self, track: _Track, kept: _Kept) -> int:
        position = self.position_of.setdefault((id(track), kept.number), len(self.frames))
        if position == len(self.frames):
            self.frames.append(kept.frame_HWC)
        return position

    def _flush(self) -> None:
        frames, index_BT, owners = self.frames, np.array(self.index, np.int64), self.owners
        self.frames, self.position_of, self.index, self.owners = [], {}, [], []
        if self.inference_threads is None:
            self._settle(owners, self._run(frames, index_BT))
            return
        if len(self.running) == self.inference_threads.n:
            self._take()
        self.running[self.inference_threads.submit(partial(self._run, frames, index_BT))] = owners

    def _run(self, frames: list[UINT8], index_BT: INT64) -> _Encoded:
        """Runs in an inference thread: encode one batch, and measure the seconds it took."""
        started = time.monotonic()
        frames_NHWC = self.buffers.gather(frames, self.size * index_BT.shape[1])
        frames.clear()  # frees the shared memory of their messages while the batch is computed
        features_BD, probs_BK = self.encode(frames_NHWC, index_BT)
        return features_BD, probs_BK, time.monotonic() - started

    def _take(self) -> None:
        """Wait until an inference thread has finished its batch."""
        started = time.monotonic()
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        self.progress.full_s += time.monotonic() - started
        for future in done:
            self._settle(self.running.pop(future), future.result())

    def _settle(self, owners: list[_Owner], encoded: _Encoded) -> None:
        features_BD, probs_BK, seconds = encoded
        self.progress.encode_s += seconds / (self.inference_threads.n if self.inference_threads else 1)
        for (track, at), feature_D, prob_K in zip(owners, features_BD, probs_BK, strict=True):
            track.features[at], track.probs[at] = feature_D, prob_K
        self.progress.clips += len(owners)


def _timed(messages: Iterable[tuple[int, DecodeMessage]], progress: Progress) -> Iterator[tuple[int, DecodeMessage]]:
    """Yield the same messages, and count the seconds spent waiting for them."""
    iterator = iter(messages)
    while True:
        started = time.monotonic()
        item = next(iterator, None)
        progress.wait_s += time.monotonic() - started
        if item is None:
            return
        yield item
