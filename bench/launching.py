"""One launch, seen from outside: how fast it is between its first and its last commit, and what it took.

The steady state is what an archive costs: starting Ray and loading weights come before the first commit, and the time
between two commits has everything else in it, the gaps between shards too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from bench.family import Family
from pipeline.store import Store, open_store

LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launch did between its first and its last commit, and how long it took to get there (`startup_s`)."""

    clips: int
    videos: int
    seconds: float
    cpu_s: float
    startup_s: float
    peak_mb: float

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds


def launch(src: str | Path, out: str, *options: object, module: str = "jobs.cli") -> Launched:
    """Run it. SystemExit with what it said if it fails, or if it has fewer than two shards."""
    start = "from jobs.cli import main; main()"
    words = ["-c", start] if module == "jobs.cli" else ["-m", module]
    command = [sys.executable, *words, "launch", str(src), out, *map(str, options)]
    store = open_store(out)
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        family = Family(process)
        seen: dict[str, tuple[float, float]] = {}
        try:
            while process.poll() is None:
                for key in _commits(store):
                    if key not in seen:
                        seen[key] = time.monotonic(), family.cpu_s()
                time.sleep(LOOK_S)
        finally:
            process.terminate()  # where this is interrupted; a job that has ended takes no notice
        family.stop()
        said.seek(0)
        if process.returncode != 0 or len(seen) < 2:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}: {said.read()[-2000:]}")
    (first_at, first_cpu_s), *_, (last_at, last_cpu_s) = seen.values()
    _, *later = seen
    clips, videos = (
        sum(_rows(store, key.replace("clips/", folder)) for key in later) for folder in ("clips/", "videos/")
    )
    return Launched(
        clips,
        videos,
        last_at - first_at,
        last_cpu_s - first_cpu_s,
        first_at - started - (last_at - first_at) / len(later),
        family.peak_mb,
    )


def _commits(store: Store) -> list[str]:
    return [info.key for info in store.list("clips/")]


def _rows(store: Store, key: str) -> int:
    with store.open(key) as content:
        return pq.ParquetFile(content).metadata.num_rows
