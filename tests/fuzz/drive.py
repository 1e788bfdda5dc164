"""Two warm processes decode thousands of broken files. One that crashes or hangs is replaced, and its file is retried.

The rules are those of `worker.decoding`: a file fails at the second fatal signal with a note, at the third death
without a note, and at the first timeout. Good files are decoded in between, and every frame of them is checked.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from p3d.jobs.worker.memory import NOTE
from tests.conftest import REPO
from tests.fuzz.mutate import DECOY, GOOD_FRAMES, MADE, fuzzed, n_frames, only_cut
from tests.watch import opened

CHILDREN = 2
EVERY_GOOD = 10  # broken files per good file
DEADLINE_S = 20.0  # without a message
GRACE_S = 2.0  # longest time from the deadline to the end of a hanging process
STRACE = shutil.which("strace")


@dataclass
class Tally:
    """The results of a campaign; `reasons` counts the broken files, under '' those that had frames."""

    seed: int
    files: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    kept: int = 0  # files with frames that are marked as cut short
    good: int = 0
    good_lost: list[str] = field(default_factory=list)
    internal: list[str] = field(default_factory=list)
    others_read: list[str] = field(default_factory=list)
    cut_unmarked: list[str] = field(default_factory=list)
    crashes: int = 0
    deaths: int = 0
    hangs: int = 0
    longest_over_s: float = 0.0  # from the deadline to the end of a hanging process
    longest_s: float = 0.0
    seconds: float = 0.0
    ends: dict[int, tuple[object, ...]] = field(default_factory=dict)  # file -> reason, cut, digest of frames

    def record(self) -> dict[str, object]:
        return {**vars(self), "reasons": dict(self.reasons.most_common()), "ends": len(self.ends)}


@dataclass
class Task:
    index: int  # -1: a good one
    name: str
    what: str
    path: Path
    crashes: int = 0
    deaths: int = 0
    started: float = 0.0


class Child:
    """A decoding process and its current task."""

    def __init__(self, root: Path, number: int, trace: bool) -> None:
        self.note = root / "notes" / f"{number}.crash"
        self.trace = root / f"trace{number}" if trace and STRACE else None
        strace = (STRACE, "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", "trace=open,openat,openat2,connect")
        before = [*strace, "-o", self.trace] if self.trace else []
        self.process = subprocess.Popen(
            list(map(str, [*before, sys.executable, "-m", "tests.fuzz.child"])),
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # strace and the traced process end together
        )
        self.task: Task | None = None
        self.ready = False
        self.buffer = b""
        self.heard = time.monotonic()

    def give(self, task: Task) -> None:
        self.task, self.heard, task.started = task, time.monotonic(), time.monotonic()
        line = json.dumps({"path": str(task.path), "note": str(self.note), "index": task.index})
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def end(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()


def campaign(seed: int, n_files: int, root: Path, *, trace: bool = False, first: int = 0) -> Tally:
    """Decode files [first, first + n_files) of a seed below `root`, with good ones in between."""
    files, tally, begun = root / "files", Tally(seed), time.monotonic()
    for folder in (files, root / "made", root / "notes"):
        folder.mkdir(parents=True)
    decoy = files / DECOY
    good = MADE["h264.mp4"](root / "good.mp4").read_bytes()
    decoy.write_bytes(good)
    waiting = _tasks(seed, first, n_files, root, good)
    again: list[Task] = []
    children: list[Child] = []
    traces: list[Path] = []
    with selectors.DefaultSelector() as selector, opened(files) as seen:
        try:
            while True:
                while len(children) < CHILDREN:
                    child = Child(root, len(traces), trace)
                    children.append(child)
                    traces.append(child.trace or root)
                    selector.register(child.process.stdout, selectors.EVENT_READ, child)  # type: ignore[arg-type]
                for child in children:
                    if child.ready and child.task is None:
                        task = again.pop() if again else next(waiting, None)
                        if task is not None:
                            child.give(task)
                if all(child.ready and child.task is None for child in children):
                    break
                at_work = {child.task.name for child in children if child.task}
                for key, _ in selector.select(0.2):
                    _hear(key.data, tally)
                tally.others_read += sorted(set(seen.take()) - at_work)
                for child in list(children):
                    if _over(child, tally, again):
                        selector.unregister(child.process.stdout)  # type: ignore[arg-type]
                        children.remove(child)
        finally:
            for child in children:
                child.end()
    tally.seconds = time.monotonic() - begun
    if trace and STRACE:
        tally.others_read += [line for path in traces for line in _strangers(path, root)]
    return tally


def _tasks(seed: int, first: int, n_files: int, root: Path, good: bytes) -> Iterator[Task]:
    """Each file is written elsewhere and moved to where it is decoded, so that only the decode opens it there."""
    for index in range(first, first + n_files):
        what, content = fuzzed(seed, index)
        yield _task(root, index, f"{index:06d}.mp4", what, content)
        if index % EVERY_GOOD == 0:
            yield _task(root, -1, f"{index:06d}-good.mp4", "good", good)


def _task(root: Path, index: int, name: str, what: str, content: bytes) -> Task:
    (root / "made" / name).write_bytes(content)
    path = (root / "made" / name).rename(root / "files" / name)
    return Task(index, name, what, path)


def _hear(child: Child, tally: Tally) -> None:
    assert child.process.stdout is not None
    heard = os.read(child.process.stdout.fileno(), 1 << 16)
    if heard:
        child.heard = time.monotonic()
    child.buffer = (child.buffer + heard).lstrip(b".")
    while b"\n" in child.buffer:
        line, _, rest = child.buffer.partition(b"\n")
        child.buffer = rest.lstrip(b".")
        ended = json.loads(line.lstrip(b"."))
        if "ready" in ended:
            child.ready = True
        elif child.task is not None:
            _settle(child.task, ended, tally)
            child.task = None


def _settle(task: Task, ended: dict[str, object], tally: Tally) -> None:
    """Record the end of one file."""
    task.path.unlink()
    tally.longest_s = max(tally.longest_s, time.monotonic() - task.started)
    if task.index < 0:
        tally.good += 1
        if ended.get("numbers") != list(range(GOOD_FRAMES)):
            tally.good_lost.append(f"{task.name}: {ended}")
        return
    tally.files += 1
    tally.reasons[str(ended["reason"])] += 1
    tally.kept += bool(ended.get("truncated"))
    tally.ends[task.index] = (ended["reason"], ended.get("truncated"), ended.get("pixels"))
    base = only_cut(task.what)
    if base and ended.get("truncated") is False and int(str(ended["n_frames"])) < n_frames(base):
        tally.cut_unmarked.append(f"{tally.seed}/{task.index} {task.what}: {ended['n_frames']} frames")
    if ended["reason"] == "internal":
        tally.internal.append(f"{tally.seed}/{task.index} {task.what}: {ended['detail']}")


def _over(child: Child, tally: Tally, again: list[Task]) -> bool:
    """Has the process died or timed out? If so, decide about its file; the caller starts another process."""
    task, silent_s = child.task, time.monotonic() - child.heard
    if child.process.poll() is not None:
        assert task is not None, "a process died with nothing to do"
        note = child.note.read_text() if child.note.exists() else ""
        if note.startswith(NOTE):
            _settle(task, {"reason": "decode_memory"}, tally)
            return True
        task.crashes += bool(note)
        task.deaths += not note
        tally.crashes += bool(note)
        tally.deaths += not note
        if task.crashes >= 2 or task.deaths >= 3:
            _settle(task, {"reason": "decoder_crash"}, tally)
        else:
            again.append(task)
        return True
    if task is None or silent_s <= DEADLINE_S:
        return False
    child.end()
    tally.hangs += 1
    tally.longest_over_s = max(tally.longest_over_s, time.monotonic() - child.heard - DEADLINE_S)
    _settle(task, {"reason": "decode_timeout"}, tally)
    return True


def _strangers(trace: Path, root: Path) -> list[str]:
    """Lines of a trace, from the first file on, that open an unrelated path or connect to an address."""
    found, begun = [], False
    ours = tuple(
        map(str, (root, REPO, sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/proc/self", "/proc/sys/vm"))
    )  # malloc reads the last one
    for line in trace.read_text(errors="replace").splitlines():
        begun = begun or f"{root}/files/" in line
        path = line.partition('"')[2].partition('"')[0]
        known = path.startswith((*ours, "/sys/", "/dev/null", "/etc/ld.so", str(REPO.parent / "main")))
        if begun and (("connect(" in line) or (path and not known) or "decoy" in path):
            found.append(line)
    return found
