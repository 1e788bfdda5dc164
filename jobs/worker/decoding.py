"""The decodes of one worker: one Ray task per decode, in its own process, streaming to the actor that owns it.

A decode has its own process because native decoders crash and hang on real archives. One that dies is tried again, and
its video fails only after repeated crashes. One that hangs is killed. Neither affects another video. We count retries
per video; Ray's own retries are off.

The current shards of a worker share its concurrent decodes (`worker.concurrency`). Each shard has its own thread.

A task whose video is on S3 fetches it first, so twice as many tasks are started as may decode. A task that has its
copy sends more messages than may be unread, which halts it. Its owner reads on when another decode has ended.

A decode that finds the memory of its GPU full, or whose GPU fails, is tried again alone. If the memory is full again,
its video fails. If the GPU fails again, the job stops, because the video is not at fault. A process whose GPU failed is
ended, because its CUDA context may be lost.

Short videos are decoded in groups, several by one task, because the overhead of a task exceeds their decoding time.
Those on S3 are fetched concurrently before the first is decoded. A failure in a group is attributed to none of its
videos: those that had not ended are decoded one by one.

When nothing else is left to start, a long video is shared. Its decode is stopped, and several continue from there
(`worker.parallel_decode`), each with its own copy if the video is on S3. They are read in turn. They reserve no CPU in
Ray, since a share could otherwise wait forever for a core that a later share holds. The worker's decode concurrency
limits their number.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from p3d.jobs.worker.concurrency import DecodeConcurrency, ShardTurn, Use
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD, DecodeSpec, decode_group_task, decode_video_task, is_remote
from p3d.jobs.worker.memory import NOTE
from p3d.jobs.worker.message_batches import MessageBatch, NodeFailed
from p3d.jobs.worker.parallel_decode import WORTH_S, Pace, Shared, UnexpectedMessage
from p3d.pipeline.decode.gop_chunks import Share
from p3d.pipeline.decode.routes.nvdec import PICTURES_BYTES
from p3d.pipeline.errors import NodeFault, Reason, StoreError
from p3d.pipeline.types import (
    DecodeMessage,
    Failure,
    FrameBlock,
    ShardPlan,
    VideoEnd,
    VideoFetched,
    VideoInfo,
    VideoRef,
    VideoShareable,
    VideoStart,
)

FETCHED_AHEAD = 2  # tasks that run at once, in multiples of `decode_tasks`, including those that only fetch
GROUP_VIDEOS = 16  # decoded by one task, at most
GROUP_BYTES = 4 * 1024**2  # of all their files
CHUNK_AHEAD = 5  # message batches that a share may be ahead: the blocks of a GOP chunk and its end
FETCHED_BYTES = 8 * 1024**3  # total size of current videos, above which none is fetched ahead
CRASHES_WITH_NOTE = 2  # native crashes after which a video fails
MOST_ATTEMPTS = 10  # per video, including those that ended with the loss of a node
DEATHS = 3  # of its process for unknown reasons after which a video fails; all but the first happened alone
# of a GPU that an NVDEC decode of its only worker reserves in Ray, just so that it is placed next to the worker
GPU_SHARE = 0.005
RAY_UNITS = 10_000  # of a GPU; Ray cuts a fraction to a whole number of them
# What one NVDEC decode takes of the GPU's memory, from above. Each of its processes has a CUDA context, and those that
# fetch ahead may have decoded before. The surfaces are 20 of 4096x2304 in NV12. Of the decoded pictures there is one
# copy of 8 bits and one of 32.
CONTEXT_BYTES = 512 * 1024**2
SURFACES_BYTES = 20 * 4096 * 2304 * 3 // 2
DECODE_BYTES = FETCHED_AHEAD * CONTEXT_BYTES + SURFACES_BYTES + 5 * PICTURES_BYTES
POLL_S = 0.5
TURN_S = 0.05  # between two checks whether another shard has left a decode


def gpus_of_a_worker(decoder: str, decode_tasks: int, workers_per_gpu: int = 1) -> float:
    """The fraction of a GPU that a worker reserves in Ray. Its NVDEC decodes on the same GPU need the rest of its part.

    Rounded down, so that all workers of a GPU fit: Ray would round 1/6 up.
    """
    whole = 1 - FETCHED_AHEAD * decode_tasks * GPU_SHARE if decoder == "nvdec" else 1
    return whole if workers_per_gpu == 1 else _rounded_down(whole / workers_per_gpu)


def gpus_of_a_decode(workers_per_gpu: int) -> float:
    """The fraction of a GPU that an NVDEC decode reserves in Ray."""
    return _rounded_down(GPU_SHARE / workers_per_gpu)


def _rounded_down(share: float) -> float:
    return math.floor(share * RAY_UNITS) / RAY_UNITS


def decodes_that_fit(free_bytes: int, decode_bytes: int = DECODE_BYTES) -> int:
    """The number of concurrent NVDEC decodes that fit into the free memory of a GPU; may be 0."""
    return max(0, free_bytes) // decode_bytes


_decode_video: Any = ray.remote(
    num_cpus=1, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=BLOCKS_AHEAD
)(decode_video_task)
_decode_group: Any = ray.remote(
    num_cpus=1, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=BLOCKS_AHEAD
)(decode_group_task)


@dataclass(slots=True)
class _Case:
    """One video of the shard: how often its decode was started, how its processes died, and its progress.

    `pace` is set if it may be shared, and `shared` while it is. Shares, and a decode that is stopped for sharing, do
    not count as attempts.
    """

    at: int
    video: VideoRef
    attempts: int = 0
    crashes: int = 0
    deaths: int = 0
    notes: int = 0
    info: VideoInfo | None = None
    pace: Pace | None = None
    shared: Shared | None = None
    gpu_errors: int = 0  # how often a decode found the GPU's memory full, or the GPU failed
    never_began: int = 0  # shares whose process never began
    fetch_s: float = 0.0  # duration of its fetch
    whole: bool = False  # it must not be shared: sharing failed, or is not worth it
    single: bool = False  # it must not be in a group, because its group failed


@dataclass(slots=True)
class _Stream:
    """A running decode: its video, its fatal-signal note, and since when it has been silent.

    A `group` of videos continues with the `rest` after the `case`. A decode of a video on S3 is `fetching` a copy, then
    `halted` until another decode has ended, then decoding. A decode of a local video decodes from the start.
    """

    case: _Case
    note: Path
    share: Share | None
    fetching: bool
    halted: bool = False
    began: float = 0.0  # when the current fetch or decode began; monotonic seconds
    silent_since: float | None = None  # None until its process has begun, and while it is halted
    ended: bool = False
    group: bool = False
    rest: deque[_Case] = field(default_factory=deque)

    @property
    def decodes(self) -> bool:
        """True if its process has started and is neither fetching nor halted."""
        return self.silent_since is not None and not self.fetching and not self.halted


@dataclass(slots=True)
class Decoding:
    """The decodes of one shard: at most `decode_tasks` at a time, each in its own process.

    The current shards of one worker share its concurrent decodes, each by its `turn`. `fetch_s` and `decode_s` are the
    seconds of all decodes that ended by themselves, including waits for their reader.
    """

    shard: ShardPlan
    spec: DecodeSpec
    scratch: Path
    turn: ShardTurn | None = None
    streams: dict[Any, _Stream] = field(default_factory=dict)
    waiting: deque[_Case] = field(default_factory=deque)
    fetch_s: float = 0.0
    decode_s: float = 0.0

    def messages(self) -> Generator[tuple[int, DecodeMessage], None, None]:
        """Yield (position in the shard, message) as they arrive. Every video ends with a VideoEnd or a Failure."""
        waiting = self.waiting = deque(_Case(at, video) for at, video in enumerate(self.shard.videos))
        retried_alone: deque[_Case] = deque()  # videos whose decode process died, or whose shares failed
        turn = self.turn or ShardTurn(DecodeConcurrency(self.spec.decode_tasks))
        try:
            while waiting or retried_alone or self.streams:
                self._start_decodes(turn, retried_alone)
                generators = [generator for generator in self.streams if self._is_read(generator)]
                if not generators:  # all decodes of this worker belong to other shards
                    time.sleep(TURN_S)
                    continue
                ready, _ = ray.wait(generators, num_returns=len(generators), timeout=0)
                turn.tell(replace(turn.use, at_work=max(0, turn.use.begun - len(ready))))
                if not ready:
                    ready = self._wait(generators, TURN_S if waiting and turn.others.running else POLL_S)
                for generator in ready:
                    yield from self._next(generator, retried_alone)
                for generator in generators:
                    if generator not in ready and self._overdue(generator):
                        yield from self._kill(generator, retried_alone)
        finally:
            for generator in list(self.streams):
                self._end(generator)
            turn.tell(Use(wants=False))  # the last clips are still to be embedded, but the next shard may decode

    def _start_decodes(self, turn: ShardTurn, retried_alone: deque[_Case]) -> None:
        """Start and resume as many decodes as may run. A video that is retried alone has its worker to itself."""
        waiting = self.waiting
        with turn.concurrency.lock:
            others, n = turn.others, turn.concurrency.n
            if turn.may_start:
                while waiting and self._may_start(waiting[0].video, others, n):
                    self._submit_group(self._group(n))
                if retried_alone and not self.streams and not others.running:
                    self._submit(retried_alone.popleft())
            if turn.may_go_on:
                self._go_on(n - others.begun)
            if not waiting and not others.wants and not others.alone:
                # shares reserve no CPU in Ray, so their number is limited to this worker's part of the cores
                self._share_out(min(n, self.spec.decode_tasks) - others.running)
            turn.tell(self._use(bool(waiting or retried_alone)))

    def _use(self, wants: bool) -> Use:
        streams = self.streams.values()
        begun = sum(stream.decodes for stream in streams)
        return Use(
            running=len(streams),
            begun=begun,
            at_work=begun,
            fetching=sum(stream.fetching and stream.silent_since is not None for stream in streams),
            halted=sum(stream.halted for stream in streams),
            size_bytes=sum(stream.case.video.size_bytes for stream in streams),
            wants=wants,
            alone=any(stream.case.crashes + stream.case.deaths + stream.case.gpu_errors for stream in streams),
        )

    def _may_start(self, video: VideoRef, others: Use, concurrency: int) -> bool:
        """May one more task be started? Beyond the decode concurrency only to fetch, and within a limit."""
        running = len(self.streams) + others.running
        if running < concurrency or not is_remote(video):
            return running < concurrency
        size_bytes = video.size_bytes + others.size_bytes + sum(s.case.video.size_bytes for s in self.streams.values())
        return running < FETCHED_AHEAD * concurrency and size_bytes <= FETCHED_BYTES

    def _group(self, concurrency: int) -> list[_Case]:
        """Take the next video, and the short ones after it, but leave as many for each other concurrent decode.

        Of videos on S3 each group takes half as many, because more tasks run than decode.
        """
        remote = is_remote(self.waiting[0].video)
        most = min(GROUP_VIDEOS, len(self.waiting) // (concurrency * (2 * FETCHED_AHEAD if remote else 1)))
        cases, size_bytes = [self.waiting.popleft()], 0
        if self._is_short(cases[0]):
            size_bytes = cases[0].video.size_bytes
            while len(cases) < most and self._is_short(self.waiting[0]) and is_remote(self.waiting[0].video) == remote:
                size_bytes += self.waiting[0].video.size_bytes
                if size_bytes > GROUP_BYTES:
                    break
                cases.append(self.waiting.popleft())
        return cases

    def _is_short(self, case: _Case) -> bool:
        return self.spec.policy.decoder != "nvdec" and not case.single and case.video.size_bytes <= GROUP_BYTES

    def _submit_group(self, cases: list[_Case]) -> None:
        if len(cases) == 1:
            self._submit(cases[0])
            return
        for case in cases:
            case.attempts, case.whole = 1, True
        case = cases[0]
        case.notes += 1
        note, fetching = self._note(case), is_remote(case.video)
        task = _decode_group.options(num_cpus=0.5 if fetching else 1)
        generator = task.remote(tuple(case.video for case in cases), self.spec, self.scratch, note)
        self.streams[generator] = _Stream(case, note, None, fetching=fetching, group=True, rest=deque(cases[1:]))

    def _one_by_one(self, stream: _Stream) -> None:
        """A group has failed: those of its videos that had not ended are started again, one per task."""
        stream.note.unlink(missing_ok=True)
        for case in reversed([*([] if stream.ended else [stream.case]), *stream.rest]):
            case.attempts, case.single, case.whole = 0, True, False
            case.info = case.pace = None
            self.waiting.appendleft(case)

    def _note(self, case: _Case) -> Path:
        return self.scratch / f"{self.shard.name}-{case.at}-{case.notes}.crash"

    def _submit(self, case: _Case) -> None:
        case.attempts += 1
        fetching = is_remote(case.video)
        gpus = gpus_of_a_decode(self.spec.workers_per_gpu) if self.spec.policy.decoder == "nvdec" else 0
        self._start(case, None, _decode_video.options(num_cpus=0.5 if fetching else 1, num_gpus=gpus))

    def _submit_share(self, case: _Case, share: Share) -> Any:
        options = {"num_cpus": 0, "_generator_backpressure_num_objects": CHUNK_AHEAD}
        return self._start(case, share, _decode_video.options(**options))

    def _start(self, case: _Case, share: Share | None, task: Any) -> Any:
        case.notes += 1
        note = self._note(case)
        generator = task.remote(case.video, self.spec, self.scratch, note, share)
        self.streams[generator] = _Stream(case, note, share, fetching=share is None and is_remote(case.video))
        return generator

    def _share_out(self, concurrency: int) -> None:
        """Give the free decodes to the video that will take longest, if that at least doubles its decodes."""
        free = concurrency - len(self.streams)
        cases = {id(stream.case): stream.case for stream in self.streams.values() if not stream.ended}.values()
        now = time.monotonic()
        left = [
            (case.pace.left_s(now), case)
            for case in cases
            if case.pace and free >= (len(case.shared.decodes) if case.shared else 1)
        ]
        left_s, longest = max(left, key=lambda pair: pair[0], default=(0.0, None))
        if longest is not None and left_s >= self._worth_s(longest, free + 1):
            self._share(longest, free)

    def _worth_s(self, case: _Case, n_decodes: int) -> float:
        """Seconds of decoding that must be left for `n_decodes`. Each fetches a copy, which slows all fetches."""
        if is_remote(case.video) and n_decodes * case.video.size_bytes > FETCHED_BYTES:
            return inf
        return WORTH_S + 2 * n_decodes * case.fetch_s

    def _share(self, case: _Case, n_more: int) -> None:
        """Stop its decodes at the position of their reader, and continue with `n_more` in addition."""
        assert case.info is not None and case.pace is not None  # it has begun, and may be shared
        mine = [generator for generator, stream in self.streams.items() if stream.case is case]
        for generator in mine:
            self._end(generator)
        case.attempts = 0
        first, n_decodes = case.pace.last + 1, len(mine) + n_more
        shares = [Share(first, index, n_decodes) for index in range(n_decodes)]
        case.pace = Pace(case.info.n_frames, time.monotonic(), first, case.pace.last)
        decodes = deque(self._submit_share(case, share) for share in shares)
        case.shared = Shared(case.info, case.pace.last, decodes)

    def _is_read(self, generator: Any) -> bool:
        stream = self.streams[generator]
        shared = stream.case.shared
        return not stream.halted and (shared is None or shared.decodes[0] is generator)

    def _wait(self, generators: list[Any], timeout_s: float) -> list[Any]:
        started = time.monotonic()
        ready, _ = ray.wait(generators, num_returns=1, timeout=timeout_s)
        for generator in generators:
            if (pace := self.streams[generator].case.pace) is not None:
                pace.waited_s += time.monotonic() - started
        return ready  # type: ignore[no-any-return] # Ray's generators have no type

    def _go_on(self, concurrency: int) -> None:
        """Let tasks that have their copy decode, oldest first, as many as may decode."""
        free = concurrency - sum(stream.decodes for stream in self.streams.values())
        for stream in [stream for stream in self.streams.values() if stream.halted][: max(free, 0)]:
            stream.halted, stream.began = False, time.monotonic()
            stream.silent_since = stream.began

    def _next(self, generator: Any, retried_alone: deque[_Case]) -> Iterator[tuple[int, DecodeMessage]]:
        """Yield the messages that are ready, or handle the end or the death of the stream."""
        stream = self.streams[generator]
        try:
            message_batch: MessageBatch = ray.get(next(generator))
        except StopIteration:
            yield from self._over(self.streams.pop(generator), retried_alone, None)
            return
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StoreError):
                raise cause from None
            if stream.case.shared is None:
                raise
            yield from self._over(self.streams.pop(generator), retried_alone, error)
            return
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError, TaskCancelledError) as error:
            yield from self._over(self.streams.pop(generator), retried_alone, error)
            return
        stream.silent_since = time.monotonic()
        for message in message_batch:
            if generator not in self.streams:  # an earlier message has ended this decode
                continue
            if self._is_gpu_error(message):
                stream.case.gpu_errors += 1
            if isinstance(message, NodeFailed):
                self._end(generator)
                if stream.case.gpu_errors > 1:
                    raise NodeFault(f"{message.detail}. It was decoding {stream.case.video.uri}, for the second time")
                retried_alone.append(stream.case)
            elif self._is_gpu_error(message) and stream.case.gpu_errors == 1:
                self._end(generator)
                retried_alone.append(stream.case)
            else:
                yield from self._handle_message(stream, message, retried_alone)

    def _is_gpu_error(self, message: DecodeMessage | NodeFailed) -> bool:
        full = isinstance(message, Failure) and message.reason == Reason.DECODE_MEMORY
        return isinstance(message, NodeFailed) or (full and self.spec.policy.decoder == "nvdec")

    def _handle_message(
        self, stream: _Stream, message: DecodeMessage, retried_alone: deque[_Case]
    ) -> Iterator[tuple[int, DecodeMessage]]:
        stream.ended = isinstance(message, (VideoEnd, Failure))
        if isinstance(message, VideoStart):
            if stream.began and stream.rest:
                stream.case = stream.rest.popleft()
            else:
                stream.began = time.monotonic()
        if stream.ended:  # the next video of a group has begun, even before its VideoStart is read
            now = time.monotonic()
            self.decode_s, stream.began = self.decode_s + now - stream.began, now
        if stream.case.shared:
            yield from self._of_a_share(stream.case, stream.case.shared, message, retried_alone)
        elif not isinstance(message, VideoFetched):
            yield stream.case.at, self._record(stream.case, message)
        elif stream.fetching:
            stream.fetching, stream.halted, stream.silent_since = False, True, None
            stream.case.fetch_s = time.monotonic() - stream.began
            self.fetch_s += stream.case.fetch_s

    def _record(self, case: _Case, message: DecodeMessage) -> DecodeMessage:
        """Record the progress of a decode of the whole video. Returns its message, with the number of attempts."""
        match message:
            case Failure():
                return Failure(message.reason, message.detail, case.attempts)
            case VideoInfo():  # not the first one: decord gave up, or the count was wrong
                case.whole = case.whole or case.info is not None
                case.info, case.pace = message, None
            case VideoShareable() if case.info and not case.whole:
                case.pace = Pace(case.info.n_frames, time.monotonic())
            case FrameBlock() if case.pace and len(message.numbers_N):
                case.pace.last = int(message.numbers_N[-1])
        return message

    def _of_a_share(
        self, case: _Case, shared: Shared, message: DecodeMessage, retried_alone: deque[_Case]
    ) -> Iterator[tuple[int, DecodeMessage]]:
        try:
            block = shared.take(message)
        except UnexpectedMessage:
            self._start_over(case, shared, retried_alone)
            return
        if case.pace:
            case.pace.last = shared.last
            case.pace = case.pace if shared.end is None else None
        self._listen(shared)
        if block is not None:
            yield case.at, block

    def _listen(self, shared: Shared) -> None:
        """Restart the timeout of the decode that is read next: while it was not read, it was not silent."""
        stream = self.streams[shared.decodes[0]]
        if stream.silent_since is not None:
            stream.silent_since = time.monotonic()

    def _start_over(self, case: _Case, shared: Shared, retried_alone: deque[_Case]) -> None:
        """A share failed: decode the video whole and alone, since only that can show whether the video is at fault."""
        for generator in shared.decodes:
            if generator in self.streams:
                self._end(generator)
        case.info = case.pace = case.shared = None
        case.whole = True
        retried_alone.append(case)

    def _over(
        self, stream: _Stream, retried_alone: deque[_Case], error: Exception | None
    ) -> Iterator[tuple[int, DecodeMessage]]:
        """A decode has ended, normally or not, and is no longer in `streams`."""
        case, shared = stream.case, stream.case.shared
        if stream.group:
            self._one_by_one(stream)
            return
        if shared is None:
            if error is not None or not stream.ended:
                yield from self._died(stream, retried_alone, error)
            return
        stream.note.unlink(missing_ok=True)
        if stream.silent_since is None and stream.share and case.never_began < MOST_ATTEMPTS:
            case.never_began += 1  # Ray may send a task to a process that was killed a moment ago
            shared.decodes[0] = self._submit_share(case, stream.share)
            return
        try:
            if error is not None:
                raise UnexpectedMessage(str(error))
            end = shared.drop_first()
        except UnexpectedMessage:
            self._start_over(case, shared, retried_alone)
            return
        if end is None:
            self._listen(shared)
        else:
            case.shared = None
            yield case.at, end

    def _died(
        self, stream: _Stream, retried_alone: deque[_Case], error: Exception | None
    ) -> Iterator[tuple[int, DecodeMessage]]:
        """A decode process died. The video fails at once if a note says that it exceeded its memory, at the second
        fatal signal, or at the third death without a note.

        The loss of a node does not count, up to MOST_ATTEMPTS.
        """
        case = stream.case
        node_lost = isinstance(error, (NodeDiedError, ObjectLostError)) and case.attempts < MOST_ATTEMPTS
        note = stream.note.read_text() if stream.note.exists() else ""
        stream.note.unlink(missing_ok=True)
        if note.startswith(NOTE):
            detail = f"its decode took {note.removeprefix(NOTE).strip()} (max_decode_memory)"
            yield case.at, Failure(Reason.DECODE_MEMORY, detail, case.attempts)
            return
        if note:
            case.crashes += 1
        elif not node_lost:
            case.deaths += 1
        if case.crashes >= CRASHES_WITH_NOTE or case.deaths >= DEATHS:
            if isinstance(error, OutOfMemoryError):
                detail = f"its process was ended {case.deaths} times because the machine ran out of memory"
                yield case.at, Failure(Reason.DECODE_MEMORY, detail, case.attempts)
                return
            how = note.strip().splitlines()[0] if note else f"its process was killed {case.deaths} times"
            yield case.at, Failure(Reason.DECODER_CRASH, f"the decoder crashed: {how}", case.attempts)
        else:
            retried_alone.append(case)

    def _overdue(self, generator: Any) -> bool:
        since = self.streams[generator].silent_since
        return since is not None and time.monotonic() - since > self.spec.video_timeout_s

    def _kill(self, generator: Any, retried_alone: deque[_Case]) -> Iterator[tuple[int, DecodeMessage]]:
        """Kill a decode beyond its deadline (`decode.deadlines`). If it hangs while closing, its video is complete."""
        stream = self._end(generator)
        if stream.group:
            self._one_by_one(stream)
        elif stream.case.shared:
            yield from self._over(stream, retried_alone, None)
        elif not stream.ended:
            what = "the fetch made no progress" if stream.fetching else "gave no frame"
            detail = f"{what} for {self.spec.video_timeout_s:g} s and was stopped"
            yield stream.case.at, Failure(Reason.DECODE_TIMEOUT, detail, stream.case.attempts)

    def _end(self, generator: Any) -> _Stream:
        """Kill its process. The next task on that machine removes its copy, since the process may run on briefly."""
        stream = self.streams.pop(generator)
        ray.cancel(generator, force=True)
        stream.note.unlink(missing_ok=True)
        return stream
