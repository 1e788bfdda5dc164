"""Commands seen from outside: the time, CPU time and memory of a process and its children, and launches of P3D.

CPU seconds change less than elapsed time when other programs use the machine. All processes are sampled twice a second,
so what a process uses between its last sample and its end is missed. A sample costs 1% of a core. Reading the memory
takes about 50 ms, because the kernel counts it page by page, so only every tenth sample includes it. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from bench.rounds import REPO
from p3d.pipeline.dataset.schema import STATS_KEY
from p3d.pipeline.storage.store import Store
from p3d.pipeline.storage.urls import open_store

P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
NULL = [sys.executable, "-m", "bench.null"]  # the same with a network that computes nothing
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SAMPLE_S = 0.5
MEMORY_SAMPLES = 10  # from one look at the memory to the next


class ProcessTree:
    """A running command and its children: `cpu_s` now, `cpu_s_at` a time, and the peak memory `peak_mb`."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.peak_mb = 0.0
        self._samples: list[tuple[float, float]] = []  # seconds since the epoch, CPU seconds until then
        self._root = psutil.Process(process.pid)
        self._cpu_s: dict[int, float] = {}
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def cpu_s(self) -> float:
        """CPU seconds that all processes took so far, including those that have ended."""
        with self._lock:
            for pid in self._pids():
                self._cpu_s[pid] = max(_cpu_s(pid), self._cpu_s.get(pid, 0.0))
            return sum(self._cpu_s.values())

    def cpu_s_at(self, when: float) -> float:
        """CPU seconds until a time in seconds since the epoch, interpolated linearly between samples."""
        times, values = zip(*self._samples, strict=True)
        return float(np.interp(when, times, values))

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self._watcher.join()

    def _pids(self) -> list[int]:
        try:
            return [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self._samples.append((time.time(), self.cpu_s()))
            if len(self._samples) % MEMORY_SAMPLES == 0:
                self.peak_mb = max(self.peak_mb, sum(map(_own_mb, self._pids())))


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended: its elapsed seconds and its processes."""

    seconds: float
    tree: ProcessTree


def run(words: Sequence[object], kill_after_s: float | None = None) -> Ended:
    """Run a command from the repository's root; SIGKILL it after `kill_after_s`. SystemExit if it fails otherwise."""
    command = list(map(str, words))
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPO, env=env)
        tree = ProcessTree(process)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            process.terminate()  # in case this process is interrupted; no effect on a command that has ended
            process.wait()
            seconds = time.monotonic() - started
            tree.stop()
        output.seek(0)
        if process.returncode != 0 and kill_after_s is None:
            code, text = process.returncode, output.read()[-3000:]
            raise SystemExit(f"{' '.join(command)} ended with exit code {code}: {text}")
    return Ended(seconds, tree)


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launch did between its first and its last shard; `startup_s` is the time before that."""

    clips: int
    videos: int
    seconds: float
    cpu_s: float
    startup_s: float
    peak_mb: float

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds


def launch(src: str | Path, out: str, *options: object, command: Sequence[str] = P3D) -> Launched:
    """Run a launch; SystemExit if it fails or has fewer than two shards.

    The time between the first and the last shard excludes the start of Ray and the loading of weights, and includes all
    commits and gaps. The footer of a shard says when it was computed, so nothing has to look for files while the job
    runs, which would take a share of the cores that are measured.
    """
    started = time.time()
    ended = run([*command, "launch", src, out, *options])
    shards = sorted(_shards(open_store(out)))
    if len(shards) < 2:
        raise SystemExit(f"{out} has {len(shards)} shards; a rate needs at least two")
    (first, _, _), *later = shards
    last, _, _ = later[-1]
    return Launched(
        sum(clips for _, clips, _ in later),
        sum(videos for _, _, videos in later),
        last - first,
        ended.tree.cpu_s_at(last) - ended.tree.cpu_s_at(first),
        first - started - (last - first) / len(later),
        ended.tree.peak_mb,
    )


def _shards(store: Store) -> Iterator[tuple[float, int, int]]:
    """(time when its rows were computed, clips, videos) of each shard."""
    for info in list(store.list("clips/")):
        with store.open(info.key) as clips, store.open(info.key.replace("clips/", "videos/")) as videos:
            footer = pq.ParquetFile(clips).metadata
            ended = json.loads(footer.metadata[STATS_KEY.encode()])["ended"]
            yield datetime.fromisoformat(ended).timestamp(), footer.num_rows, pq.ParquetFile(videos).metadata.num_rows


def _cpu_s(pid: int) -> float:
    """User and system seconds of one process; 0 after its end. proc(5)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(words[11]) + int(words[12])) * TICK_S


def _own_mb(pid: int) -> float:
    """MB of private memory of one process plus its share of shared memory; 0 after its end."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)) / 1e3
