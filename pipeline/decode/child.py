"""Decoding in a child process, without Ray: the caller survives a crash of a native decoder and learns the reason.

    decode_in_child ──> in_a_child ──(function, arguments)──> child: its messages ──pickles through a pipe──> the same
    thumbnails_in_child ──^                                                                     messages, or a Failure

A native decoder may crash or hang. A child that dies or stays silent becomes a `Failure`, as in a job; here it is not
tried again. The pipe holds less than one block, so the child is at most one block ahead of its reader. A child whose
parent has died exits; `end_children` kills all children at once. The child is a plain subprocess, because
`multiprocessing` would run the caller's main module again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, TypeVar

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import JobError, Reason
from p3d.pipeline.recipe import VIDEO_TIMEOUT_S
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import DecodeMessage, Failure, FrameSpec, VideoEnd, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy

T = TypeVar("T")

START_S = 60.0  # for a child to start, on a busy machine
MEMORY_NOTE = "memory: "  # the begin of the line that a child prints when it exceeds its memory limit
TIDY_S = 5.0  # for a child to exit after its last message
_alive: set[subprocess.Popen[bytes]] = set()  # the children of all threads


@dataclass(frozen=True, slots=True, eq=False)
class _Child:
    """A child process, the pipe through which it answers, and the file with what it prints."""

    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]


class _Spare(threading.local):
    """The children of each thread that were started before they are needed."""

    def __init__(self) -> None:
        self.children: list[_Child] = []


_spare = _Spare()


class _Marker(Enum):
    """What a child reports about itself, between messages."""

    BEGUN = 1
    DONE = 2


def decode_in_child(
    video: VideoRef,
    spec: FrameSpec,
    sampling: Sampling,
    *,
    policy: DecodePolicy,
    limits: DecodeLimits,
    store_options: StoreOptions,
    scratch: Path,
    timeout_s: float = VIDEO_TIMEOUT_S,
) -> Generator[DecodeMessage, None, None]:
    """The messages of `decode_messages`, decoded in a child process; a Failure last if the video cannot be used.

    `timeout_s` as in `in_a_child`, whatever the size of the file. Closing the iterator kills the child. StoreError
    propagates. RuntimeError if no child starts: the video is not the cause.
    """
    named = {"policy": policy, "limits": limits, "store_options": store_options, "scratch": scratch}
    named["deadline_s"] = timeout_s
    with closing(in_a_child(decode_messages, (video, spec, sampling), named, timeout_s=timeout_s)) as messages:
        for message in messages:
            yield message
            if isinstance(message, VideoEnd | Failure):
                return


def decode_each(
    videos: Sequence[VideoRef], spec: FrameSpec, sampling: Sampling, named: dict[str, Any]
) -> Iterator[tuple[int, DecodeMessage]]:
    """The messages of each video after the other, with its position."""
    for at, video in enumerate(videos):
        for message in decode_messages(video, spec, sampling, **named):
            yield at, message


def decode_each_in_child(
    videos: Sequence[VideoRef],
    spec: FrameSpec,
    sampling: Sampling,
    *,
    policy: DecodePolicy,
    limits: DecodeLimits,
    store_options: StoreOptions,
    scratch: Path,
    timeout_s: float = VIDEO_TIMEOUT_S,
) -> Generator[tuple[int, DecodeMessage], None, None]:
    """`decode_in_child` for several videos, with the position of each: they share one child, whose start is costly.

    If the child crashes or hangs, the video goes first in another one, and fails if that ends the same way.
    """
    named = {"policy": policy, "limits": limits, "store_options": store_options, "scratch": scratch}
    named["deadline_s"] = timeout_s
    first = 0
    while first < len(videos):
        at = first
        with closing(in_a_child(decode_each, (videos[first:], spec, sampling, named), {}, timeout_s=timeout_s)) as all_:
            for message in all_:
                if isinstance(message, Failure):  # of the child, at this video
                    if at == first:
                        yield at, message
                        at += 1
                    break
                yield first + message[0], message[1]
                at = first + message[0] + isinstance(message[1], VideoEnd | Failure)
        first = at


def in_a_child(
    function: Callable[..., Iterator[T]],
    given: tuple[Any, ...],
    named: dict[str, Any],
    *,
    timeout_s: float,
    total_s: float = inf,
    begun: Callable[[subprocess.Popen[bytes]], object] = lambda _: None,
) -> Generator[T | Failure, None, None]:
    """What `function(*given, **named)` yields in a child; a Failure last if the child crashes or falls silent.

    The function must be defined at module level; function and arguments are pickled. `timeout_s` is the longest wait
    for the next message once the child has started, and `total_s` for all of them, after which it is killed
    (`decode_timeout`). Closing the iterator kills the child. `begun` gets the process, which another thread may kill.
    JobError propagates. RuntimeError if no child starts.
    """
    with contextlib.ExitStack() as stack:
        ready = _spare.children.pop() if _spare.children else stack.enter_context(_child())
        stack.callback(ready.process.kill)
        child, connection, output = ready.process, ready.connection, ready.output
        assert child.stdin is not None, "Popen was given a pipe for stdin"
        begun(child)
        with contextlib.suppress(BrokenPipeError):  # the child is dead already, which is handled below
            pickle.dump((function, given, named), child.stdin)
        started, ends_at = False, time.monotonic() + total_s
        while True:
            left_s = ends_at - time.monotonic()
            if not connection.poll(max(0.0, min(timeout_s if started else START_S, left_s))):
                if not started and left_s > START_S:
                    raise RuntimeError(f"the child process for decoding did not start within {START_S:g} s")
                yield Failure(Reason.DECODE_TIMEOUT, f"gave no frame for {timeout_s:g} s and was stopped")
                return
            try:
                message = connection.recv()
            except (EOFError, OSError):  # OSError: it died while it sent a message
                yield _died(child, output, started)
                return
            if isinstance(message, JobError):
                raise message
            started = True
            if message is _Marker.DONE:
                return
            if message is not _Marker.BEGUN:
                yield message


def end_children() -> None:
    """Kill every child of this process, whichever thread reads it, so that a program can exit without waiting.

    Their readers get a Failure, as after a crash. None of the children writes anything after this.
    """
    children = list(_alive)
    for child in children:
        child.kill()
    for child in children:
        child.wait(TIDY_S)


@contextlib.contextmanager
def started_child() -> Iterator[None]:
    """Start a child for the next `in_a_child` of this thread, so that it imports its libraries meanwhile.

    It is killed at the end of the block.
    """
    with _child() as child:
        _spare.children.append(child)
        try:
            yield
        finally:
            if child in _spare.children:
                _spare.children.remove(child)


@contextlib.contextmanager
def _child() -> Iterator[_Child]:
    """A child that waits for its request, and the pipe through which it answers; it is always killed afterwards."""
    reads, writes = os.pipe()
    with tempfile.TemporaryFile() as output, Connection(reads, writable=False) as connection:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", "from p3d.pipeline.decode.child import main; main()", str(writes)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writes,),
                bufsize=0,  # no part of a request stays in a buffer here if the child is dead
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            os.close(writes)  # our copy: the pipe must end when the child does
        with child:
            _alive.add(child)
            try:
                yield _Child(child, connection, output)
            finally:
                child.kill()
                _alive.discard(child)


def _died(child: subprocess.Popen[bytes], output: IO[bytes], started: bool) -> Failure:
    """The failure of the video whose child died. RuntimeError if the child had not begun to decode."""
    code = child.wait(TIDY_S)
    output.seek(0)
    lines = output.read()[-100_000:].decode(errors="replace").strip().splitlines()
    if not started:
        raise RuntimeError(
            f"the child process for decoding could not start (exit code {code}): {lines[-1] if lines else ''}"
        )
    note = next((line for line in lines if line.startswith(MEMORY_NOTE)), None)
    if note is not None:
        return Failure(Reason.DECODE_MEMORY, f"its decode took {note.removeprefix(MEMORY_NOTE)} (max_decode_memory)")
    how = next((line for line in lines if line.startswith("Fatal Python error")), None)
    if how is None and code == -signal.SIGKILL:
        return Failure(Reason.DECODE_MEMORY, "its process was killed, as happens where the machine runs out of memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Failure(Reason.DECODER_CRASH, f"the decoder crashed: {how or name}")


def main() -> None:
    """Main function of the child: one request on stdin, messages to the pipe whose number is the argument."""
    faulthandler.enable()
    requests: Any = sys.stdin.buffer
    with Connection(int(sys.argv[1]), readable=False) as connection:
        function, given, named = pickle.load(requests)
        threading.Thread(target=_end_with_parent, args=(requests,), daemon=True).start()
        try:
            connection.send(_Marker.BEGUN)
            for message in function(*given, **named):
                connection.send(message)
            connection.send(_Marker.DONE)
        except JobError as error:
            connection.send(error)
        except BrokenPipeError:
            pass  # the reader has closed the pipe
    os._exit(0)  # nothing is left to clean up, and a decoder's own threads might not end


def _end_with_parent(requests: Any) -> None:
    """Exit when stdin ends, which happens when the parent does, even by SIGKILL."""
    requests.read()
    os._exit(1)
