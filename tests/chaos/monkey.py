"""The monkey: finds the processes of a running job by role and kills one while a shard is in flight.

A victim is frozen (SIGSTOP), inspected, and only then killed, so its state at death is known. A shard is in flight
while a decode task of the run holds its note `...-<position>-<start>.crash` open (`worker.decoding`).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import P3D

ROLES = ("task", "worker", "driver", "raylet", "gcs")
ENDS_THE_RUN = ("driver", "raylet", "gcs")
SPARED_FROM = 3  # from this attempt on a video is not killed: its third unexplained death would make it fail
LOOK_S = 0.01
FAMILY_S = 0.25  # a new process is noticed within this time


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill while a shard was in flight, after `commits` of the job's `shards`; the victim was at work."""

    role: str
    run: int
    commits: int
    shards: int
    shard_s: float  # time since the last commit or the start of the run: the work that may be lost
    driver_fds: int
    victim: str


@dataclass(slots=True)
class Running:
    """A `p3d` process, the processes that it started, and the file with its output."""

    words: tuple[object, ...]
    said: Path
    env: dict[str, str] = field(default_factory=dict)
    first: str = ""  # Python code that the driver runs first, for example to set a shorter limit
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = field(init=False)
    looked: float = float("-inf")
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                [*P3D[:2], f"{self.first}\n{P3D[2]}", *map(str, self.words)],
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def talk(self) -> str:
        return self.said.read_text()

    def family(self) -> dict[int, str]:
        """pid -> title of every process below the driver."""
        if time.monotonic() - self.looked > FAMILY_S:
            self.looked = time.monotonic()
            with contextlib.suppress(psutil.Error):
                self.members = tuple(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))
        return {pid: name for pid in self.members if (name := title(pid))}

    def of(self, role: str) -> list[int]:
        """The processes of a role."""
        if role == "driver":
            return [] if self.ended else [self.process.pid]
        found = {
            "task": lambda name: name.startswith("ray::decode_video"),
            "worker": lambda name: name.startswith("ray::ShardWorker"),
            "raylet": lambda name: name.endswith("/raylet/raylet"),
            "gcs": lambda name: name.endswith("/gcs/gcs_server"),
        }[role]
        return [pid for pid, name in self.family().items() if found(name)]

    def end(self) -> None:
        """Kill all processes that are left."""
        self.looked = float("-inf")
        for pid in [*self.family(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                if not self.ended or pid != self.process.pid:
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


def title(pid: int) -> str:
    """The title of a process; empty if it has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def note_of(pid: int) -> tuple[int, int] | None:
    """(position in the shard, attempt) of the video that a task decodes; None if it decodes no video now."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if found := re.search(r"-(\d+)-(\d+)\.crash$", str(link.readlink())):
                    return int(found[1]), int(found[2])
    return None


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[bool]:
    """Stop a process during inspection; yields False if it has ended. It continues afterwards unless it was killed."""
    try:
        os.kill(pid, signal.SIGSTOP)
        until = time.monotonic() + 5
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            if time.monotonic() > until:
                break
        yield psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except (ProcessLookupError, psutil.NoSuchProcess):
        yield False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def commits(out: Path) -> int:
    """Shards committed so far."""
    try:
        return sum(path.suffix == ".parquet" for path in (out / "clips").iterdir())
    except FileNotFoundError:
        return 0


def last_commit(out: Path) -> float:
    """When the last shard was committed, in seconds since the epoch; 0 before the first."""
    return max((path.stat().st_mtime for path in (out / "clips").glob("*.parquet")), default=0.0)


def strike(running: Running, role: str, out: Path, shards: int, run: int, rng: random.Random) -> Kill | None:
    """Kill one process of a role if a shard is in flight, after the job's first commit and before its last."""
    tasks = {pid: note for pid in running.of("task") if (note := note_of(pid))}
    if not tasks or not 0 < commits(out) < shards:
        return None
    watched = rng.choice(sorted(tasks))
    victims = [watched] if role == "task" else running.of(role)
    if not victims:
        return None
    victim = rng.choice(victims)
    with frozen(victim) as stopped:
        note, done = note_of(watched), commits(out)
        if not stopped or note is None or not 0 < done < shards:
            return None
        if role == "task" and note[1] >= SPARED_FROM:
            return None
        since = min(time.time() - last_commit(out), time.monotonic() - running.started)
        name = f"{title(victim)} {note[0]}-{note[1]}" if role == "task" else title(victim)
        with contextlib.suppress(psutil.Error):
            kill = Kill(role, run, done, shards, round(since, 3), psutil.Process(running.process.pid).num_fds(), name)
            os.kill(victim, signal.SIGKILL)
            return kill
    return None


OURS = ("ray::ShardWorker", "ray::decode_video")


class Mourners(threading.Thread):
    """Measures how long our processes, and Ray's own, outlive their driver.

    Ray's agents take a minute; without `patience` they are killed once our processes have ended.
    """

    LIMIT_S = 120.0

    def __init__(self, family: dict[int, str], *, patience: bool) -> None:
        super().__init__(daemon=True)
        self.patience = patience
        self.processes: dict[psutil.Process, str] = {}
        for pid, name in family.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.processes[psutil.Process(pid)] = name
        self.ours_s = self.rays_s = 0.0
        self.left: list[str] = []
        self.begun = time.monotonic()
        self.start()

    def run(self) -> None:
        while self.processes and (waited := time.monotonic() - self.begun) < self.LIMIT_S:
            for process in [one for one in self.processes if not _lives(one)]:
                name = self.processes.pop(process)
                if name.startswith(OURS):
                    self.ours_s = max(self.ours_s, waited)
                else:
                    self.rays_s = max(self.rays_s, waited)
            if not self.patience and not any(name.startswith(OURS) for name in self.processes.values()):
                for process in self.processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.1)
        self.left = sorted(self.processes.values())


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
