"""Decoding in a process of its own, without Ray: whatever a native decoder does, its caller lives and is told why.

    decode_apart ──> in_a_child ──(function, arguments)──> child: its messages ──pickles through a pipe──> the same
    thumbnails_apart ──^                                                                     messages, or a Failure

A native decoder may crash or hang. A child that dies or stays silent becomes a `Failure`, as in a job; here it is not
tried again. The pipe holds less than one block, so the child is at most one block ahead of its reader. A child whose
parent is gone ends itself; `end_children` ends them all at once. It is a plain subprocess: one of `multiprocessing`
would run the caller's main module anew.
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
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, TypeVar

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.errors import JobError, Reason
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import DecodeMessage, Failure, FrameSpec, VideoEnd, VideoRef

T = TypeVar("T")

TIMEOUT_S = 300.0  # the default of `--video-timeout`
START_S = 60.0  # for a child to start, on a machine that has much else to do
TIDY_S = 5.0  # for a child that has sent everything to end
_PACKAGES = Path(__file__).resolve().parents[2]  # the folder that `pipeline` is in
_alive: set[subprocess.Popen[bytes]] = set()  # the children of all threads


class _Sign(Enum):
    """What a child says of itself, between messages."""

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
    timeout_s: float = TIMEOUT_S,
) -> Generator[DecodeMessage, None, None]:
    """The messages of `decode_messages`, decoded in a child; a Failure last if the video cannot be used.

    `timeout_s` as in `in_a_child`; for a file of many gigabytes it must allow for reading the whole file once. Closing
    the iterator kills the child. StoreError passes; RuntimeError if no child starts, which says nothing of the video.
    """
    named = {"policy": policy, "limits": limits, "store_options": store_options, "scratch": scratch}
    with closing(in_a_child(decode_messages, (video, spec, sampling), named, timeout_s=timeout_s)) as messages:
        for message in messages:
            yield message
            if isinstance(message, VideoEnd | Failure):
                return


def in_a_child(
    function: Callable[..., Iterator[T]], given: tuple[Any, ...], named: dict[str, Any], *, timeout_s: float
) -> Generator[T | Failure, None, None]:
    """What `function(*given, **named)` yields in a child; a Failure last if the child crashes or falls silent.

    It is a function of a module, and all of it is pickled. `timeout_s` is the longest wait for the next message once
    the child has started, after which it is killed (`decode_timeout`). Closing the iterator kills the child. JobError
    passes; RuntimeError if no child starts.
    """
    with tempfile.TemporaryFile() as said, _child(said) as (child, connection):
        assert child.stdin is not None, "it was asked for"
        with contextlib.suppress(BrokenPipeError):  # it is dead already: seen below
            pickle.dump((function, given, named), child.stdin)
        started = False
        while True:
            if not connection.poll(timeout_s if started else START_S):
                if not started:
                    raise RuntimeError(f"the process to decode in did not start within {START_S:g} s")
                yield Failure(Reason.DECODE_TIMEOUT, f"gave no frame for {timeout_s:g} s and was stopped")
                return
            try:
                message = connection.recv()
            except EOFError:
                yield _died(child, said, started)
                return
            if isinstance(message, JobError):
                raise message
            started = True
            if message is _Sign.DONE:
                return
            if message is not _Sign.BEGUN:
                yield message


def end_children() -> None:
    """Kill every child that there is now, whichever thread reads it: for a program whose end waits for no video.

    For their readers they crashed. None of them writes anything after this.
    """
    children = list(_alive)
    for child in children:
        child.kill()
    for child in children:
        child.wait(TIDY_S)


@contextlib.contextmanager
def _child(said: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """A child that waits for its request, and the pipe it answers through; it is gone afterwards, whatever happened."""
    reads, writes = os.pipe()
    with Connection(reads, writable=False) as connection:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", "from p3d.pipeline.decode.child import main; main()", str(writes)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                pass_fds=(writes,),
                bufsize=0,  # nothing of a request stays with us if the child is gone
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(_PACKAGES)])},
            )
        finally:
            os.close(writes)  # ours: the pipe must end with the child
        with child:
            _alive.add(child)
            try:
                yield child, connection
            finally:
                child.kill()
                _alive.discard(child)


def _died(child: subprocess.Popen[bytes], said: IO[bytes], started: bool) -> Failure:
    """What a child's death says: of the video, if it had begun on it."""
    code = child.wait(TIDY_S)
    said.seek(0)
    lines = said.read()[-100_000:].decode(errors="replace").strip().splitlines()
    if not started:
        raise RuntimeError(f"no process could be started to decode in (exit code {code}): {lines[-1] if lines else ''}")
    how = next((line for line in lines if line.startswith("Fatal Python error")), None)
    if how is None and code == -signal.SIGKILL:
        return Failure(Reason.DECODE_MEMORY, "its process was killed, as happens where the machine runs out of memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Failure(Reason.DECODER_CRASH, f"the decoder crashed: {how or name}")


def main() -> None:
    """The child: one request on stdin, messages to the pipe whose number is the argument."""
    faulthandler.enable()
    requests: Any = sys.stdin.buffer
    with Connection(int(sys.argv[1]), readable=False) as connection:
        function, given, named = pickle.load(requests)
        threading.Thread(target=_end_with_parent, args=(requests,), daemon=True).start()
        try:
            connection.send(_Sign.BEGUN)
            for message in function(*given, **named):
                connection.send(message)
            connection.send(_Sign.DONE)
        except JobError as error:
            connection.send(error)
        except BrokenPipeError:
            pass  # the reader has gone
    os._exit(0)  # nothing is left to tidy, and a decoder's own threads may not end


def _end_with_parent(requests: Any) -> None:
    """stdin ends when the parent does, however it went."""
    requests.read()
    os._exit(1)
