"""Decoding in a child process: the same messages, and a crash or a hang becomes a Failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.child import decode_each_in_child, decode_in_child, end_children
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import Reason, StoreDenied
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import DecodeMessage, Failure, FrameBlock, FrameSpec, VideoEnd, VideoStart
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.conftest import REPO
from tests.zoo import make

SPEC, SAMPLING = FrameSpec((64, 64), (72, 108)), Sampling("every", 16, 16)


def given(scratch: Path) -> dict[str, object]:
    return {"policy": DecodePolicy(), "limits": DecodeLimits(), "store_options": DEFAULTS, "scratch": scratch}


def in_child(path: Path, scratch: Path, timeout_s: float = 60) -> Iterator[DecodeMessage]:
    video = local_row(path.parent, os.fsencode(path.name))
    return decode_in_child(video, SPEC, SAMPLING, timeout_s=timeout_s, **given(scratch))


def plain(message: DecodeMessage) -> object:
    """A message that can be compared; the process that sent it does not count."""
    if isinstance(message, FrameBlock):
        return message.numbers_N.tolist(), message.start_s_N.tolist(), message.frames_NHWC.tobytes()
    return "start" if isinstance(message, VideoStart) else message


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.video(tmp_path_factory.mktemp("child") / "video.mp4", "libx264", 100, gop=12)


def test_the_messages_are_those_of_this_process(video: Path, tmp_path: Path) -> None:
    """A good video gives the same messages, pixels included, and a broken one the same failure."""
    broken = make.damaged(video, tmp_path / "broken.mp4", 0.0, 64)
    for path in (video, broken):
        row = local_row(path.parent, os.fsencode(path.name))
        expected = [plain(message) for message in decode_messages(row, SPEC, SAMPLING, **given(tmp_path))]
        assert [plain(message) for message in in_child(path, tmp_path)] == expected
    assert isinstance(expected[-1], Failure)


def make_children_run(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Children run `body` after their first message; only they read the sitecustomize of the folder."""
    lines = "\n    ".join(["yield VideoStart(os.getpid())", *body.splitlines(), "yield None"])
    (folder / "sitecustomize.py").write_text(
        "import ctypes, faulthandler, os, signal, threading\n"
        "import p3d.pipeline.decode.messages as messages\n"
        "from p3d.pipeline.types import VideoStart\n"
        f"def decode_messages(video, *given, **named):\n    {lines}\n"
        "messages.decode_messages = decode_messages\n"
    )
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.fault(13, 14)
@pytest.mark.parametrize(
    ("body", "reason", "detail"),
    [
        (
            "faulthandler._sigsegv()",
            Reason.DECODER_CRASH,
            "the decoder crashed: Fatal Python error: Segmentation fault",
        ),
        ("os._exit(3)", Reason.DECODER_CRASH, "the decoder crashed: exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", Reason.DECODE_MEMORY, "its process was killed"),
        (
            "os.write(2, b'memory: 9 MiB, the limit is 8\\n')\nos._exit(1)",
            Reason.DECODE_MEMORY,
            "its decode took 9 MiB, the limit is 8",
        ),
        ("threading.Event().wait()", Reason.DECODE_TIMEOUT, "gave no frame for 1 s"),
        ("ctypes.PyDLL(None).sleep(20)", Reason.DECODE_TIMEOUT, "gave no frame for 1 s"),  # it holds the GIL
    ],
)
def test_a_crash_and_a_hang_are_failures(
    body: str, reason: Reason, detail: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the child, the caller survives, learns the reason, and no process is left."""
    make_children_run(tmp_path, monkeypatch, body)
    started = time.monotonic()
    start, failure = in_child(video, tmp_path, timeout_s=1 if reason is Reason.DECODE_TIMEOUT else 60)
    assert isinstance(start, VideoStart) and isinstance(failure, Failure)
    assert failure.reason is reason and failure.detail.startswith(detail)
    assert not psutil.pid_exists(start.pid)
    assert time.monotonic() - started < 15  # one child would sleep for 20 s


def test_several_videos_share_a_child_that_may_crash(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash fails its own video, after a second try in a child of its own, and the others are whole."""
    rows = [local_row(video.parent, os.fsencode(video.name))] * 3
    make_children_run(
        tmp_path,
        monkeypatch,
        "from p3d.pipeline.types import VideoEnd\nif video.path == 'bad': os._exit(3)\nyield VideoEnd(1, 1.0)\nreturn",
    )
    rows[1] = replace(rows[1], path="bad")
    found = [
        (at, message.pid if isinstance(message, VideoStart) else message)
        for at, message in decode_each_in_child(rows, SPEC, SAMPLING, **given(tmp_path))
    ]
    first, again, third = (next(pid for number, pid in found if number == at) for at in range(3))
    assert [at for at, _ in found] == [0, 0, 1, 1, 1, 2, 2]
    assert found[2][1] == first and found[3][1] not in (first, found[5][1]) and again == first != third
    assert found[4][1].reason is Reason.DECODER_CRASH
    assert found[1][1] == found[6][1] == VideoEnd(1, 1.0)


def test_several_videos_give_the_messages_of_each(video: Path, tmp_path: Path) -> None:
    """What a child sends of several videos is what it sends of each."""
    broken = make.damaged(video, tmp_path / "broken.mp4", 0.0, 64)
    rows = [local_row(path.parent, os.fsencode(path.name)) for path in (video, broken, video)]
    found: dict[int, list[object]] = {}
    for at, message in decode_each_in_child(rows, SPEC, SAMPLING, **given(tmp_path)):
        found.setdefault(at, []).append(plain(message))
    good, bad = ([plain(one) for one in in_child(path, tmp_path)] for path in (video, broken))
    assert found == {0: good, 1: bad, 2: good}


def test_store_errors_are_not_failures(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A StoreError of the child is raised in the parent, with its message."""
    make_children_run(tmp_path, monkeypatch, "from p3d.pipeline.errors import StoreDenied\nraise StoreDenied('denied')")
    with pytest.raises(StoreDenied, match="denied"):
        list(in_child(video, tmp_path))


def test_a_child_that_cannot_start_fails_no_video(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is an error of this program, with the last line that the child wrote."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'no library\\n')\nos._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"exit code 9\): no library"):
        list(in_child(video, tmp_path))


def test_a_reader_that_stops_leaves_no_process(video: Path, tmp_path: Path) -> None:
    """Closing the messages kills the child."""
    messages = in_child(video, tmp_path)
    start = next(messages)
    assert psutil.pid_exists(start.pid)
    messages.close()
    assert not psutil.pid_exists(start.pid)


def test_all_children_are_ended_at_once(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of each hanging child gets a Failure, and no process is left."""
    make_children_run(tmp_path, monkeypatch, "threading.Event().wait()")
    both = [in_child(video, tmp_path) for _ in range(2)]
    pids = [next(messages).pid for messages in both]
    end_children()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert all(isinstance(next(messages), Failure) for messages in both)
    end_children()  # also works without children


CALLER = """
import os, sys, time
from pathlib import Path
from tests.pipeline.test_child import in_child
messages = in_child(Path(sys.argv[1]), Path(sys.argv[2]))
print(next(messages).pid, flush=True)
if sys.argv[3] == "read":
    print(type(list(messages)[-1]).__name__)
time.sleep(60 * (sys.argv[3] == "wait"))
"""


def test_a_child_does_not_outlive_its_parent(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent killed by SIGKILL leaves no hanging decoder behind, and its main module runs only once."""
    script = tmp_path / "caller.py"
    script.write_text(CALLER)  # without `if __name__ == "__main__"`
    command = [sys.executable, str(script), str(video), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    ran = subprocess.run([*command, "read"], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert ran.stdout.split()[1:] == [VideoEnd.__name__]
    hang = tmp_path / "hang"
    hang.mkdir()
    make_children_run(hang, monkeypatch, "threading.Event().wait()")
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), str(hang)])
    with subprocess.Popen([*command, "wait"], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
    assert not child.is_running()
