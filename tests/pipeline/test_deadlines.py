"""A decode is stopped at its deadline: work that makes progress sends signs of life, and other work sends none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode import probe as probing
from p3d.pipeline.decode.child import decode_in_child
from p3d.pipeline.decode.deadlines import SIGNS, SMALL_BYTES, Progress, alive_while
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import Reason
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import Failure, FrameSpec, VideoAlive, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

SPEC, SAMPLING = FrameSpec((64, 64), (72, 108)), Sampling("every", 16, 16)


@pytest.fixture
def large(tmp_path: Path) -> VideoRef:
    """A Matroska file of 20 frames, too large to be opened without signs of life: 100 GiB of zeros follow it."""
    path = make.video(tmp_path / "large.mkv", "libx264", 20)
    with path.open("r+b") as file:
        file.truncate(100 << 30)
    return local_row(tmp_path, os.fsencode(path.name))


def test_work_gives_signs_while_it_progresses() -> None:
    """At most four per deadline, each after new progress; the result and an error of the work arrive unchanged."""
    progress, go_on = Progress(least=10), threading.Semaphore(0)

    def work(result: int) -> int:
        for _ in range(2):
            progress.add(10)
            go_on.acquire()
        return 1 // result

    started, found = time.monotonic(), 0
    signs = alive_while(lambda: work(1), progress, 0.4)
    for found in range(1, 3):
        assert next(signs) == VideoAlive()
        assert time.monotonic() - started >= found * 0.4 / SIGNS
        go_on.release()
    with pytest.raises(StopIteration) as stop:
        next(signs)
    assert (found, stop.value.value) == (2, 1)
    go_on.release(2)
    with pytest.raises(ZeroDivisionError):
        list(alive_while(lambda: work(0), progress, 0.4))


def test_work_without_progress_gives_none() -> None:
    """Too few bytes are no sign of life; work that cannot be counted is one until its time is over."""
    progress, end = Progress(least=10), threading.Event()
    progress.add(9)
    threading.Timer(0.5, end.set).start()
    assert list(alive_while(end.wait, progress, 0.2)) == []
    progress.uncounted_until = time.monotonic() + 60
    end.clear()
    signs = alive_while(end.wait, progress, 0.2)
    assert next(signs) == VideoAlive()
    end.set()
    assert list(signs) == []


@pytest.mark.fault(14)
def test_a_large_file_of_zeros_ends_at_the_deadline(large: VideoRef, tmp_path: Path) -> None:
    """FFmpeg looks for a packet in the zeros for many minutes: `decode_timeout` within 5 s of the deadline."""
    how: dict[str, Any] = {"policy": DecodePolicy(), "limits": DecodeLimits(), "store_options": DEFAULTS}
    messages = decode_in_child(large, SPEC, SAMPLING, timeout_s=2.0, scratch=tmp_path, **how)
    *_, (_, before_s), (failure, end_s) = [(message, time.monotonic()) for message in messages]
    assert isinstance(failure, Failure) and failure.reason is Reason.DECODE_TIMEOUT
    assert 1.9 <= end_s - before_s < 2.0 + 5.0


def test_a_large_file_that_is_slow_to_index_sends_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes longer than the deadline, and the packets that are read say that it goes on."""
    path = make.video(tmp_path / "v.mp4", "libx264", 20)
    with path.open("ab") as file:
        file.write(SMALL_BYTES.to_bytes(4, "big") + b"free" + bytes(SMALL_BYTES - 8))
    slow, true = threading.Semaphore(0), probing.packets

    def packets(*given: Any) -> Iterator[Any]:
        for at, packet in enumerate(true(*given)):
            yield packet
            if at % 8 == 7:
                assert slow.acquire(timeout=60)

    monkeypatch.setattr(probing, "packets", packets)
    how: dict[str, Any] = {"policy": DecodePolicy(), "limits": DecodeLimits(), "store_options": DEFAULTS}
    row = local_row(tmp_path, b"v.mp4")
    kinds = []
    for message in decode_messages(row, SPEC, SAMPLING, scratch=tmp_path, deadline_s=0.4, **how):
        kinds.append(type(message))
        if isinstance(message, VideoAlive):
            slow.release()
    assert kinds.count(VideoAlive) >= 2 and kinds.index(VideoInfo) > kinds.index(VideoAlive)
    assert kinds[-1] is VideoEnd
